// What linear kernels share: how early they ask for weights, and their end, which is bias, residual and the store of
// one tile's 16 outputs of one row.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace jinn::JINN_ISA {

// Few rows wait for memory, which then must be asked early: hardware looks no further than a page.
constexpr int64_t kPrefetchBytes = 8192;

JINN_INLINE void store_tile(const LinearPiece& piece, int64_t tile, int64_t row, f32x16 y) {
  const int64_t col = tile * kTileRows - piece.first_weight_row;
  const int64_t left = piece.output.cols - col;
  const int count = left < kLanes ? static_cast<int>(left) : kLanes;
  if (piece.bias) y = y + load_part(piece.bias + col, count);
  if (piece.residual) y = load_part(piece.residual->row(row) + col, count) + y;
  store_part(piece.output.row(row) + col, y, count);
}

}  // namespace jinn::JINN_ISA
