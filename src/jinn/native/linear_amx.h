// The integer dot products of a linear on AMX: 16 rows of activations by one tile of weights at a time.
//
// The products are exact integers and everything after them is the same float arithmetic as in linear_int8.cpp, so the
// bits are the same too.
#pragma once

#include "kernels.h"
#include "linear_store.h"
#include "vec.h"

namespace jinn::JINN_ISA {

constexpr int kAmxRows = kActivationRows;
constexpr int kGroupBytes = kGroup * kTileRows;  // signed codes of one group of one tile

struct __attribute__((packed)) AmxConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tile 0: sums, 16 x 16 int32. Tile 1: activations, 16 rows x 32 bytes. Tile 2: codes, 8 rows x 16 x 4 bytes.
class AmxTiles {
 public:
  AmxTiles() {
    AmxConfig config;
    config.row_bytes[0] = 64, config.rows[0] = kAmxRows;
    config.row_bytes[1] = kGroup, config.rows[1] = kAmxRows;
    config.row_bytes[2] = 64, config.rows[2] = kGroup / 4;
    _tile_loadconfig(&config);
  }
  ~AmxTiles() { _tile_release(); }
};

// Codes of one tile as signed bytes, group after group: code - offset.
template <class Codes>
void widen_tile(const PackedTensor& weight, int64_t tile, uint8_t* out) {
  const int64_t num_groups = weight.cols() / kGroup;
  const uint8_t* codes = weight.tile(tile);
  for (int64_t g = 0; g < num_groups; ++g, out += kGroupBytes) {
    u32x16 words[kGroup / 4];
    Codes::load_group(codes + g * Codes::kWordsPerGroup * 64, words);
    for (int w = 0; w < kGroup / 4; ++w) {
      const __m512i offset = _mm512_set1_epi8(static_cast<char>(Codes::kOffset));
      const __m512i code = _mm512_sub_epi8((__m512i)words[w], offset);
      std::memcpy(out + 64 * w, &code, 64);
    }
  }
}

// One tile for 16 rows; `codes` as widen_tile left them.
template <class Codes>
void amx_tile_rows(const LinearPiece& piece, int64_t tile, const uint8_t* codes, int64_t first_row) {
  const PackedTensor& weight = *piece.weight;
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(weight.tile(tile) + weight.layout().scales);
  const uint16_t* mins = reinterpret_cast<const uint16_t*>(weight.tile(tile) + weight.layout().mins);
  const int64_t num_groups = weight.cols() / kGroup;
  const float* row_scales = piece.input.scales(first_row);
  const float* row_scaled_sums = piece.input.scaled_sums(first_row);
  const uint8_t* rows = piece.input.codes(first_row);
  alignas(64) int32_t dots[2][kAmxRows][kLanes];
  const auto multiply = [&](int64_t g) {
    _tile_zero(0);
    _tile_loadd(1, rows + g * kGroup, piece.input.cols);
    _tile_loadd(2, codes + g * kGroupBytes, 64);
    _tile_dpbssd(0, 1, 2);
    _tile_stored(0, dots[g % 2], 64);
  };
  f32x16 y[kAmxRows] = {};
  multiply(0);
  for (int64_t g = 0; g < num_groups; ++g) {
    if (g + 1 < num_groups) multiply(g + 1);
    const f32x16 scale = load_f16(scales + g * kLanes);
    f32x16 min{};
    if constexpr (Codes::kHasMins) min = load_f16(mins + g * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kAmxRows; ++r) {
      const f32x16 dot = to_float(load_as<i32x16>(dots[g % 2][r]));
      y[r] = fma(dot, scale * row_scales[g * kAmxRows + r], y[r]);
      if constexpr (Codes::kHasMins) y[r] = fma(min, set1(row_scaled_sums[g * kAmxRows + r]), y[r]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kAmxRows; ++r) store_tile(piece, tile, first_row + r, y[r]);
}

// The whole sixteens of rows of a piece; returns the first row that is left.
template <class Codes>
int64_t amx_rows(const LinearPiece& piece, int64_t tile) {
  constexpr int64_t kMaxCols = 32 * 1024;
  static thread_local uint8_t* codes = nullptr;
  const int64_t cols = piece.weight->cols();
  const int64_t whole = piece.first_row + (piece.last_row - piece.first_row) / kAmxRows * kAmxRows;
  if (whole == piece.first_row || cols > kMaxCols) return piece.first_row;
  if (codes == nullptr) codes = static_cast<uint8_t*>(std::aligned_alloc(64, kMaxCols * kTileRows));
  widen_tile<Codes>(*piece.weight, tile, codes);
  for (int64_t row = piece.first_row; row < whole; row += kAmxRows) amx_tile_rows<Codes>(piece, tile, codes, row);
  return whole;
}

}  // namespace jinn::JINN_ISA
