// The integer dot products of a linear on AMX: blocks of 16 rows of activations by tiles of weights.
//
// The products are exact integers and everything after them is the same float arithmetic as in linear_integer.cpp, so
// the bits are the same too. Wide activations meet 4-bit codes in one multiplication, 64 wide: their high and low
// halves by kHigh * code and code. Larger codes have no room for that, and take two.
//
// A step (what one scale covers) multiplies two tiles of activations by two tiles of weights, so that each is loaded
// once for two products. Sums reach the vector registers through memory alone, so all that a few steps touch has to fit
// into the first-level cache: weights are widened a batch of steps at a time, and outputs wait in memory in between.
#pragma once

#include <cstdlib>

#include "block_codes.h"
#include "kernels.h"
#include "linear_store.h"
#include "row_chunks.h"
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

// Tile instructions by number; the intrinsics take literals only.
template <int Tile>
JINN_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
}
template <int Tile>
JINN_INLINE void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(Tile) : "memory");
}
template <int Tile>
JINN_INLINE void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(Tile) : "memory");
}
// Adds the products of signed rows with signed or unsigned codes.
template <int Sums, int Rows, int Codes, bool IsUnsigned>
JINN_INLINE void tile_multiply() {
  if constexpr (IsUnsigned) {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(Rows), "i"(Codes));
  } else {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(Rows), "i"(Codes));
  }
}
template <int Sums, int Rows, int Words>
JINN_INLINE void tile_multiply_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(Rows), "i"(Words));
}

// Tiles 0 to 3: sums, num_rows x 16 int32. 4 and 5: activations, num_rows x cols. 6 and 7: codes, 4 columns of 16
// outputs a row.
class AmxTiles {
 public:
  AmxTiles(int num_rows, int cols) {
    AmxConfig config;
    for (int tile = 0; tile < 8; ++tile)
      config.row_bytes[tile] = 64, config.rows[tile] = static_cast<uint8_t>(num_rows);
    for (const int rows : {4, 5}) config.row_bytes[rows] = static_cast<uint16_t>(cols);
    for (const int codes : {6, 7}) config.rows[codes] = static_cast<uint8_t>(cols / 4);
    config.load();
  }
  ~AmxTiles() { _tile_release(); }
};

template <class Codes, bool IsWide>
class AmxKernel {
 public:
  static constexpr int kStepCols = kGroup / Codes::kScales;
  static constexpr bool kIsOneProduct = IsWide && Codes::kByteBits <= 4 && Codes::kScales == 1;  // high and low at once
  static constexpr int kHalves = IsWide && !kIsOneProduct ? 2 : 1;      // multiplied on their own: high, low
  static constexpr int kCols = kIsOneProduct ? 2 * kGroup : kStepCols;  // of a multiplication
  static constexpr int kStepBytes = kCols * kTileRows;                  // of widened codes
  static constexpr int kRowBytes = IsWide ? 2 * kGroup : kGroup;        // of a group of a row of activations
  static constexpr int kBlockBytes = kRowBytes * kAmxRows;              // of a group of a block
  static constexpr int64_t kMaxRows = 64;
  static constexpr int64_t kFewestRows = kIsOneProduct         ? 5
                                         : Codes::kScales == 1 ? 8
                                                               : 9;  // fewer are as fast in vectors

  // Chunks of at most kMaxRows rows in all by `Tiles` tiles: whole blocks, or part of one.
  template <int Tiles>
  void run(const LinearPiece& piece, int64_t first_tile, std::span<const RowChunk> chunks) {
    const int64_t num_groups = piece.weight->cols() / kGroup;
    const Prefetcher<Codes, Tiles> prefetcher(*piece.weight);
    for (int64_t group = 0; group < num_groups; group += kBatchGroups) {
      const int count = static_cast<int>(num_groups - group < kBatchGroups ? num_groups - group : kBatchGroups);
      for (int t = 0; t < Tiles; ++t) {
        const Tile tile(*piece.weight, first_tile + t);
        for (int i = 0; i < count; ++i) prefetcher.fetch(tile, group + i);
        widen(tile, group, count, weights_[t]);
      }
      size_t block = 0;
      for (; block + kMaxBlocks <= chunks.size(); block += kMaxBlocks) {
        add_batch<kMaxBlocks, Tiles>(piece, first_tile, &chunks[block], group, count, &y_[block]);
      }
      if (block < chunks.size()) add_batch<1, Tiles>(piece, first_tile, &chunks[block], group, count, &y_[block]);
    }
    for (int tile = 0; tile < Tiles; ++tile) {
      const TileOutput output(piece, first_tile + tile);
      for (size_t block = 0; block < chunks.size(); ++block) {
        for (int r = 0; r < chunks[block].num_rows; ++r) output.store(chunks[block].first_row + r, y_[block][tile][r]);
      }
    }
  }

