// How weights lie in memory.
//
// A tile is 16 rows ("lanes") of the weight [rows, cols]; the last tile is padded with zero rows. A tile holds planes,
// one after another, each the file's own values in the order in which the kernels stream them:
//
//   codes   32-bit words [cols / per_word][16 lanes]; a word holds consecutive columns of one row:
//             F32 1 column; F16, BF16 2 (the first in the low half); Q8_0 4 bytes q + 128;
//             Q4_0, Q4_1 8 nibbles: byte j holds column j in its low and column 4 + j in its high nibble
//   scales  f16 [cols / 32][16 lanes]          Q8_0, Q4_0, Q4_1
//   mins    f16 [cols / 32][16 lanes]          Q4_1
//
// Integer codes are unsigned, and a value is scale * (code - offset) with the format's fixed offset, or
// scale * code + min. Tiles are padded to 64 bytes, odd columns of 2-column words to an even count. Formats with 3, 5
// or 6 bits add bit planes, two-level scales stay as they are in the file: one more plane each. A 16 x 4 word row is
// also what AMX reads as a B tile; a layout for Arm's i8mm (8 x 8) would be another layout id.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "memory.h"

namespace jinn {

constexpr int kLayoutId = 1;
constexpr int kTileRows = 16;
constexpr int kGroup = 32;  // columns that share a scale, in weights and in int8 activations

enum class Format { F32, F16, BF16, Q8_0, Q4_0, Q4_1 };

struct FormatInfo {
  Format format;
  const char* name;
  int block_elems;    // columns per block of the file
  int block_bytes;    // bytes per block of the file
  int word_cols;      // columns per 32-bit word
  int offset;         // value = scale * (code - offset)
  bool is_quantized;  // has a scales plane
  bool has_mins;
};

const FormatInfo& info(Format format);
Format format_by_name(const std::string& name);  // throws std::invalid_argument naming what is supported

// Byte offsets inside one tile.
struct TileLayout {
  size_t scales = 0, mins = 0, bytes = 0;
  TileLayout(Format format, int64_t cols);
};

class PackedTensor {
 public:
  PackedTensor(Format format, int64_t rows, int64_t cols);

  // Row `i` of the pack is row `row_order[i]` of the source (all rows in order if null). Packs tiles first .. last - 1.
  void pack(const uint8_t* source, const int32_t* row_order, int64_t first_tile, int64_t last_tile);
  void dequantize_row(int64_t row, float* out) const;

  Format format() const { return format_; }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  int64_t num_tiles() const { return (rows_ + kTileRows - 1) / kTileRows; }
  size_t nbytes() const { return layout_.bytes * static_cast<size_t>(num_tiles()); }
  const TileLayout& layout() const { return layout_; }
  const uint8_t* tile(int64_t t) const { return data_.data() + layout_.bytes * static_cast<size_t>(t); }

 private:
  Format format_;
  int64_t rows_, cols_;
  TileLayout layout_;
  Memory data_;
};

}  // namespace jinn
