// The integer dot products of a linear on AMX: a block of 16 rows of activations by one tile of weights at a time.
//
// The products are exact integers and everything after them is the same float arithmetic as in linear_integer.cpp, so
// the bits are the same too. Int12 activations meet 4-bit codes in one multiplication, 64 wide: their high and low
// halves by kHigh * code and code. Larger codes have no room for that, and take two.
#pragma once

#include <cstdlib>

#include "block_codes.h"
#include "kernels.h"
#include "linear_store.h"
#include "row_scales.h"
#include "vec.h"

namespace jinn::JINN_ISA {

constexpr int kAmxRows = kActivationRows;

// GCC's tile intrinsics do not say that they read memory: what they read must have been stored.
JINN_INLINE void finish_stores(const void* to) { asm volatile("" ::"r"(to) : "memory"); }

struct __attribute__((packed)) AmxConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void load() const {
    finish_stores(this);
    _tile_loadconfig(this);
  }
};

// Tiles 0 and 3: sums, 16 x 16 int32. Tiles 1 and 4: activations, 16 rows. Tile 2: codes, 4 columns of 16 rows a row.
class AmxTiles {
 public:
  explicit AmxTiles(int cols) {
    AmxConfig config;
    for (const int sums : {0, 3}) config.row_bytes[sums] = 64, config.rows[sums] = kAmxRows;
    for (const int rows : {1, 4}) config.row_bytes[rows] = static_cast<uint16_t>(cols), config.rows[rows] = kAmxRows;
    config.row_bytes[2] = 64, config.rows[2] = static_cast<uint8_t>(cols / 4);
    config.load();
  }
  ~AmxTiles() { _tile_release(); }
};

// One tile of weights, widened: what each of its scales covers ("step") is multiplied on its own.
struct AmxWeights {
  static constexpr int64_t kMaxGroups = 1024;

  // Bytes, step after step: unsigned where there are minima, else less their offset.
  uint8_t* codes = allocate<uint8_t>(kMaxGroups * 2 * kGroup * kTileRows);
  float* scales = allocate<float>(kMaxGroups * 2 * kTileRows);  // [steps][16]
  float* mins = allocate<float>(kMaxGroups * 2 * kTileRows);

  AmxWeights() = default;
  AmxWeights(const AmxWeights&) = delete;
  ~AmxWeights() {
    std::free(codes);
    std::free(scales);
    std::free(mins);
  }

 private:
  template <class Number>
  static Number* allocate(int64_t count) {
    return static_cast<Number*>(std::aligned_alloc(64, static_cast<size_t>(count) * sizeof(Number)));
  }
};

template <class Codes, bool IsWide>
struct AmxKernel {
  static constexpr int kStepCols = kGroup / Codes::kScales;
  static constexpr bool kIsOneProduct = IsWide && Codes::kByteBits <= 4 && Codes::kScales == 1;  // high and low at once
  static constexpr int kCols = kIsOneProduct ? 2 * kGroup : kStepCols;                           // of a multiplication
  static constexpr int kStepBytes = kCols * kTileRows;                                           // of widened codes
  static constexpr int kRowBytes = IsWide ? 2 * kGroup : kGroup;  // of a row of activations

  static void widen(const PackedTensor& weight, int64_t tile_index, AmxWeights& out) {
    const Tile tile(weight, tile_index);
    const __m512i offset = _mm512_set1_epi8(static_cast<char>(Codes::kOffset));
    uint8_t* to = out.codes;
    for (int64_t g = 0, end = weight.cols() / kGroup; g < end; ++g, to += Codes::kScales * kStepBytes) {
      f32x16 scales[Codes::kScales], mins[Codes::kScales] = {};
      u32x16 words[kGroupWords];
      Codes::load_scales(tile, g, scales, mins);
      Codes::load_codes(tile, g, words);
      for (int part = 0; part < Codes::kScales; ++part) {
        store(out.scales + (g * Codes::kScales + part) * kLanes, scales[part]);
        if constexpr (Codes::kHasMins) store(out.mins + (g * Codes::kScales + part) * kLanes, mins[part]);
      }
      for (int w = 0; w < kGroupWords; ++w) {
        const __m512i code = _mm512_sub_epi8((__m512i)words[w], offset);
        if constexpr (kIsOneProduct) {
          // Nibbles, less at most 8, times 16 stay within a byte.
          const __m512i high = _mm512_and_si512(_mm512_slli_epi16(code, 4), _mm512_set1_epi8(static_cast<char>(0xf0)));
          std::memcpy(to + 64 * w, &high, 64);
          std::memcpy(to + 64 * (w + kGroupWords), &code, 64);
        } else {
          std::memcpy(to + 64 * w, &code, 64);
        }
      }
    }
    finish_stores(out.codes);
  }

