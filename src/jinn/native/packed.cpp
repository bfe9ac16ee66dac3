#include "packed.h"

#include <array>
#include <cstring>
#include <stdexcept>

#define JINN_ISA base
#include "block_codes.h"

namespace jinn {
namespace {

using base::kGroupWords;

constexpr std::array<FormatInfo, 15> kFormats = {{
    {Format::F32, "F32", 1, 4, 32, 0},
    {Format::F16, "F16", 1, 2, 16, 0},
    {Format::BF16, "BF16", 1, 2, 16, 0},
    {Format::Q8_0, "Q8_0", 32, 34, 8, 0, 0},
    {Format::Q4_0, "Q4_0", 32, 18, 4, 0, 0},
    {Format::Q4_1, "Q4_1", 32, 20, 4, 0, 0, 2},
    {Format::Q5_0, "Q5_0", 32, 22, 4, 1, 0},
    {Format::Q5_1, "Q5_1", 32, 24, 4, 1, 0, 2},
    {Format::Q2_K, "Q2_K", 256, 84, 2, 0, 80, 82, 0, 16},
    {Format::Q3_K, "Q3_K", 256, 110, 2, 1, 108, -1, 96, 12},
    {Format::Q4_K, "Q4_K", 256, 144, 4, 0, 0, 2, 4, 12},
    {Format::Q5_K, "Q5_K", 256, 176, 4, 1, 0, 2, 4, 12},
    {Format::Q6_K, "Q6_K", 256, 210, 4, 2, 208, -1, 192, 16},
    {Format::IQ4_NL, "IQ4_NL", 32, 18, 4, 0, 0},
    {Format::IQ4_XS, "IQ4_XS", 256, 136, 4, 0, 0, -1, 2, 6},
}};

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

BlockLayout block_layout(const FormatInfo& f) { return {f.bits(), f.block_elems, f.sub_scale_bytes, f.min_at >= 0}; }

// One row of one tile while it is packed or read: lane `lane` of its words.
struct Lane {
  uint8_t* words;
  int lane;

