#include "packed.h"

#include <array>
#include <cstring>
#include <stdexcept>

#define JINN_ISA base
#include "vec.h"

namespace jinn {
namespace {

using base::bf16_to_float;
using base::half_to_float;

constexpr std::array<FormatInfo, 6> kFormats = {{
    {Format::F32, "F32", 1, 4, 1, 0, false, false},
    {Format::F16, "F16", 1, 2, 2, 0, false, false},
    {Format::BF16, "BF16", 1, 2, 2, 0, false, false},
    {Format::Q8_0, "Q8_0", 32, 34, 4, 128, true, false},
    {Format::Q4_0, "Q4_0", 32, 18, 8, 8, true, false},
    {Format::Q4_1, "Q4_1", 32, 20, 8, 0, true, true},
}};

size_t round_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

uint32_t load_u32(const uint8_t* from) {
  uint32_t word;
  std::memcpy(&word, from, sizeof(word));
  return word;
}

uint16_t load_u16(const uint8_t* from) {
  uint16_t half;
  std::memcpy(&half, from, sizeof(half));
  return half;
}

// One row of one tile while it is packed or read: lane `lane` of each plane.
struct Lane {
  uint8_t* codes;
  uint8_t* scales;
  uint8_t* mins;
  int lane;

  Lane(uint8_t* tile, const TileLayout& layout, int lane)
      : codes(tile), scales(tile + layout.scales), mins(tile + layout.mins), lane(lane) {}

  uint8_t* word(int64_t w) const { return codes + (w * kTileRows + lane) * 4; }
  uint8_t* scale(int64_t group) const { return scales + (group * kTileRows + lane) * 2; }
  uint8_t* min(int64_t group) const { return mins + (group * kTileRows + lane) * 2; }
};

void pack_words(const uint8_t* row, int64_t row_bytes, const Lane& lane) {
  for (int64_t at = 0; at + 4 <= row_bytes; at += 4) std::memcpy(lane.word(at / 4), row + at, 4);
  if (row_bytes % 4) std::memcpy(lane.word(row_bytes / 4), row + row_bytes / 4 * 4, row_bytes % 4);
}

void pack_q8(const uint8_t* block, int64_t group, const Lane& lane) {
  std::memcpy(lane.scale(group), block, 2);
  for (int w = 0; w < 8; ++w) {
    const uint32_t codes = load_u32(block + 2 + 4 * w) ^ 0x80808080u;
    std::memcpy(lane.word(group * 8 + w), &codes, 4);
  }
}

// The file's byte j holds columns j and j + 16 of the block; nibbles of 8 consecutive columns make one word.
void pack_q4(const uint8_t* nibbles, int64_t group, const Lane& lane) {
  for (int w = 0; w < 4; ++w) {
    const uint8_t* from = nibbles + (w % 2) * 8;
    const int shift = w < 2 ? 0 : 4;
    const uint32_t first = (load_u32(from) >> shift) & 0x0f0f0f0fu;
    const uint32_t second = (load_u32(from + 4) >> shift) & 0x0f0f0f0fu;
    const uint32_t codes = first | (second << 4);
    std::memcpy(lane.word(group * 4 + w), &codes, 4);
  }
}

void pack_row(Format format, const uint8_t* row, int64_t cols, const Lane& lane) {
  const FormatInfo& f = info(format);
  if (!f.is_quantized) return pack_words(row, cols * f.block_bytes, lane);
  for (int64_t group = 0; group < cols / kGroup; ++group, row += f.block_bytes) {
    if (format == Format::Q8_0) {
      pack_q8(row, group, lane);
      continue;
    }
    std::memcpy(lane.scale(group), row, 2);
    if (f.has_mins) std::memcpy(lane.min(group), row + 2, 2);
    pack_q4(row + (f.has_mins ? 4 : 2), group, lane);
  }
}

float code_at(const FormatInfo& f, const Lane& lane, int64_t col) {
  const uint8_t* word = lane.word(col / f.word_cols);
  const int at = static_cast<int>(col % f.word_cols);
  if (f.word_cols == 4) return word[at];
  return static_cast<float>(at < 4 ? word[at] & 15 : word[at - 4] >> 4);
}

int64_t checked_cols(Format format, int64_t rows, int64_t cols) {
  if (rows < 1 || cols < 1 || cols % info(format).block_elems != 0) {
    throw std::invalid_argument("[packed] shape [" + std::to_string(rows) + ", " + std::to_string(cols) +
                                "] is not whole blocks of " + info(format).name);
  }
  return cols;
}

}  // namespace

const FormatInfo& info(Format format) { return kFormats[static_cast<size_t>(format)]; }

Format format_by_name(const std::string& name) {
  std::string supported;
  for (const FormatInfo& f : kFormats) {
    if (name == f.name) return f.format;
    supported += std::string(supported.empty() ? "" : ", ") + f.name;
  }
  throw std::invalid_argument("tensor type " + name + " is not supported; supported are " + supported);
}

TileLayout::TileLayout(Format format, int64_t cols) {
  const FormatInfo& f = info(format);
  const size_t words = static_cast<size_t>((cols + f.word_cols - 1) / f.word_cols);
  const size_t plane = f.is_quantized ? static_cast<size_t>(cols / kGroup) * kTileRows * 2 : 0;
  scales = words * kTileRows * 4;
  mins = scales + plane;
  bytes = round_up(mins + (f.has_mins ? plane : 0), 64);
}

PackedTensor::PackedTensor(Format format, int64_t rows, int64_t cols)
    : format_(format),
      rows_(rows),
      cols_(cols),
      layout_(format, checked_cols(format, rows, cols)),
      data_(nbytes(), true) {}

void PackedTensor::pack(const uint8_t* source, const int32_t* row_order, int64_t first_tile, int64_t last_tile) {
  const FormatInfo& f = info(format_);
  const int64_t row_bytes = cols_ / f.block_elems * f.block_bytes;
  for (int64_t t = first_tile; t < last_tile; ++t) {
    uint8_t* tile = data_.data() + layout_.bytes * static_cast<size_t>(t);
    for (int lane = 0; lane < kTileRows && t * kTileRows + lane < rows_; ++lane) {
      const int64_t row = t * kTileRows + lane;
      const int64_t from = row_order ? row_order[row] : row;
      pack_row(format_, source + from * row_bytes, cols_, Lane(tile, layout_, lane));
    }
  }
}

void PackedTensor::dequantize_row(int64_t row, float* out) const {
  const FormatInfo& f = info(format_);
  uint8_t* tile = data_.data() + layout_.bytes * static_cast<size_t>(row / kTileRows);
  const Lane lane(tile, layout_, static_cast<int>(row % kTileRows));
  for (int64_t col = 0; col < cols_; ++col) {
    if (f.is_quantized) {
      const float scale = half_to_float(load_u16(lane.scale(col / kGroup)));
      out[col] = scale * (code_at(f, lane, col) - static_cast<float>(f.offset));
      if (f.has_mins) out[col] += half_to_float(load_u16(lane.min(col / kGroup)));
      continue;
    }
    const uint8_t* word = lane.word(col / f.word_cols);
    if (format_ == Format::F32) {
      std::memcpy(out + col, word, 4);
    } else {
      const uint16_t half = load_u16(word + 2 * (col % 2));
      out[col] = format_ == Format::F16 ? half_to_float(half) : bf16_to_float(half);
    }
  }
}

}  // namespace jinn