  struct Dots {
    alignas(64) int32_t high[kAmxRows][kLanes];
    alignas(64) int32_t low[kAmxRows][kLanes];

    i32x16 row(int r) const {
      if constexpr (IsWide && !kIsOneProduct) return load_as<i32x16>(high[r]) * kHigh + load_as<i32x16>(low[r]);
      return load_as<i32x16>(high[r]);
    }
  };

  JINN_INLINE void multiply(const uint8_t* rows, int64_t stride, const uint8_t* codes, int64_t step, Dots& out) {
    rows += step / Codes::kScales * kRowBytes + step % Codes::kScales * kStepCols;
    _tile_loadd(2, codes + step * kStepBytes, 64);
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
      if constexpr (Codes::kHasMins) {
        _tile_dpbsud(3, 4, 2);
      } else {
        _tile_dpbssd(3, 4, 2);
      }
      _tile_stored(3, out.low, 64);
    }
  }

  // One tile for a block of 16 rows; `weights` as `widen` left them.
  static void tile_rows(const LinearPiece& piece, int64_t tile, const AmxWeights& weights, int64_t first_row) {
    const RowScales<Codes> row_scales(piece.input, first_row);
    const uint8_t* rows = piece.input.codes(first_row);
    const int64_t stride = piece.input.code_bytes();
    const int64_t num_steps = piece.weight->cols() / kStepCols;
    Dots dots[2];  // the next step is multiplied while this one is scaled
    f32x16 y[kAmxRows] = {};
    multiply(rows, stride, weights.codes, 0, dots[0]);
    for (int64_t step = 0; step < num_steps; ++step) {
      if (step + 1 < num_steps) multiply(rows, stride, weights.codes, step + 1, dots[(step + 1) % 2]);
      const int64_t group = step / Codes::kScales;
      const int part = static_cast<int>(step % Codes::kScales);
      const f32x16 scale = load(weights.scales + step * kLanes);
      f32x16 min{};
      if constexpr (Codes::kHasMins) min = load(weights.mins + step * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kAmxRows; ++r) {
        y[r] = row_scales.add(dots[step % 2].row(r), scale, min, group, part, r, y[r]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kAmxRows; ++r) store_tile(piece, tile, first_row + r, y[r]);
  }
};

inline AmxWeights& amx_weights() {
  static thread_local AmxWeights weights;
  return weights;
}

// The whole sixteens of rows of a piece; returns the first row that is left.
template <class Codes, bool IsWide>
int64_t amx_rows(const LinearPiece& piece, int64_t tile) {
  using Kernel = AmxKernel<Codes, IsWide>;
  const int64_t num_groups = piece.weight->cols() / kGroup;
  const int64_t whole = piece.first_row + (piece.last_row - piece.first_row) / kAmxRows * kAmxRows;
  if (whole == piece.first_row || num_groups > AmxWeights::kMaxGroups) return piece.first_row;
  AmxWeights& weights = amx_weights();
  Kernel::widen(*piece.weight, tile, weights);
  for (int64_t row = piece.first_row; row < whole; row += kAmxRows) Kernel::tile_rows(piece, tile, weights, row);
  return whole;
}

}  // namespace jinn::JINN_ISA
