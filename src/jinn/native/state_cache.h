// The recurrent states of linear-attention layers, float32, a slot per sequence.
//
// A slot holds, layer by layer:
//
//   states   [value heads][slices][key_dim][columns of the slice]   the delta rule's; kStateCols columns to a slice,
//                                                                   the last padded to whole vectors
//   tail     [conv_kernel - 1][conv_dim]                            the convolution's last inputs, newest last
//
// What the drafts of a step would change is kept aside in a log of the slot until the next step says how many of them
// were accepted:
//
//   updates  [value heads][slices][max_drafts][key | delta | decay]
//   inputs   [max_drafts][conv_dim]                                 of the convolution
#pragma once

#include <cstdint>
#include <vector>

#include "memory.h"

namespace jinn {

constexpr int64_t kStateCols = 64;

struct StateSpec {
  int64_t num_key_heads, num_value_heads, key_dim, value_dim, conv_kernel;

  int64_t conv_dim() const { return 2 * num_key_heads * key_dim + num_value_heads * value_dim; }
  int64_t num_slices() const { return (value_dim + kStateCols - 1) / kStateCols; }
  bool operator==(const StateSpec&) const = default;
};

// One sequence's part in a step: its tokens, and what its slot takes in.
struct StateStep {
  int64_t first_token;   // of the batch
  int64_t num_taken_in;  // tokens, followed by
  int64_t num_drafts;
  int64_t num_accepted;  // of the drafts kept aside
  bool is_first;         // the slot's content is another sequence's

  int64_t num_tokens() const { return num_taken_in + num_drafts; }
};

// What one update of a state needs.
struct StateUpdate {
  float* key;    // [key_dim], normalised
  float* delta;  // [columns of the slice]
  float* decay;  // [1]
};

// One slice of a value head's state, and its log.
struct StateSlice {
  float* state;  // [key_dim][width]
  float* log;
  int64_t width;  // whole vectors
  int64_t key_dim;

  int64_t update_size() const { return padded(key_dim) + width + padded(1); }
  StateUpdate update(int64_t draft) const {
    float* key = log + draft * update_size();
    return {key, key + padded(key_dim), key + padded(key_dim) + width};
  }
  static int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }
};

class StateCache {
 public:
  struct Progress {
    int64_t num_tokens = 0;  // taken in
    int64_t num_drafts = 0;  // kept aside
  };

  // Memory is reserved, not touched, until a slot or its log is written.
  StateCache(const std::vector<StateSpec>& layers, int64_t num_slots, int64_t max_drafts);

  int64_t num_slots() const { return num_slots_; }
  int64_t max_drafts() const { return max_drafts_; }
  size_t slot_bytes() const { return slot_size_ * sizeof(float); }
  size_t log_bytes() const { return log_size_ * sizeof(float); }
  const std::vector<StateSpec>& layers() const { return specs_; }

  float* tail(int64_t layer, int64_t slot) const { return slot_data(slot) + places_[at(layer)].tail; }
  float* inputs(int64_t layer, int64_t slot) const { return log_data(slot) + places_[at(layer)].inputs; }
  StateSlice slice(int64_t layer, int64_t slot, int64_t value_head, int64_t slice) const;

  const Progress& progress(int64_t slot) const { return progress_[at(slot)]; }
  void set_progress(int64_t slot, Progress progress) { progress_[at(slot)] = progress; }

  // States and tails; drafts kept aside stay behind.
  void copy_slot(int64_t source, int64_t target);
  void fill_slot(int64_t slot, uint8_t byte);  // log too; poison for tests: 0xff makes every float NaN

 private:
  // Floats from the start of a slot or of its log.
  struct Place {
    size_t states, tail, updates, inputs;
  };

  static size_t at(int64_t index) { return static_cast<size_t>(index); }
  float* slot_data(int64_t slot) const { return reinterpret_cast<float*>(slots_.data()) + slot_size_ * at(slot); }
  float* log_data(int64_t slot) const { return reinterpret_cast<float*>(logs_.data()) + log_size_ * at(slot); }

  std::vector<StateSpec> specs_;
  std::vector<Place> places_;
  int64_t num_slots_, max_drafts_;
  size_t slot_size_ = 0, log_size_ = 0;  // floats
  std::vector<Progress> progress_;
  Memory slots_, logs_;
};

}  // namespace jinn
