// y = x W^T for quantized weights and integer activations, in groups of 32 columns.
//
// Per output and scale: an exact integer dot product, then y += float(dot) * (scale * activation scale), and for
// formats with minima y += min * scaled sum of the activations. Groups are added in order, each before its outliers, so
// a number does not depend on how many rows or tiles are computed beside it.
#include "block_codes.h"
#include "kernels.h"
#include "linear_store.h"
#include "ops.h"
#include "row_chunks.h"
#include "vec.h"
#if defined(JINN_AMX)
#include "linear_amx.h"
#endif

namespace jinn::JINN_ISA {
namespace {

#if defined(JINN_AVX512)
constexpr int kMaxRows = 4, kMaxTiles = 2;    // whose sums of a group fit into the registers
constexpr int kLoadedRows = kActivationRows;  // that weights in registers are loaded once for
#elif defined(JINN_AVX2)
constexpr int kMaxRows = 4, kMaxTiles = 1, kLoadedRows = kMaxRows;
#else
constexpr int kMaxRows = 2, kMaxTiles = 1, kLoadedRows = kMaxRows;
#endif
#if defined(JINN_AMX)
constexpr int kTilesOfOneRow = 4;  // which the memory of processors with AMX gives faster as several streams
#else
constexpr int kTilesOfOneRow = 1;
#endif
constexpr int64_t kFewRows = 15;  // which wait for memory: it gives one tile after another the fastest

// What one group of a tile is multiplied with and by.
template <class Codes>
struct GroupWeights {
  u32x16 words[kGroupWords];
  f32x16 scales[Codes::kScales], mins[Codes::kScales] = {};

  __attribute__((always_inline)) void load(const Tile& tile, int64_t group) {
    Codes::load_codes(tile, group, words);
    Codes::load_scales(tile, group, scales, mins);
  }
};

// Adds the products of `Words` words from `first` on, whose bytes have `Bits` bits, of each tile with the codes of R
// rows, `Stride` bytes apart. Word by word, so that the chains of sums run side by side and tiles share a word of
// codes; few sums have two chains each.
template <int Bits, int Words, int Stride, int R, int Tiles, class Weights>
JINN_INLINE void add_products(const Weights* weights, int first, const uint8_t* codes, i32x16 (*dots)[R]) {
  constexpr int kChains = R * Tiles <= 2 ? 2 : 1;
  constexpr int kWords = Words < Products<Bits>::kMaxWords ? Words : Products<Bits>::kMaxWords;
  static_assert(Words % kWords == 0);
#pragma GCC unroll 8
  for (int start = 0; start < Words; start += kWords) {
    Products<Bits> products[Tiles][R][kChains];
    if constexpr (kChains == 1) {
#pragma GCC unroll 4
      for (int t = 0; t < Tiles; ++t) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) products[t][r][0].start = dots[t][r];
      }
    }
#pragma GCC unroll 8
    for (int w = start; w < start + kWords; ++w) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const FourBytes four = spread_bytes(codes + r * Stride + 4 * w);
#pragma GCC unroll 4
        for (int t = 0; t < Tiles; ++t) products[t][r][w % kChains].add(weights[t].words[first + w], four);
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < Tiles; ++t) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        if constexpr (kChains == 1) {
          dots[t][r] = products[t][r][0].total();
        } else {
          dots[t][r] += products[t][r][0].total() + products[t][r][1].total();
        }
      }
    }
  }
}

// `Tiles` tiles for R rows at once, of one block of activations.
template <class Codes, bool IsWide, int R, int Tiles, int BlockRows>
class RowsKernel {
 public:
  explicit RowsKernel(const RowPlanes& rows) : row_scales_(rows), codes_(rows.codes) {}

  // y [R][Tiles] += the products of one group with the rows from `first` on.
  __attribute__((always_inline)) void add(const GroupWeights<Codes>* weights, int64_t group, int first,
                                          f32x16* y) const {
    const uint8_t* codes = codes_ + (group * BlockRows + first) * kRowBytes;
#pragma GCC unroll 2
    for (int part = 0; part < Codes::kScales; ++part, codes += kCols) {
      constexpr int kWords = kCols / 4;
      i32x16 dots[Tiles][R] = {};
      add_products<Codes::kByteBits, kWords, kRowBytes, R, Tiles>(weights, part * kWords, codes, dots);
      if constexpr (IsWide) {
#pragma GCC unroll 4
        for (int t = 0; t < Tiles; ++t) {
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) dots[t][r] *= kHigh;
        }
        add_products<Codes::kByteBits, kWords, kRowBytes, R, Tiles>(weights, part * kWords, codes + kGroup, dots);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const int32_t offset_sum = Codes::kOffset * row_scales_.sum(group, part, first + r);
#pragma GCC unroll 4
        for (int t = 0; t < Tiles; ++t) {
          const GroupWeights<Codes>& w = weights[t];
          f32x16& to = y[r * Tiles + t];
          to = row_scales_.add(dots[t][r] - offset_sum, w.scales[part], w.mins[part], group, part, first + r, to);
        }
      }
    }
  }

 private:
  static constexpr int kRowBytes = IsWide ? 2 * kGroup : kGroup;  // of a group
  static constexpr int kCols = kGroup / Codes::kScales;

  RowScales<Codes, BlockRows> row_scales_;
  const uint8_t* codes_;
};