 private:
  static constexpr int kMaxTiles = 2;
  using BlockSums = f32x16[kMaxTiles][kAmxRows];
  static constexpr int kMaxBlocks = 2 / kHalves;  // of rows that are multiplied together
  static constexpr int kBatchGroups = 2;          // that are multiplied before they are scaled
  static constexpr int kBatch = kBatchGroups * Codes::kScales;

  // A batch of a tile's weights, widened; codes are unsigned where there are minima, else less their offset.
  struct Weights {
    alignas(64) uint8_t codes[kBatch][kStepBytes];
    f32x16 scales[kBatch], mins[kBatch];
  };

  static void widen(const Tile& tile, int64_t first_group, int count, Weights& out) {
    const __m512i offset = _mm512_set1_epi8(static_cast<char>(Codes::kOffset));
    uint8_t* to = out.codes[0];
    for (int i = 0; i < count; ++i, to += Codes::kScales * kStepBytes) {
      u32x16 words[kGroupWords];
      Codes::load_scales(tile, first_group + i, out.scales + i * Codes::kScales, out.mins + i * Codes::kScales);
      Codes::load_codes(tile, first_group + i, words);
#pragma GCC unroll 8
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

  // Adds `count` groups to the y of `Blocks` chunks.
  template <int Blocks, int Tiles>
  void add_batch(const LinearPiece& piece, int64_t first_tile, const RowChunk* chunks, int64_t first_group, int count,
                 BlockSums* y) {
    constexpr int kSums = Blocks * kHalves * Tiles;
    const uint8_t* rows[Blocks * kHalves];
    for (int i = 0; i < Blocks * kHalves; ++i) {
      rows[i] = chunks[i / kHalves].planes.codes + first_group * kBlockBytes + i % kHalves * kGroup;
    }
    for (int at = 0; at < count * Codes::kScales; ++at) multiply<Tiles, kSums, 0>(rows, at);
    store_rest<1, kSums>(count * Codes::kScales - 1);
    for (int block = 0; block < Blocks; ++block) {
      for (int tile = 0; tile < Tiles; ++tile) {
        const int sum = block * kHalves * Tiles + tile;
        if (chunks[block].starts == nullptr) {
          scale<Tiles>(chunks[block], sum, weights_[tile], first_group, 0, count, y[block][tile]);
          continue;
        }
        for (int i = 0; i < count; ++i) {  // a group's outliers come before the next group
          scale<Tiles>(chunks[block], sum, weights_[tile], first_group, i, i + 1, y[block][tile]);
          add_outliers(chunks[block], Tile(*piece.weight, first_tile + tile), weights_[tile], first_group, i,
                       y[block][tile]);
        }
      }
    }
  }

  // Loads what the step's product `Sum` is the first to read, multiplies, and stores the sums of the product that has
  // been under way the longest, which is one of the step before: a store that had to wait for its product would hold up
  // the ones that follow.
  template <int Tiles, int kSums, int Sum>
  void multiply(const uint8_t* const* rows, int at) {
    constexpr int kRow = Sum / Tiles, kTile = Sum % Tiles;
    if constexpr (kTile == 0) {
      tile_load<4 + kRow>(rows[kRow] + at / Codes::kScales * kBlockBytes + at % Codes::kScales * kStepCols, kRowBytes);
    }
    if constexpr (kRow == 0) tile_load<6 + kTile>(weights_[kTile].codes[at], 64);
    tile_zero<Sum>();
    tile_multiply<Sum, 4 + kRow, 6 + kTile, Codes::kHasMins>();
    if constexpr (Sum == kSums - 1) {
      tile_store<0>(sums_[at][0], 64);
    } else {
      if (at > 0) tile_store<Sum + 1>(sums_[at - 1][Sum + 1], 64);
      multiply<Tiles, kSums, Sum + 1>(rows, at);
    }
  }
  template <int Sum, int kSums>
  void store_rest(int at) {
    if constexpr (Sum < kSums) {
      tile_store<Sum>(sums_[at][Sum], 64);
      store_rest<Sum + 1, kSums>(at);
    }
  }

  // Adds the dot products of groups first .. last - 1 of a batch, in sums from `sum` on, to one chunk by one tile.
  template <int Tiles>
  void scale(const RowChunk& chunk, int sum, const Weights& weights, int64_t first_group, int first, int last,
             f32x16* y) const {
    const RowScales<Codes> row_scales(chunk.planes);
    const bool is_start = first_group + first == 0;
    if (chunk.num_rows < kAmxRows) {
      for (int r = 0; r < chunk.num_rows; ++r) {
        f32x16 of_row = is_start ? f32x16{} : y[r];
        for (int at = first * Codes::kScales; at < last * Codes::kScales; ++at) {
          of_row = add<Tiles>(row_scales, sum, weights, first_group, at, r, of_row);
        }
        y[r] = of_row;
      }
      return;
    }
    f32x16 of_rows[kAmxRows];
#pragma GCC unroll 16
    for (int r = 0; r < kAmxRows; ++r) of_rows[r] = is_start ? f32x16{} : y[r];
    for (int at = first * Codes::kScales; at < last * Codes::kScales; ++at) {
#pragma GCC unroll 16
      for (int r = 0; r < kAmxRows; ++r) {
        of_rows[r] = add<Tiles>(row_scales, sum, weights, first_group, at, r, of_rows[r]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kAmxRows; ++r) y[r] = of_rows[r];
  }

  // Adds the products of the outliers of group `i` of a batch.
  static void add_outliers(const RowChunk& chunk, const Tile& tile, const Weights& weights, int64_t first_group, int i,
                           f32x16* y) {
    const f32x16 *scales = weights.scales + i * Codes::kScales, *mins = weights.mins + i * Codes::kScales;
    chunk.outliers_of(first_group + i, [&](float outlier, uint32_t col, uint32_t row) {
      y[row] = fma(set1(outlier), Codes::load_column(tile, first_group + i, col, scales, mins), y[row]);
    });
  }

  // What step `at` of a batch adds to y of row r.
  template <int Tiles>
  f32x16 add(const RowScales<Codes>& row_scales, int sum, const Weights& weights, int64_t first_group, int at, int r,
             f32x16 y) const {
    i32x16 dot = sums_[at][sum][r];
    if constexpr (kHalves == 2) dot = dot * kHigh + sums_[at][sum + Tiles][r];
    const f32x16 min = Codes::kHasMins ? weights.mins[at] : f32x16{};
    return row_scales.add(dot, weights.scales[at], min, first_group + at / Codes::kScales, at % Codes::kScales, r, y);
  }

  Weights weights_[kMaxTiles];
  alignas(64) i32x16 sums_[kBatch][4][kAmxRows];
  BlockSums y_[kMaxRows / kAmxRows];
};

// Rows first_row .. last_row - 1 of a piece by all its tiles: whole blocks, or part of one.
template <class Codes, bool IsWide>
void amx_blocks(const LinearPiece& piece, int64_t first_row, int64_t last_row) {
  using Kernel = AmxKernel<Codes, IsWide>;
  const int64_t num_rows = last_row - first_row;
  const AmxTiles config(static_cast<int>(num_rows < kAmxRows ? num_rows : kAmxRows), Kernel::kCols);
  Kernel kernel;
  for (int64_t first = first_row; first < last_row; first += Kernel::kMaxRows) {
    const int64_t last = last_row - first < Kernel::kMaxRows ? last_row : first + Kernel::kMaxRows;
    const auto chunks = chunks_of<kAmxRows, kAmxRows>(piece.input, piece.weight->cols() / kGroup, first, last);
    int64_t tile = piece.first_tile;
    for (; tile + 2 <= piece.last_tile; tile += 2) kernel.template run<2>(piece, tile, chunks);
    if (tile < piece.last_tile) kernel.template run<1>(piece, tile, chunks);
  }
}

// As many of a piece's rows as AMX is the faster for; returns the first row that is left.
template <class Codes, bool IsWide>
int64_t amx_rows(const LinearPiece& piece) {
  const int64_t whole = piece.first_row + (piece.last_row - piece.first_row) / kAmxRows * kAmxRows;
  if (whole > piece.first_row) amx_blocks<Codes, IsWide>(piece, piece.first_row, whole);
  if (piece.last_row - whole < AmxKernel<Codes, IsWide>::kFewestRows) return whole;
  amx_blocks<Codes, IsWide>(piece, whole, piece.last_row);
  return piece.last_row;
}

}  // namespace jinn::JINN_ISA
