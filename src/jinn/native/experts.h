// A mixture of experts: the weights of all experts, and where a step's rows are computed.
//
// Each token has chosen experts, best first. The rows of one expert, a token's choice each, get neighbouring places, so
// that its weights are read once. A row's place never changes its numbers; a token's outputs are added in rank order.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "packed.h"

namespace jinn {

// One matrix [rows, cols] per expert, each in whole tiles. Rows past the last repeat it, and nobody reads their
// product.
class PackedExperts {
 public:
  PackedExperts(Format format, int64_t num_experts, int64_t rows, int64_t cols, const FileRange* file = nullptr);

  static size_t nbytes_of(Format format, int64_t num_experts, int64_t rows, int64_t cols) {
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows * num_experts;
    return tile_bytes(format, cols) * static_cast<size_t>(tiles);
  }

  // The row of an expert's source that each row of `tensor` comes from; row i of an expert from row `row_order[i]`, or
  // from row i if null.
  std::vector<int32_t> source_rows(const int32_t* row_order) const;
  // Packs the expert's tiles first .. last - 1.
  void pack(int64_t expert, const uint8_t* source, const std::vector<int32_t>& source_rows, int64_t first_tile,
            int64_t last_tile);
  void dequantize_row(int64_t expert, int64_t row, float* out) const;

  int64_t num_experts() const { return num_experts_; }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return tensor_.cols(); }
  Format format() const { return tensor_.format(); }
  size_t nbytes() const { return tensor_.nbytes(); }
  int64_t num_tiles() const { return (rows_ + kTileRows - 1) / kTileRows; }  // of one expert
  int64_t first_tile(int64_t expert) const { return expert * num_tiles(); }
  const PackedTensor& tensor() const { return tensor_; }

 private:
  int64_t num_experts_, rows_;
  PackedTensor tensor_;
};

// Buffers with a row per place hold this many places for each choice of each token.
constexpr int64_t kPlacesPerChoice = 2;

// The rows of one expert: places first_place .. first_place + num_rows - 1.
struct ExpertGroup {
  int32_t expert, first_place, num_rows;
};

// A step's groups and places, as they lie in a buffer.
//
// A group lies within a block of kActivationRows places or starts one, as kernels want their rows; what it leaves free
// before it is less than itself, which bounds the places.
class Places {
 public:
  Places(uint8_t* memory, int64_t num_tokens) : memory_(memory), num_tokens_(num_tokens) {}

  static int64_t row_bytes(int64_t num_choices) { return (kHeaderBytes + kChoiceBytes * num_choices + 63) / 64 * 64; }

  // `ids` [tokens, choices] holds int32.
  void assign(Matrix ids, int64_t num_experts);

  int64_t num_groups() const { return header()->num_groups; }
  int64_t num_places() const { return header()->num_places; }
  int64_t num_choices() const { return header()->num_choices; }  // of each token
  const ExpertGroup& group(int64_t g) const { return groups()[g]; }
  // Of each token's choices, [tokens][choices].
  int32_t* place_of() const { return reinterpret_cast<int32_t*>(groups() + num_choices() * num_tokens_); }
  // The token computed at each place, -1 where there is none.
  int32_t* token_at() const { return place_of() + num_choices() * num_tokens_; }

 private:
  struct Header {
    int32_t num_groups, num_places, num_choices;
  };
  static constexpr int64_t kHeaderBytes = 64;
  static constexpr int64_t kChoiceBytes =
      sizeof(ExpertGroup) + sizeof(int32_t) + kPlacesPerChoice * static_cast<int64_t>(sizeof(int32_t));

  Header* header() const { return reinterpret_cast<Header*>(memory_); }
  ExpertGroup* groups() const { return reinterpret_cast<ExpertGroup*>(memory_ + kHeaderBytes); }

  uint8_t* memory_;
  int64_t num_tokens_;
};

}  // namespace jinn