// Adds the products of one group's outliers to y [chunk.num_rows][Tiles].
template <class Codes, int Tiles>
JINN_INLINE void add_outliers(const RowChunk& chunk, const LinearPiece& piece, int64_t first_tile,
                              const GroupWeights<Codes>* weights, int64_t group, f32x16* y) {
  chunk.outliers_of(group, [&](float outlier, uint32_t col, uint32_t row) {
#pragma GCC unroll 2
    for (int t = 0; t < Tiles; ++t) {
      f32x16& to = y[row * Tiles + t];
      const Tile tile(*piece.weight, first_tile + t);
      const f32x16 column = Codes::load_column(tile, group, col, weights[t].scales, weights[t].mins);
      to = fma(set1(outlier), column, to);
    }
  });
}

// `Tiles` tiles, `Shared` of them at once, for a chunk of `Rows` rows, R of them at once.
template <class Codes, bool IsWide, int Rows, int R, int Tiles, int Shared, int BlockRows = kActivationRows>
void tile_rows(const LinearPiece& piece, const RowChunk& chunk, int64_t first_tile) {
  const Prefetcher<Codes, Tiles> prefetcher(*piece.weight);
  const RowsKernel<Codes, IsWide, R, Shared, BlockRows> kernel(chunk.planes);
  f32x16 y[Tiles / Shared][Rows][Shared] = {};
  for (int64_t g = 0, end = piece.weight->cols() / kGroup; g < end; ++g) {
#pragma GCC unroll 4
    for (int t = 0; t < Tiles; t += Shared) {
      GroupWeights<Codes> weights[Shared];
#pragma GCC unroll 4
      for (int s = 0; s < Shared; ++s) {
        const Tile tile(*piece.weight, first_tile + t + s);
        prefetcher.fetch(tile, g);
        weights[s].load(tile, g);
      }
#pragma GCC unroll 1
      for (int row = 0; row < Rows; row += R) kernel.add(weights, g, row, y[t / Shared][row]);
      if constexpr (!IsWide) add_outliers<Codes, Shared>(chunk, piece, first_tile + t, weights, g, y[t / Shared][0]);
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < Tiles; ++t) {
    const TileOutput output(piece, first_tile + t);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) output.store(chunk.first_row + r, y[t / Shared][r][t % Shared]);
  }
}

// All tiles from `tile` on for one row, which lies close together, `Tiles` at a time.
template <class Codes, bool IsWide, int Tiles>
void one_row(const LinearPiece& piece, const RowChunk& row, int64_t tile) {
  for (; tile + Tiles <= piece.last_tile; tile += Tiles) {
    tile_rows<Codes, IsWide, 1, 1, Tiles, 1, 1>(piece, row, tile);
  }
  if constexpr (Tiles > 1) one_row<Codes, IsWide, Tiles / 2>(piece, row, tile);
}

// `Tiles` tiles for a chunk of at most `Rows` rows.
template <class Codes, bool IsWide, int Rows, int Tiles>
void chunk_rows(const LinearPiece& piece, const RowChunk& chunk, int64_t tile) {
  constexpr int kAtOnce = Rows < kMaxRows ? Rows : kMaxRows;
  if constexpr (Rows > 1) {
    constexpr int kFewer = Rows > kMaxRows ? Rows / 2 : Rows - 1;
    if (chunk.num_rows < Rows) return chunk_rows<Codes, IsWide, kFewer, Tiles>(piece, chunk, tile);
  }
  tile_rows<Codes, IsWide, Rows, kAtOnce, Tiles, Tiles>(piece, chunk, tile);
}

// All tiles from `tile` on for all chunks, `Tiles` at a time.
template <class Codes, bool IsWide, int Tiles>
void many_rows(const LinearPiece& piece, std::span<const RowChunk> chunks, int64_t tile) {
  for (; tile + Tiles <= piece.last_tile; tile += Tiles) {
    for (const RowChunk& chunk : chunks) chunk_rows<Codes, IsWide, kLoadedRows, Tiles>(piece, chunk, tile);
  }
  if constexpr (Tiles > 1) many_rows<Codes, IsWide, Tiles / 2>(piece, chunks, tile);
}

template <class Codes, bool IsWide>
void piece_of(const LinearPiece& piece) {
  int64_t first_row = piece.first_row;
#if defined(JINN_AMX)
  first_row = amx_rows<Codes, IsWide>(piece);
#endif
  const int64_t num_rows = piece.last_row - first_row, num_groups = piece.weight->cols() / kGroup;
  const auto chunks = chunks_of<kLoadedRows, kMaxRows>(piece.input, num_groups, first_row, piece.last_row);
  if (num_rows == 1) {
    RowChunk row = chunks[0];
    row.planes = copy_row<Codes>(piece.input, first_row, num_groups);
    one_row<Codes, IsWide, kTilesOfOneRow>(piece, row, piece.first_tile);
  } else if (num_rows <= kFewRows) {
    many_rows<Codes, IsWide, 1>(piece, chunks, piece.first_tile);
  } else {
    many_rows<Codes, IsWide, kMaxTiles>(piece, chunks, piece.first_tile);
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
