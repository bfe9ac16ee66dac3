// y = x W^T with float activations: weights are widened to float32 in registers, or multiplied as bfloat16 pairs.
//
// Each output has kParts partial sums, column c in part c % kParts; they are added in one fixed order at the end,
// whatever is computed beside it. The order of bfloat16 pairs is that of bf16_products.h.
#include <type_traits>

#include "bf16_products.h"
#include "block_codes.h"
#include "kernels.h"
#include "linear_store.h"
#include "ops.h"
#include "vec.h"

namespace jinn::JINN_ISA {
namespace {

constexpr int kParts = 4;

// Each format widens four consecutive columns, 4 * q to 4 * q + 3, of 16 rows; q goes up from 0.
struct WidenF32 {
  void quad(const Tile& tile, int64_t q, f32x16* out) const {
    for (int i = 0; i < 4; ++i) out[i] = bit_cast<f32x16>(tile.word(4 * q + i));
  }
};
struct WidenF16 {
  void quad(const Tile& tile, int64_t q, f32x16* out) const {
    for (int i = 0; i < 2; ++i) {
      const u32x16 word = tile.word(2 * q + i);
      out[2 * i] = f16_low(word);
      out[2 * i + 1] = f16_high(word);
    }
  }
};
struct WidenBF16 {
  void quad(const Tile& tile, int64_t q, f32x16* out) const {
    for (int i = 0; i < 2; ++i) {
      const u32x16 word = tile.word(2 * q + i);
      out[2 * i] = bf16_low(word);
      out[2 * i + 1] = bf16_high(word);
    }
  }
};

template <class Codes>
struct WidenCodes {
  u32x16 words[kGroupWords];
  f32x16 scales[Codes::kScales], mins[Codes::kScales];

  void quad(const Tile& tile, int64_t q, f32x16* out) {
    const int w = static_cast<int>(q % kGroupWords);
    if (w == 0) {
      Codes::load_codes(tile, q / kGroupWords, words);
      Codes::load_scales(tile, q / kGroupWords, scales, mins);
    }
    const int part = w * Codes::kScales / kGroupWords;
    for (int i = 0; i < 4; ++i) {
      const i32x16 code = (i32x16)((words[w] >> (8 * i)) & 0xffu) - Codes::kOffset;
      out[i] = to_float(code) * scales[part];
      if constexpr (Codes::kHasMins) out[i] = out[i] + mins[part];
    }
  }
};

// Columns past the last whole quad of F32, F16 and BF16 weights.
JINN_INLINE float value_at(const PackedTensor& weight, const Tile& tile, int64_t col, int lane) {
  if (weight.format() == Format::F32) return bit_cast<float>(tile.word(col)[lane]);
  const uint32_t word = tile.word(col / 2)[lane];
  const uint16_t half = static_cast<uint16_t>(word >> (16 * (col % 2)));
  return weight.format() == Format::F16 ? half_to_float(half) : bf16_to_float(half);
}

template <class Widen, int R>
void tile_rows(const LinearPiece& piece, int64_t tile_index, int64_t first_row) {
  const PackedTensor& weight = *piece.weight;
  const Tile tile(weight, tile_index);
  const int64_t num_quads = weight.cols() / 4;
  f32x16 y[R][kParts] = {};
  Widen widen;
  for (int64_t q = 0; q < num_quads; ++q) {
    f32x16 w[4];
    widen.quad(tile, q, w);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const float* x = reinterpret_cast<const float*>(piece.input.row(first_row + r)) + 4 * q;
#pragma GCC unroll 4
      for (int i = 0; i < kParts; ++i) y[r][i] = fma(w[i], set1(x[i]), y[r][i]);
    }
  }
  for (int64_t col = 4 * num_quads; col < weight.cols(); ++col) {
    float values[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) values[lane] = value_at(weight, tile, col, lane);
    const f32x16 w = load(values);
    for (int r = 0; r < R; ++r) {
      const float x = reinterpret_cast<const float*>(piece.input.row(first_row + r))[col];
      y[r][col % kParts] = fma(w, set1(x), y[r][col % kParts]);
    }
  }
  const TileOutput output(piece, tile_index);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) output.store(first_row + r, (y[r][0] + y[r][1]) + (y[r][2] + y[r][3]));
}

// Where a row's column is in a panel, counted from its first.
template <int Rows>
int64_t panel_column(int64_t col) {
  return col / kStepCols * kStepCols * Rows + col % kStepCols;
}

