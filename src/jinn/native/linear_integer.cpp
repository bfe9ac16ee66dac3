// y = x W^T for quantized weights and integer activations, in groups of 32 columns.
//
// Per output and scale: an exact integer dot product, then y += float(dot) * (scale * activation scale), and for
// formats with minima y += min * scaled sum of the activations. Groups are added in order, so a number does not depend
// on how many rows or tiles are computed beside it.
#include "block_codes.h"
#include "kernels.h"
#include "linear_store.h"
#include "ops.h"
#include "row_scales.h"
#include "vec.h"
#if defined(JINN_AMX)
#include "linear_amx.h"
#endif

namespace jinn::JINN_ISA {
namespace {

JINN_INLINE uint32_t word_at(const uint8_t* codes, int64_t w) {
  uint32_t word;
  std::memcpy(&word, codes + 4 * w, 4);
  return word;
}

#if defined(JINN_AVX512)
constexpr int kMaxRows = 8, kMaxChains = 16;  // whose sums fit into the registers
#elif defined(JINN_AVX2)
constexpr int kMaxRows = 4, kMaxChains = 4;
#else
constexpr int kMaxRows = 2, kMaxChains = 4;
#endif
constexpr int kMaxTiles = 4;  // of one row at once

// Adds the products of `Words` words, whose bytes have `Bits` bits, with each row's codes at `offset`. Word by word, so
// that the rows' chains of sums run side by side; few rows, and all that have long chains, have two each.
template <int Bits, int Words, int R>
JINN_INLINE void add_products(const u32x16* words, const uint8_t* const* x, int64_t offset, i32x16* dots) {
  constexpr int kChains = R <= 2 || (Words == kGroupWords && 2 * R <= kMaxChains) ? 2 : 1;
  constexpr int kWords = Words < Products<Bits>::kMaxWords ? Words : Products<Bits>::kMaxWords;
  static_assert(Words % kWords == 0);
#pragma GCC unroll 8
  for (int first = 0; first < Words; first += kWords) {
    Products<Bits> products[R][kChains];
    if constexpr (kChains == 1) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) products[r][0].start = dots[r];
    }
#pragma GCC unroll 8
    for (int w = first; w < first + kWords; ++w) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) products[r][w % kChains].add(words[w], word_at(x[r] + offset, w));
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      if constexpr (kChains == 1) {
        dots[r] = products[r][0].total();
      } else {
        dots[r] += products[r][0].total() + products[r][1].total();
      }
    }
  }
}

// `Tiles` tiles for R rows, which lie in one block of activations.
template <class Codes, bool IsWide, int R, int Tiles>
void tile_rows(const LinearPiece& piece, int64_t first_tile, int64_t first_row) {
  constexpr int kGroupBytes = kActivationRows * (IsWide ? 2 * kGroup : kGroup);  // of a block
  constexpr int kCols = kGroup / Codes::kScales;
  const Prefetcher<Codes, Tiles> prefetcher(*piece.weight);
  const RowScales<Codes> row_scales(piece.input, first_row);
  const uint8_t* x[R];
  for (int r = 0; r < R; ++r) x[r] = piece.input.codes(first_row + r);
  f32x16 y[Tiles][R] = {};
  for (int64_t g = 0, end = piece.weight->cols() / kGroup; g < end; ++g) {
#pragma GCC unroll 4
    for (int t = 0; t < Tiles; ++t) {
      const Tile tile(*piece.weight, first_tile + t);
      u32x16 words[kGroupWords];
      f32x16 scales[Codes::kScales], mins[Codes::kScales] = {};
      prefetcher.fetch(tile, g);
      Codes::load_codes(tile, g, words);
      Codes::load_scales(tile, g, scales, mins);
#pragma GCC unroll 2
      for (int part = 0; part < Codes::kScales; ++part) {
        const u32x16* part_words = words + part * kCols / 4;
        const int64_t offset = g * kGroupBytes + part * kCols;
        i32x16 dots[R] = {};
        add_products<Codes::kByteBits, kCols / 4, R>(part_words, x, offset, dots);
        if constexpr (IsWide) {
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) dots[r] *= kHigh;
          add_products<Codes::kByteBits, kCols / 4, R>(part_words, x, offset + kGroup, dots);
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const i32x16 dot = dots[r] - Codes::kOffset * row_scales.sum(g, part, r);
          y[t][r] = row_scales.add(dot, scales[part], mins[part], g, part, r, y[t][r]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < Tiles; ++t) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) store_tile(piece, first_tile + t, first_row + r, y[t][r]);
  }
}

// All tiles of a piece for one row, `Tiles` at a time: several streams from memory are faster than one.
template <class Codes, bool IsWide, int Tiles>
void one_row(const LinearPiece& piece, int64_t tile, int64_t row) {
  for (; tile + Tiles <= piece.last_tile; tile += Tiles) tile_rows<Codes, IsWide, 1, Tiles>(piece, tile, row);
  if constexpr (Tiles > 1) one_row<Codes, IsWide, Tiles / 2>(piece, tile, row);
}

// As many rows as are left, at most R.
template <class Codes, bool IsWide, int R>
void rest_of_rows(const LinearPiece& piece, int64_t tile, int64_t row) {
  if constexpr (R > 1) {
    if (row + R > piece.last_row) return rest_of_rows<Codes, IsWide, R - 1>(piece, tile, row);
  }
  tile_rows<Codes, IsWide, R, 1>(piece, tile, row);
}

template <class Codes, bool IsWide>
void piece_of(const LinearPiece& piece) {
  int64_t first_row = piece.first_row;
#if defined(JINN_AMX)
  first_row = amx_rows<Codes, IsWide>(piece);
#endif
  if (piece.last_row - first_row == 1) return one_row<Codes, IsWide, kMaxTiles>(piece, piece.first_tile, first_row);
  for (int64_t tile = piece.first_tile; tile < piece.last_tile; ++tile) {
    for (int64_t row = first_row; row < piece.last_row; row += kMaxRows) {
      rest_of_rows<Codes, IsWide, kMaxRows>(piece, tile, row);
    }
  }
}

}  // namespace

void linear_integer(const LinearPiece& piece) {
  with_block_codes(piece.weight->format(), [&](auto codes) {
    using Codes = decltype(codes);
    if (piece.input.type == ActivationType::Int12) {
      piece_of<Codes, true>(piece);
    } else {
      piece_of<Codes, false>(piece);
    }
  });
}

}  // namespace jinn::JINN_ISA
