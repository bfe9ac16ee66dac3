// The integer dot products of a linear on AMX: a block of 16 rows of activations by one tile of weights at a time.
//
// The products are exact integers and everything after them is the same float arithmetic as in linear_integer.cpp, so
// the bits are the same too. Int12 activations meet 4-bit codes in one multiplication, 64 wide: their high and low
// halves by kHigh * code and code. Bytes have no room for that, and take two.
#pragma once

#include <cstdlib>

#include "kernels.h"
#include "linear_store.h"
#include "vec.h"

namespace jinn::JINN_ISA {

constexpr int kAmxRows = kActivationRows;
struct __attribute__((packed)) AmxConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 and 3: sums, 16 x 16 int32. Tiles 1 and 4: activations, 16 rows. Tile 2: codes, 4 columns of 16 rows a row.
class AmxTiles {
 public:
  explicit AmxTiles(int cols) {
    AmxConfig config;
    for (const int sums : {0, 3}) config.row_bytes[sums] = 64, config.rows[sums] = kAmxRows;
    for (const int rows : {1, 4}) config.row_bytes[rows] = static_cast<uint16_t>(cols), config.rows[rows] = kAmxRows;
    config.row_bytes[2] = 64, config.rows[2] = static_cast<uint8_t>(cols / 4);
    _tile_loadconfig(&config);
  }
  ~AmxTiles() { _tile_release(); }
};

template <class Codes, bool IsWide>
struct AmxKernel {
  static constexpr bool kIsOneProduct = IsWide && Codes::kWordsPerGroup == kGroup / 8;  // high and low at once
  static constexpr int kCols = kIsOneProduct ? 2 * kGroup : kGroup;                     // of one multiplication
  static constexpr int kGroupBytes = kCols * kTileRows;                                 // of widened codes
  static constexpr int kRowBytes = IsWide ? 2 * kGroup : kGroup;                        // of a row of activations

  // A tile's codes as bytes, group after group: unsigned where there are minima, else less their offset.
  static void widen(const PackedTensor& weight, int64_t tile, uint8_t* out) {
    const uint8_t* codes = weight.tile(tile);
    const __m512i offset = _mm512_set1_epi8(static_cast<char>(Codes::kOffset));
    for (int64_t g = 0, end = weight.cols() / kGroup; g < end; ++g, out += kGroupBytes) {
      u32x16 words[kGroup / 4];
      Codes::load_group(codes + g * Codes::kWordsPerGroup * 64, words);
      for (int w = 0; w < kGroup / 4; ++w) {
        const __m512i code = _mm512_sub_epi8((__m512i)words[w], offset);
        if constexpr (kIsOneProduct) {
          // Nibbles, less at most 8, times 16 stay within a byte.
          const __m512i high = _mm512_and_si512(_mm512_slli_epi16(code, 4), _mm512_set1_epi8(static_cast<char>(0xf0)));
          std::memcpy(out + 64 * w, &high, 64);
          std::memcpy(out + 64 * (w + kGroup / 4), &code, 64);
        } else {
          std::memcpy(out + 64 * w, &code, 64);
        }
      }
    }
  }

  struct Dots {
    alignas(64) int32_t high[kAmxRows][kLanes];
    alignas(64) int32_t low[kAmxRows][kLanes];

    i32x16 row(int r) const {
      if constexpr (IsWide && !kIsOneProduct) return load_as<i32x16>(high[r]) * kHigh + load_as<i32x16>(low[r]);
      return load_as<i32x16>(high[r]);
    }
  };

  JINN_INLINE void multiply(const uint8_t* rows, int64_t stride, const uint8_t* codes, Dots& out) {
    _tile_loadd(2, codes, 64);
    _tile_zero(0);
    _tile_loadd(1, rows, stride);
    if constexpr (Codes::kHasMins) {
      _tile_dpbsud(0, 1, 2);
    } else {
      _tile_dpbssd(0, 1, 2);
    }
    _tile_stored(0, out.high, 64);
    if constexpr (IsWide && !kIsOneProduct) {
      _tile_zero(3);
      _tile_loadd(4, rows + kGroup, stride);
      _tile_dpbssd(3, 4, 2);
      _tile_stored(3, out.low, 64);
    }
  }

  // One tile for a block of 16 rows; `codes` as `widen` left them.
  static void tile_rows(const LinearPiece& piece, int64_t tile, const uint8_t* codes, int64_t first_row) {
    const PackedTensor& weight = *piece.weight;
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(weight.tile(tile) + weight.layout().scales);
    const uint16_t* mins = reinterpret_cast<const uint16_t*>(weight.tile(tile) + weight.layout().mins);
    const uint8_t* rows = piece.input.codes(first_row);
    const int64_t stride = piece.input.code_bytes();
    const float* row_scales = piece.input.scales(first_row);
    const float* row_scaled_sums = piece.input.scaled_sums(first_row);
    Dots dots[2];  // the next group is multiplied while this one is scaled
    f32x16 y[kAmxRows] = {};
    multiply(rows, stride, codes, dots[0]);
    for (int64_t g = 0, end = weight.cols() / kGroup; g < end; ++g) {
      const int64_t next = g + 1;
      if (next < end) multiply(rows + next * kRowBytes, stride, codes + next * kGroupBytes, dots[next % 2]);
      const f32x16 scale = load_f16(scales + g * kLanes);
      f32x16 min{};
      if constexpr (Codes::kHasMins) min = load_f16(mins + g * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kAmxRows; ++r) {
        y[r] = fma(to_float(dots[g % 2].row(r)), scale * row_scales[g * kAmxRows + r], y[r]);
        if constexpr (Codes::kHasMins) y[r] = fma(min, set1(row_scaled_sums[g * kAmxRows + r]), y[r]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kAmxRows; ++r) store_tile(piece, tile, first_row + r, y[r]);
  }
};

// Room for a tile's widened codes.
struct AmxScratch {
  uint8_t* data;
  explicit AmxScratch(size_t bytes) : data(static_cast<uint8_t*>(std::aligned_alloc(64, bytes))) {}
  ~AmxScratch() { std::free(data); }
};

// The whole sixteens of rows of a piece; returns the first row that is left.
template <class Codes, bool IsWide>
int64_t amx_rows(const LinearPiece& piece, int64_t tile) {
  using Kernel = AmxKernel<Codes, IsWide>;
  constexpr int64_t kMaxGroups = 1024;
  static thread_local AmxScratch codes(kMaxGroups * 2 * kGroup * kTileRows);
  const int64_t num_groups = piece.weight->cols() / kGroup;
  const int64_t whole = piece.first_row + (piece.last_row - piece.first_row) / kAmxRows * kAmxRows;
  if (whole == piece.first_row || num_groups > kMaxGroups) return piece.first_row;
  Kernel::widen(*piece.weight, tile, codes.data);
  for (int64_t row = piece.first_row; row < whole; row += kAmxRows) Kernel::tile_rows(piece, tile, codes.data, row);
  return whole;
}

}  // namespace jinn::JINN_ISA