// Rows first .. first + Rows - 1 widened, [steps][Rows][kStepCols].
template <int Rows>
void widen_rows(const LinearPiece& piece, int64_t first, float* panel) {
  const int64_t cols = piece.weight->cols();
  for (int r = 0; r < Rows; ++r) {
    const uint8_t* x = piece.input.row(first + r);
    float* to = panel + r * kStepCols;
    int64_t col = 0;
    for (; col + kLanes <= cols; col += kLanes) {
      store(to + panel_column<Rows>(col), bit_cast<f32x16>(load_u16(x + 2 * col) << 16));
    }
    for (; col < (cols + 1) / 2 * 2; ++col) {
      to[panel_column<Rows>(col)] = bf16_to_float(reinterpret_cast<const uint16_t*>(x)[col]);
    }
  }
}

// `Tiles` tiles, which lie in memory still if none of them has been multiplied, for Rows rows from `first_row` on,
// which are at `panel` of a panel of PanelRows.
template <int PanelRows, int Rows, int Tiles>
void bf16_tile_rows(const LinearPiece& piece, int64_t tile, bool are_in_memory, int64_t first_row, const float* panel) {
  const int64_t num_words = (piece.weight->cols() + 1) / 2;
  f32x16 y[Rows][Tiles] = {};
  for (int64_t w = 0; w < num_words; w += kStepWords) {
    const int count = static_cast<int>(num_words - w < kStepWords ? num_words - w : kStepWords);
    const uint8_t* words[Tiles];
    for (int t = 0; t < Tiles; ++t) {
      words[t] = piece.weight->tile(tile + t) + 64 * w;
      if (are_in_memory) prefetch<kStepWords>(words[t] + kPrefetchBytes);
    }
    add_step<Rows, Tiles, kStepCols>(panel + 2 * w * PanelRows, words, 64, count, y);
  }
  for (int t = 0; t < Tiles; ++t) {
    const TileOutput output(piece, tile + t);
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) output.store(first_row + r, y[r][t]);
  }
}

constexpr int kPanelRows = 12;  // whose sums fit into the registers of AVX-512

// Calls f(number of rows, first row) for panels of kPanelRows rows and for as many as are left, at most Rows.
template <int Rows, class F>
void for_each_panel(int64_t row, int64_t last, F f) {
  for (; row + Rows <= last; row += Rows) f(std::integral_constant<int, Rows>(), row);
  if constexpr (Rows > 1) for_each_panel<Rows - 1>(row, last, f);
}

// Few enough rows that their panels stay in the second level of cache while all tiles pass.
void bf16_rows(const LinearPiece& piece, int64_t first_row, int64_t last_row) {
  static thread_local Scratch<float> scratch;
  const int64_t row_floats = (piece.weight->cols() + kStepCols - 1) / kStepCols * kStepCols;
  float* panels = scratch.of((last_row - first_row) * row_floats);
  const auto panel_at = [&](int64_t row) { return panels + (row - first_row) * row_floats; };
  for_each_panel<kPanelRows>(first_row, last_row,
                             [&](auto rows, int64_t row) { widen_rows<rows>(piece, row, panel_at(row)); });
  int64_t tile = piece.first_tile;
#if defined(JINN_AVX512)
  // Two tiles share what is loaded of half a panel. Few rows wait for memory, which gives one tile the fastest.
  constexpr int kHalf = kPanelRows / 2;
  for (; last_row - first_row > kPanelRows && tile + 2 <= piece.last_tile; tile += 2) {
    for_each_panel<kPanelRows>(first_row, last_row, [&](auto rows, int64_t row) {
      constexpr int kFirst = rows < kHalf ? rows : kHalf;
      bf16_tile_rows<rows, kFirst, 2>(piece, tile, row == first_row, row, panel_at(row));
      if constexpr (rows > kHalf) {
        bf16_tile_rows<rows, rows - kHalf, 2>(piece, tile, false, row + kHalf, panel_at(row) + kHalf * kStepCols);
      }
    });
  }
#endif
  for (; tile < piece.last_tile; ++tile) {
    for_each_panel<kPanelRows>(first_row, last_row, [&](auto rows, int64_t row) {
      bf16_tile_rows<rows, rows, 1>(piece, tile, row == first_row, row, panel_at(row));
    });
  }
}

#if defined(JINN_AMX)
constexpr int kAmxFewestRows = 3;  // fewer are as fast without

