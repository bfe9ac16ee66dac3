// What linear kernels share: how early they ask for weights, and their end, which is bias, residual and the store of
// one tile's 16 outputs of one row.
#pragma once

#include "block_codes.h"
#include "kernels.h"
#include "vec.h"

namespace jinn::JINN_ISA {

// Weights come from memory, which must be asked early: hardware looks no further than a page.
constexpr int64_t kPrefetchBytes = 8192;

// Fetches, group by group, what comes later in a tile and then in the one that is `Tiles` further: kPrefetchBytes
// later, or, of several tiles at once, whose groups take longer, up to twice that.
template <class Codes, int Tiles>
class Prefetcher {
 public:
  explicit Prefetcher(const PackedTensor& weight) : tile_bytes_(static_cast<int64_t>(weight.tile_bytes())) {
    if (Tiles > 1) ahead_ = tile_bytes_ < 2 * kPrefetchBytes ? tile_bytes_ : 2 * kPrefetchBytes;
  }

  void fetch(const Tile& tile, int64_t group) const {
    constexpr BlockLayout kLayout = Codes::kLayout;
    constexpr int64_t kRestLines = (kLayout.bytes - kLayout.sub_scales) / 64;
    const int64_t at = group % kLayout.groups;
    int64_t block = group / kLayout.groups * kLayout.bytes + ahead_;
    if (Tiles > 1 && block >= tile_bytes_) block += (Tiles - 1) * tile_bytes_;
    prefetch<kLayout.group_bytes / 64>(tile.words + block + at * kLayout.group_bytes);
    prefetch(tile.words + block + kLayout.sub_scales + 64 * (at < kRestLines ? at : kRestLines - 1));
  }

 private:
  int64_t tile_bytes_, ahead_ = kPrefetchBytes;
};

class TileOutput {
 public:
  TileOutput(const LinearPiece& piece, int64_t tile) : to_(piece.output) {
    const int64_t col = tile * kTileRows - piece.first_weight_row, left = piece.output.cols - col;
    count_ = left < kLanes ? static_cast<int>(left) : kLanes;
    to_.data += col;
    if (piece.residual) residual_ = {piece.residual->data + col, piece.residual->stride, 0};
    has_bias_ = piece.bias != nullptr;
    if (has_bias_) bias_ = load_part(piece.bias + col, count_);
  }

  void store(int64_t row, f32x16 y) const {
    if (has_bias_) y = y + bias_;
    if (residual_.data) y = load_part(residual_.row(row), count_) + y;
    store_part(to_.row(row), y, count_);
  }

 private:
  Matrix to_, residual_;
  f32x16 bias_ = {};
  int count_;
  bool has_bias_;
};

}  // namespace jinn::JINN_ISA
