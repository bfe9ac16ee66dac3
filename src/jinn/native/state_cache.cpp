#include "state_cache.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace jinn {
namespace {

int64_t padded_value_dim(const StateSpec& spec) { return StateSlice::padded(spec.value_dim); }

// Floats of one update, for all slices of a value head.
int64_t update_size(const StateSpec& spec) {
  return spec.num_slices() * (StateSlice::padded(spec.key_dim) + StateSlice::padded(1)) + padded_value_dim(spec);
}

void check(const StateSpec& spec) {
  if (spec.num_key_heads < 1 || spec.num_value_heads < 1 || spec.num_value_heads % spec.num_key_heads != 0 ||
      spec.key_dim < 1 || spec.value_dim < 1 || spec.conv_kernel < 1) {
    throw std::invalid_argument(
        "[state_cache] expected positive sizes, and whole groups of value heads for each key head");
  }
}

}  // namespace

StateCache::StateCache(const std::vector<StateSpec>& layers, int64_t num_slots, int64_t max_drafts)
    : specs_(layers), num_slots_(num_slots), max_drafts_(max_drafts), slots_(1, false), logs_(1, false) {
  if (num_slots < 1 || max_drafts < 0) {
    throw std::invalid_argument("[state_cache] expected num_slots >= 1 and max_drafts >= 0");
  }
  for (const StateSpec& spec : layers) {
    check(spec);
    Place place;
    const auto reserve = [](size_t& size, int64_t floats) {
      const size_t start = size;
      size += at(StateSlice::padded(floats));
      return start;
    };
    place.states = reserve(slot_size_, spec.num_value_heads * spec.key_dim * padded_value_dim(spec));
    place.tail = reserve(slot_size_, (spec.conv_kernel - 1) * spec.conv_dim());
    place.updates = reserve(log_size_, max_drafts * spec.num_value_heads * update_size(spec));
    place.inputs = reserve(log_size_, max_drafts * spec.conv_dim());
    places_.push_back(place);
  }
  progress_.resize(at(num_slots));
  slots_ = Memory(std::max<size_t>(1, slot_bytes() * at(num_slots)), false);
  logs_ = Memory(std::max<size_t>(1, log_bytes() * at(num_slots)), false);
}

StateSlice StateCache::slice(int64_t layer, int64_t slot, int64_t value_head, int64_t slice) const {
  const StateSpec& spec = specs_[at(layer)];
  const int64_t first_col = slice * kStateCols;
  StateSlice view{slot_data(slot) + places_[at(layer)].states, log_data(slot) + places_[at(layer)].updates,
                  std::min(kStateCols, padded_value_dim(spec) - first_col), spec.key_dim};
  view.state += spec.key_dim * (value_head * padded_value_dim(spec) + first_col);
  const int64_t before = StateSlice::padded(spec.key_dim) + StateSlice::padded(1) + kStateCols;  // of an earlier slice
  view.log += max_drafts_ * (value_head * update_size(spec) + slice * before);
  return view;
}

void StateCache::copy_slot(int64_t source, int64_t target) {
  std::memmove(slot_data(target), slot_data(source), slot_bytes());
  progress_[at(target)] = {progress_[at(source)].num_tokens, 0};
}

void StateCache::fill_slot(int64_t slot, uint8_t byte) {
  std::memset(slot_data(slot), byte, slot_bytes());
  std::memset(log_data(slot), byte, log_bytes());
  progress_[at(slot)] = {};
}

}  // namespace jinn
