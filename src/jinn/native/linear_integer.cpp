// y = x W^T for quantized weights and integer activations, in groups of 32 columns.
//
// Per output and group: an exact integer dot product, then y += float(dot) * (scale * activation scale), and for
// formats with minima y += min * scaled sum of the activations. Groups are added in order, so a number does not depend
// on how many rows or tiles are computed beside it.
#include "kernels.h"
#include "linear_store.h"
#include "ops.h"
#include "vec.h"
#if defined(JINN_AMX)
#include "linear_amx.h"
#endif

namespace jinn::JINN_ISA {
namespace {

constexpr int kGroupWords = kGroup / 4;  // words of four columns

struct Bytes {  // Q8_0
  static constexpr bool kHasMins = false;
  static constexpr int kOffset = 128;
  static constexpr int kWordsPerGroup = 8;
  JINN_INLINE void load_group(const uint8_t* codes, u32x16* words) {
    for (int w = 0; w < kGroupWords; ++w) words[w] = load_as<u32x16>(codes + 64 * w);
  }
};

template <bool HasMins>
struct Nibbles {  // Q4_0, Q4_1
  static constexpr bool kHasMins = HasMins;
  static constexpr int kOffset = HasMins ? 0 : 8;
  static constexpr int kWordsPerGroup = 4;
  JINN_INLINE void load_group(const uint8_t* codes, u32x16* words) {
    for (int w = 0; w < kWordsPerGroup; ++w) {
      const u32x16 both = load_as<u32x16>(codes + 64 * w);
      words[2 * w] = both & 0x0f0f0f0fu;
      words[2 * w + 1] = (both >> 4) & 0x0f0f0f0fu;
    }
  }
};

JINN_INLINE uint32_t word_at(const uint8_t* codes, int64_t w) {
  uint32_t word;
  std::memcpy(&word, codes + 4 * w, 4);
  return word;
}

// Adds the products of one group's words with each row's codes at `offset`. Word by word, so that the rows' chains of
// sums run side by side.
template <int R>
JINN_INLINE void add_products(const u32x16* words, const uint8_t* const* x, int64_t offset, i32x16* dots) {
#pragma GCC unroll 8
  for (int w = 0; w < kGroupWords; ++w) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) dots[r] = dot_u8s8(dots[r], words[w], word_at(x[r] + offset, w));
  }
}

// One tile for R rows, which lie in one block of activations.
template <class Codes, bool IsWide, int R>
void tile_rows(const LinearPiece& piece, int64_t tile, int64_t first_row) {
  constexpr int kGroupBytes = IsWide ? 2 * kGroup : kGroup;
  const PackedTensor& weight = *piece.weight;
  const uint8_t* codes = weight.tile(tile);
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(codes + weight.layout().scales);
  const uint16_t* mins = reinterpret_cast<const uint16_t*>(codes + weight.layout().mins);
  const uint8_t* x[R];
  for (int r = 0; r < R; ++r) x[r] = piece.input.codes(first_row + r);
  const float* row_scales = piece.input.scales(first_row);
  const int32_t* row_sums = piece.input.sums(first_row);
  const float* row_scaled_sums = piece.input.scaled_sums(first_row);
  f32x16 y[R] = {};
  for (int64_t g = 0, end = weight.cols() / kGroup; g < end; ++g) {
    u32x16 words[kGroupWords];
    Codes::load_group(codes + g * Codes::kWordsPerGroup * 64, words);
    const f32x16 scale = load_f16(scales + g * kLanes);
    f32x16 min{};
    if constexpr (Codes::kHasMins) min = load_f16(mins + g * kLanes);
    i32x16 dots[R] = {};
    add_products<R>(words, x, g * kGroupBytes, dots);
    if constexpr (IsWide) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) dots[r] *= kHigh;
      add_products<R>(words, x, g * kGroupBytes + kGroup, dots);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const int64_t at = g * kActivationRows + r;
      const i32x16 dot = dots[r] - Codes::kOffset * row_sums[at];
      y[r] = fma(to_float(dot), scale * row_scales[at], y[r]);
      if constexpr (Codes::kHasMins) y[r] = fma(min, set1(row_scaled_sums[at]), y[r]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) store_tile(piece, tile, first_row + r, y[r]);
}

template <class Codes, bool IsWide>
void piece_of(const LinearPiece& piece) {
#if defined(JINN_AMX)
  const AmxTiles tiles(AmxKernel<Codes, IsWide>::kCols);
#endif
  for (int64_t tile = piece.first_tile; tile < piece.last_tile; ++tile) {
    int64_t row = piece.first_row;
#if defined(JINN_AMX)
    row = amx_rows<Codes, IsWide>(piece, tile);
#endif
    for (; row + 8 <= piece.last_row; row += 8) tile_rows<Codes, IsWide, 8>(piece, tile, row);
    for (; row + 4 <= piece.last_row; row += 4) tile_rows<Codes, IsWide, 4>(piece, tile, row);
    for (; row + 2 <= piece.last_row; row += 2) tile_rows<Codes, IsWide, 2>(piece, tile, row);
    for (; row < piece.last_row; ++row) tile_rows<Codes, IsWide, 1>(piece, tile, row);
  }
}

template <class Codes>
void piece_of(const LinearPiece& piece) {
  if (piece.input.type == ActivationType::Int12) {
    piece_of<Codes, true>(piece);
  } else {
    piece_of<Codes, false>(piece);
  }
}

}  // namespace

void linear_integer(const LinearPiece& piece) {
  switch (piece.weight->format()) {
    case Format::Q8_0:
      return piece_of<Bytes>(piece);
    case Format::Q4_0:
      return piece_of<Nibbles<false>>(piece);
    default:
      return piece_of<Nibbles<true>>(piece);
  }
}

}  // namespace jinn::JINN_ISA