// `Blocks` blocks of rows, as many as the tiles are configured for, by two tiles of weights. Those that no other row
// has been multiplied with lie in memory still.
template <int Blocks, bool AreInMemory>
void amx_sums(const uint8_t* rows, int64_t stride, const uint8_t* const tiles[2], int64_t num_steps,
              float (*sums)[2][kLanes * kLanes]) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < num_steps; ++step) {
    const uint8_t *words = tiles[0] + kTileBytes * step, *other_words = tiles[1] + kTileBytes * step;
    if constexpr (AreInMemory) {
      prefetch<kStepWords>(words + kPrefetchBytes);
      prefetch<kStepWords>(other_words + kPrefetchBytes);
    }
    _tile_loadd(4, rows + 64 * step, stride);
    _tile_loadd(6, words, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, other_words, 64);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (Blocks == 2) {
      _tile_loadd(5, rows + kAmxRows * stride + 64 * step, stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums[0][0], 64);
  _tile_stored(1, sums[0][1], 64);
  if constexpr (Blocks == 2) {
    _tile_stored(2, sums[1][0], 64);
    _tile_stored(3, sums[1][1], 64);
  }
}

// 32 rows, as far as there are any, by tiles first_tile .. last_tile - 1.
void amx_rows(const LinearPiece& piece, int64_t first_row, int64_t first_tile, int64_t last_tile) {
  const int64_t left = piece.last_row - first_row, count = left < 2 * kAmxRows ? left : 2 * kAmxRows;
  const int64_t num_steps = piece.weight->cols() / kStepCols;
  const uint8_t first = static_cast<uint8_t>(count < kAmxRows ? count : kAmxRows);
  const uint8_t second = static_cast<uint8_t>(count > kAmxRows ? count - kAmxRows : 16);
  const auto add = count <= kAmxRows              ? amx_sums<1, true>
                   : first_row == piece.first_row ? amx_sums<2, true>
                                                  : amx_sums<2, false>;
  const Bf16Tiles configured({first, first, second, second, first, second, 16, 16});
  alignas(64) float sums[2][2][kLanes * kLanes];
  for (int64_t tile = first_tile; tile < last_tile; tile += 2) {
    const int num_tiles = last_tile - tile < 2 ? 1 : 2;  // one alone is multiplied twice
    const uint8_t* tiles[2] = {piece.weight->tile(tile), piece.weight->tile(tile + num_tiles - 1)};
    add(piece.input.row(first_row), piece.input.stride, tiles, num_steps, sums);
    for (int t = 0; t < num_tiles; ++t) {
      const TileOutput output(piece, tile + t);
      for (int r = 0; r < count; ++r) {
        output.store(first_row + r, load(sums[r / kAmxRows][t] + r % kAmxRows * kLanes));
      }
    }
  }
}

void bf16_amx(const LinearPiece& piece) {
  constexpr int64_t kBlockBytes = 512 * 1024;  // of weights that stay in the second level of cache while all rows pass
  const int64_t fitting = kBlockBytes / static_cast<int64_t>(piece.weight->tile_bytes()) / 2 * 2;
  const int64_t at_once = fitting < 2 ? 2 : fitting;
  for (int64_t tile = piece.first_tile; tile < piece.last_tile; tile += at_once) {
    const int64_t last_tile = tile + at_once < piece.last_tile ? tile + at_once : piece.last_tile;
    for (int64_t row = piece.first_row; row < piece.last_row; row += 2 * kAmxRows) {
      amx_rows(piece, row, tile, last_tile);
    }
  }
}
#endif

void linear_bf16(const LinearPiece& piece) {
#if defined(JINN_AMX)
  const bool is_whole = piece.weight->cols() % kStepCols == 0;
  if (is_whole && piece.last_row - piece.first_row >= kAmxFewestRows) return bf16_amx(piece);
#endif
  constexpr int64_t kRowsAtOnce = 48;
  for (int64_t row = piece.first_row; row < piece.last_row; row += kRowsAtOnce) {
    bf16_rows(piece, row, row + kRowsAtOnce < piece.last_row ? row + kRowsAtOnce : piece.last_row);
  }
}

template <class Widen>
void piece_of(const LinearPiece& piece) {
  for (int64_t tile = piece.first_tile; tile < piece.last_tile; ++tile) {
    int64_t row = piece.first_row;
    for (; row + 4 <= piece.last_row; row += 4) tile_rows<Widen, 4>(piece, tile, row);
    for (; row < piece.last_row; ++row) tile_rows<Widen, 1>(piece, tile, row);
  }
}

}  // namespace

void linear_float(const LinearPiece& piece) {
  if (piece.input.type == ActivationType::BF16) {
    const FlushToZero flush;
    return linear_bf16(piece);
  }
  switch (piece.weight->format()) {
    case Format::F32:
      return piece_of<WidenF32>(piece);
    case Format::F16:
      return piece_of<WidenF16>(piece);
    case Format::BF16:
      return piece_of<WidenBF16>(piece);
    default:
      with_block_codes(piece.weight->format(), [&](auto codes) { piece_of<WidenCodes<decltype(codes)>>(piece); });
  }
}

void linear(const LinearPiece& piece) {
  const ActivationType type = piece.input.type;
  if (is_integer(type)) return linear_integer(piece);
  linear_float(piece);
}

}  // namespace jinn::JINN_ISA