  uint8_t* word(int64_t w) const { return words + (w * kTileRows + lane) * 4; }
  uint8_t* half(int64_t h) const { return words + (h * kTileRows + lane) * 2; }
};

void pack_words(const uint8_t* row, int64_t row_bytes, Lane lane) {
  for (int64_t at = 0; at + 4 <= row_bytes; at += 4) std::memcpy(lane.word(at / 4), row + at, 4);
  if (row_bytes % 4) std::memcpy(lane.word(row_bytes / 4), row + row_bytes / 4 * 4, row_bytes % 4);
}

// The functions below read 32 codes of a file's block into the bytes of eight words, in the order of their columns.

// Fields of `mask`'s width in 32 consecutive bytes, `shift` bits up.
void read_fields(const uint8_t* from, int shift, uint32_t mask, uint32_t* words) {
  for (int w = 0; w < kGroupWords; ++w) words[w] = (load_u32(from + 4 * w) >> shift) & mask;
}

// Byte j of 16 holds columns j and j + 16.
void read_nibbles(const uint8_t* from, uint32_t* words) {
  for (int w = 0; w < kGroupWords; ++w) words[w] = (load_u32(from + 4 * (w % 4)) >> (4 * (w / 4))) & 0x0f0f0f0fu;
}

// Adds bit c of 32 as bit 4 of column c.
void add_fifth_bits(const uint8_t* from, uint32_t* words) {
  const uint32_t bits = load_u32(from);
  for (int w = 0; w < kGroupWords; ++w) {
    const uint32_t four = (bits >> (4 * w)) & 15u;
    words[w] |= (four * 0x00204081u & 0x01010101u) << 4;  // a byte each
  }
}

// Adds fields as read_fields reads them, `to` bits up.
void add_fields(const uint8_t* from, int shift, uint32_t mask, int to, uint32_t* words) {
  uint32_t fields[kGroupWords];
  read_fields(from, shift, mask, fields);
  for (int w = 0; w < kGroupWords; ++w) words[w] |= fields[w] << to;
}

// Group `g` of a block. The K formats put the groups of 64 or 128 columns side by side in the same bytes.
void read_codes(Format format, const uint8_t* block, int g, uint32_t* words) {
  constexpr uint32_t kBit = 0x01010101u, kPair = 0x03030303u, kNibble = 0x0f0f0f0fu;
  switch (format) {
    case Format::Q8_0:
      read_fields(block + 2, 0, ~0u, words);
      for (int w = 0; w < kGroupWords; ++w) words[w] ^= 0x80808080u;  // + 128
      break;
    case Format::Q4_0:
    case Format::IQ4_NL:
      read_nibbles(block + 2, words);
      break;
    case Format::Q4_1:
      read_nibbles(block + 4, words);
      break;
    case Format::Q5_0:
      read_nibbles(block + 6, words);
      add_fifth_bits(block + 2, words);
      break;
    case Format::Q5_1:
      read_nibbles(block + 8, words);
      add_fifth_bits(block + 4, words);
      break;
    case Format::Q2_K:
      read_fields(block + 16 + 32 * (g / 4), 2 * (g % 4), kPair, words);
      break;
    case Format::Q3_K:
      read_fields(block + 32 + 32 * (g / 4), 2 * (g % 4), kPair, words);
      add_fields(block, g, kBit, 2, words);
      break;
    case Format::Q4_K:
      read_fields(block + 16 + 32 * (g / 2), 4 * (g % 2), kNibble, words);
      break;
    case Format::Q5_K:
      read_fields(block + 48 + 32 * (g / 2), 4 * (g % 2), kNibble, words);
      add_fields(block + 16, g, kBit, 4, words);
      break;
    case Format::Q6_K:
      read_fields(block + 64 * (g / 4) + 32 * (g % 2), 4 * (g % 4 / 2), kNibble, words);
      add_fields(block + 128 + 32 * (g / 4), 2 * (g % 4), kPair, 4, words);
      break;
    case Format::IQ4_XS:
      read_nibbles(block + 8 + 16 * g, words);
      break;
    case Format::F32:
    case Format::F16:
    case Format::BF16:
      break;  // not in blocks
  }
}

// The `bits` bits from `shift` on of each code as fields of as many words.
void pack_fields(const uint32_t* codes, int bits, int shift, Lane to) {
  const int per_byte = 8 / bits;
  const uint32_t mask = 0x01010101u * ((1u << bits) - 1);
  for (int w = 0; w < bits; ++w) {
    uint32_t word = 0;
    for (int k = 0; k < per_byte; ++k) word |= ((codes[w * per_byte + k] >> shift) & mask) << (bits * k);
    std::memcpy(to.word(w), &word, 4);
  }
}

// The file's bytes as a half, where their count is not whole words, and words.
void pack_sub_scales(const uint8_t* from, int bytes, uint8_t* to, int lane) {
  const int half = bytes % 4;
  std::memcpy(to + half * lane, from, static_cast<size_t>(half));
  for (int at = half; at < bytes; at += 4) std::memcpy(to + at * kTileRows + 4 * lane, from + at, 4);
}

// Block `index` of a row of the file, of which several may share a block of the tile.
void pack_block(const FormatInfo& f, const uint8_t* from, int64_t index, uint8_t* tile, int lane) {
  const BlockLayout layout = block_layout(f);
  uint8_t* block = tile + index / layout.num_scales * layout.bytes;
  const int64_t at = index % layout.num_scales;
  std::memcpy(Lane{block + layout.scales, lane}.half(at), from + f.scale_at, 2);
  if (f.min_at >= 0) std::memcpy(Lane{block + layout.mins, lane}.half(at), from + f.min_at, 2);
  pack_sub_scales(from + f.sub_scales_at, f.sub_scale_bytes, block + layout.sub_scales, lane);
  const int num_groups = f.block_elems / kGroup;
  for (int g = 0; g < num_groups; ++g) {
    uint8_t* group = block + (at * num_groups + g) * layout.group_bytes;
    uint32_t codes[kGroupWords];
    read_codes(f.format, from, g, codes);
    pack_fields(codes, f.low_bits, 0, {group, lane});
    if (f.high_bits > 0) pack_fields(codes, f.high_bits, f.low_bits, {group + 4 * kTileRows * f.low_bits, lane});
  }
}

void pack_row(const FormatInfo& f, const uint8_t* row, int64_t cols, uint8_t* tile, int lane) {
  if (!f.is_quantized()) return pack_words(row, cols * f.block_bytes, {tile, lane});
  for (int64_t b = 0; b < cols / f.block_elems; ++b) pack_block(f, row + b * f.block_bytes, b, tile, lane);
}

float float_at(Format format, Lane lane, int64_t col) {
  if (format == Format::F32) return base::bit_cast<float>(load_u32(lane.word(col)));
  const uint16_t half = load_u16(lane.word(col / 2) + 2 * (col % 2));
  return format == Format::F16 ? base::half_to_float(half) : base::bf16_to_float(half);
}

template <class Codes>
void dequantize_groups(const base::Tile& tile, int lane, int64_t cols, float* out) {
  for (int64_t g = 0; g < cols / kGroup; ++g) {
    base::u32x16 words[kGroupWords];
    base::f32x16 scale[Codes::kScales], min[Codes::kScales] = {};
    Codes::load_codes(tile, g, words);
    Codes::load_scales(tile, g, scale, min);
    for (int col = 0; col < kGroup; ++col) {
      const int code = static_cast<int>(words[col / 4][lane] >> (8 * (col % 4)) & 0xffu);
      const int s = col * Codes::kScales / kGroup;
      const float value = scale[s][lane] * static_cast<float>(code - Codes::kOffset);
      *out++ = Codes::kHasMins ? value + min[s][lane] : value;
    }
  }
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

size_t tile_bytes(Format format, int64_t cols) {
  const FormatInfo& f = info(format);
  if (!f.is_quantized()) return static_cast<size_t>((cols * f.bits() + 31) / 32 * 4 * kTileRows);
  const BlockLayout layout = block_layout(f);
  return static_cast<size_t>((cols / kGroup + layout.groups - 1) / layout.groups * layout.bytes);
}

PackedTensor::PackedTensor(Format format, int64_t rows, int64_t cols, const FileRange* file)
    : format_(format),
      rows_(rows),
      cols_(cols),
      tile_bytes_(jinn::tile_bytes(format, checked_cols(format, rows, cols))),
      data_(file ? Memory(nbytes(), *file) : Memory(nbytes(), true)) {}

void PackedTensor::pack(const uint8_t* source, const int32_t* row_order, int64_t first_tile, int64_t last_tile) {
  const FormatInfo& f = info(format_);
  const int64_t row_bytes = cols_ / f.block_elems * f.block_bytes;
  for (int64_t t = first_tile; t < last_tile; ++t) {
    uint8_t* tile = data_.data() + tile_bytes_ * static_cast<size_t>(t);
    for (int lane = 0; lane < kTileRows && t * kTileRows + lane < rows_; ++lane) {
      const int64_t row = t * kTileRows + lane;
      const int64_t from = row_order ? row_order[row] : row;
      pack_row(f, source + from * row_bytes, cols_, tile, lane);
    }
  }
}

void PackedTensor::dequantize_row(int64_t row, float* out) const {
  const int64_t t = row / kTileRows;
  const int lane = static_cast<int>(row % kTileRows);
  if (!info(format_).is_quantized()) {
    const Lane values{data_.data() + tile_bytes_ * static_cast<size_t>(t), lane};
    for (int64_t col = 0; col < cols_; ++col) out[col] = float_at(format_, values, col);
    return;
  }
  base::with_block_codes(
      format_, [&](auto codes) { dequantize_groups<decltype(codes)>(base::Tile(*this, t), lane, cols_, out); });
}

}  // namespace jinn
