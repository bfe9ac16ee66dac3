// How weights lie in memory.
//
// A tile is 16 rows ("lanes") of the weight [rows, cols]; the last tile is padded with zero rows. F32, F16 and BF16 are
// 32-bit words [words][16 lanes]; a word holds consecutive columns of one row, F32 1 column, F16 and BF16 2, the first
// in the low half. Quantized formats are blocks of 64 columns, K formats and IQ4_XS of 256, one after another, so that
// a kernel reads a tile as one stream. A block holds, each the file's own values in the order in which kernels read
// them:
//
//   codes       per group of 32 columns, 32-bit words [words][16 lanes] of fields of 8, 4, 2 or 1 bits. Field k of byte
//               j, counted from the low end, is column 4 * k + j of the word. Codes of 3, 5 or 6 bits have words of
//               their low 2 or 4 bits and then words of the rest.
//   sub_scales  [sub_scale_bytes * 16 lanes]: the file's bytes, a half (IQ4_XS) and then 32-bit words
//   scales      f16 [scales][16 lanes], a scale per 32 columns, or 256
//   mins        f16 [scales][16 lanes]
//
//   format    bits   value                                  sub-scales of a block of 256 columns
//   Q8_0      8      scale * (code - 128)                   -           (codes are the file's int8 + 128)
//   Q4_0      4      scale * (code - 8)
//   Q4_1      4      scale * code + min
//   Q5_0      4 + 1  scale * (code - 16)
//   Q5_1      4 + 1  scale * code + min
//   IQ4_NL    4      scale * codebook[code]
//   IQ4_XS    4      scale * (sub - 32) * codebook[code]    8 of 6 bits
//   Q2_K      2      scale * sub * code - min * sub_min     16 of 4 bits, 16 minima of 4
//   Q3_K      2 + 1  scale * (sub - 32) * (code - 4)        16 of 6 bits
//   Q4_K      4      scale * sub * code - min * sub_min     8 of 6 bits, 8 minima of 6
//   Q5_K      4 + 1  scale * sub * code - min * sub_min     8 of 6 bits, 8 minima of 6
//   Q6_K      4 + 2  scale * sub * (code - 32)              16 of 8 bits, signed
//
// Blocks are padded to 64 bytes, the last one of 64 columns to its size, odd columns of 2-column words to an even
// count. A 16 x 4 word row is also what AMX reads as a B tile; a layout for Arm's i8mm (8 x 8) would be another layout
// id. block_codes.h reads the formats.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "memory.h"

namespace jinn {

constexpr int kLayoutId = 3;
constexpr int kTileRows = 16;
constexpr int kGroup = 32;  // columns that share a scale in integer activations, and are read at once in weights

enum class Format { F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS };

struct FormatInfo {
  Format format;
  const char* name;
  int block_elems;  // columns per block of the file
  int block_bytes;  // bytes per block of the file
  int low_bits;     // of a code in its first words
  int high_bits;    // of a code in its last words
  // Where a block of the file keeps its float16 scale and minimum and its sub-scales; -1 where it has none.
  int scale_at = -1;
  int min_at = -1;
  int sub_scales_at = -1;
  int sub_scale_bytes = 0;

  bool is_quantized() const { return scale_at >= 0; }
  int bits() const { return low_bits + high_bits; }
};

const FormatInfo& info(Format format);
Format format_by_name(const std::string& name);  // throws std::invalid_argument naming what is supported
size_t tile_bytes(Format format, int64_t cols);

// Where a block of a quantized format keeps what, in bytes from its start, where codes are.
struct BlockLayout {
  int64_t groups;      // of kGroup columns
  int64_t num_scales;  // blocks of the file
  int64_t group_bytes;
  int64_t sub_scales, scales, mins, bytes;

  // `elems` columns share a scale.
  constexpr BlockLayout(int bits, int elems, int sub_scale_bytes, bool has_mins)
      : groups(elems < 2 * kGroup ? 2 : elems / kGroup),
        num_scales(groups * kGroup / elems),
        group_bytes(4 * kTileRows * bits),
        sub_scales(groups * group_bytes),
        scales(sub_scales + num_scales * kTileRows * sub_scale_bytes),
        mins(scales + num_scales * kTileRows * 2),
        bytes((mins + (has_mins ? num_scales * kTileRows * 2 : 0) + 63) / 64 * 64) {}
};

class PackedTensor {
 public:
  // In memory of its own, or in a file.
  PackedTensor(Format format, int64_t rows, int64_t cols, const FileRange* file = nullptr);

  // Row `i` of the pack is row `row_order[i]` of the source (all rows in order if null). Packs tiles first .. last - 1.
  void pack(const uint8_t* source, const int32_t* row_order, int64_t first_tile, int64_t last_tile);
  void dequantize_row(int64_t row, float* out) const;

  Format format() const { return format_; }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  int64_t num_tiles() const { return (rows_ + kTileRows - 1) / kTileRows; }
  size_t tile_bytes() const { return tile_bytes_; }
  size_t nbytes() const { return tile_bytes_ * static_cast<size_t>(num_tiles()); }
  const Memory& memory() const { return data_; }
  const uint8_t* tile(int64_t t) const { return data_.data() + tile_bytes_ * static_cast<size_t>(t); }
  std::span<const uint8_t> tiles(int64_t first, int64_t last) const { return {tile(first), tile(last)}; }

 private:
  Format format_;
  int64_t rows_, cols_;
  size_t tile_bytes_;
  Memory data_;
};

}  // namespace jinn
