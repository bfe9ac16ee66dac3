// What linear kernels share: how early they ask for weights, and their end, which is bias, residual and the store of
// one tile's 16 outputs of one row.
#pragma once

#include "block_codes.h"
#include "kernels.h"
#include "vec.h"

namespace jinn::JINN_ISA {

// Weights come from memory, which must be asked early: hardware looks no further than a page.
constexpr int64_t kPrefetchBytes = 8192;

// Fetches, group by group, the codes of a tile that come kPrefetchBytes later, on into the tile that is `Tiles`
// further, and that tile's other planes, of which no group has more than a line.
template <class Codes, int Tiles>
class Prefetcher {
 public:
  explicit Prefetcher(const PackedTensor& weight) {
    const int64_t tile_bytes = static_cast<int64_t>(weight.layout().bytes);
    code_bytes_ = static_cast<int64_t>(weight.layout().sub_scales);  // which come after the codes
    to_next_ = Tiles * tile_bytes;
    ahead_ = kPrefetchBytes < code_bytes_ ? kPrefetchBytes : code_bytes_;
  }

  void fetch(const Tile& tile, int64_t group) const {
    const int64_t at = ahead_ + group * kGroupBytes;
    prefetch<Codes::kBits>(tile.codes + at + (at < code_bytes_ ? 0 : to_next_ - code_bytes_));
    prefetch(tile.codes + to_next_ + code_bytes_ + 64 * group);
  }

 private:
  static constexpr int64_t kGroupBytes = Codes::kBits * 64;

  int64_t code_bytes_, to_next_, ahead_;
};

JINN_INLINE void store_tile(const LinearPiece& piece, int64_t tile, int64_t row, f32x16 y) {
  const int64_t col = tile * kTileRows - piece.first_weight_row;
  const int64_t left = piece.output.cols - col;
  const int count = left < kLanes ? static_cast<int>(left) : kLanes;
  if (piece.bias) y = y + load_part(piece.bias + col, count);
  if (piece.residual) y = load_part(piece.residual->row(row) + col, count) + y;
  store_part(piece.output.row(row) + col, y, count);
}

}  // namespace jinn::JINN_ISA
