// y = x W^T with float activations: weights are widened to float32 in registers, or multiplied as bfloat16 pairs.
//
// Each output has kParts partial sums, column c in part c % kParts (bfloat16: word w in part w % 2); they are added in
// one fixed order at the end, whatever is computed beside it.
#include <type_traits>

#include "kernels.h"
#include "linear_store.h"
#include "ops.h"
#include "vec.h"

namespace jinn::JINN_ISA {
namespace {

constexpr int kParts = 4;

struct Tile {
  const uint8_t* codes;
  const uint16_t* scales;
  const uint16_t* mins;

  Tile(const PackedTensor& weight, int64_t tile)
      : codes(weight.tile(tile)),
        scales(reinterpret_cast<const uint16_t*>(codes + weight.layout().scales)),
        mins(reinterpret_cast<const uint16_t*>(codes + weight.layout().mins)) {}

  u32x16 word(int64_t w) const { return load_as<u32x16>(codes + 64 * w); }
};

// Each format widens four consecutive columns, 4 * q to 4 * q + 3, of 16 rows.
struct WidenF32 {
  JINN_INLINE void quad(const Tile& tile, int64_t q, f32x16* out) {
    for (int i = 0; i < 4; ++i) out[i] = bit_cast<f32x16>(tile.word(4 * q + i));
  }
};
struct WidenF16 {
  JINN_INLINE void quad(const Tile& tile, int64_t q, f32x16* out) {
    for (int i = 0; i < 2; ++i) {
      const u32x16 word = tile.word(2 * q + i);
      out[2 * i] = f16_low(word);
      out[2 * i + 1] = f16_high(word);
    }
  }
};
struct WidenBF16 {
  JINN_INLINE void quad(const Tile& tile, int64_t q, f32x16* out) {
    for (int i = 0; i < 2; ++i) {
      const u32x16 word = tile.word(2 * q + i);
      out[2 * i] = bf16_low(word);
      out[2 * i + 1] = bf16_high(word);
    }
  }
};

JINN_INLINE void widen_bytes(u32x16 word, int offset, f32x16 scale, f32x16* out) {
  for (int i = 0; i < 4; ++i) {
    const i32x16 code = (i32x16)((word >> (8 * i)) & 0xffu) - offset;
    out[i] = to_float(code) * scale;
  }
}
struct WidenQ8 {
  JINN_INLINE void quad(const Tile& tile, int64_t q, f32x16* out) {
    widen_bytes(tile.word(q), 128, load_f16(tile.scales + q / 8 * kLanes), out);
  }
};
template <bool HasMins>
struct WidenQ4 {
  JINN_INLINE void quad(const Tile& tile, int64_t q, f32x16* out) {
    const u32x16 word = (tile.word(q / 2) >> (4 * (q % 2))) & 0x0f0f0f0fu;
    widen_bytes(word, HasMins ? 0 : 8, load_f16(tile.scales + q / 8 * kLanes), out);
    if constexpr (HasMins) {
      const f32x16 min = load_f16(tile.mins + q / 8 * kLanes);
      for (int i = 0; i < 4; ++i) out[i] = out[i] + min;
    }
  }
};

// Columns past the last whole quad of F32, F16 and BF16 weights.
JINN_INLINE float value_at(const PackedTensor& weight, const Tile& tile, int64_t col, int lane) {
  const int word_cols = info(weight.format()).word_cols;
  const uint32_t word = tile.word(col / word_cols)[lane];
  if (word_cols == 1) return bit_cast<float>(word);
  const uint16_t half = static_cast<uint16_t>(word >> (16 * (col % 2)));
  return weight.format() == Format::F16 ? half_to_float(half) : bf16_to_float(half);
}

template <class Widen, int R>
void tile_rows(const LinearPiece& piece, int64_t tile_index, int64_t first_row) {
  const PackedTensor& weight = *piece.weight;
  const Tile tile(weight, tile_index);
  const int64_t num_quads = weight.cols() / 4;
  f32x16 y[R][kParts] = {};
  for (int64_t q = 0; q < num_quads; ++q) {
    f32x16 w[4];
    Widen::quad(tile, q, w);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const float* x = reinterpret_cast<const float*>(piece.input.row(first_row + r)) + 4 * q;
#pragma GCC unroll 4
      for (int i = 0; i < kParts; ++i) y[r][i] = fma(w[i], set1(x[i]), y[r][i]);
    }
  }
  for (int64_t col = 4 * num_quads; col < weight.cols(); ++col) {
    f32x16 w;
    for (int lane = 0; lane < kLanes; ++lane) w[lane] = value_at(weight, tile, col, lane);
    for (int r = 0; r < R; ++r) {
      const float x = reinterpret_cast<const float*>(piece.input.row(first_row + r))[col];
      y[r][col % kParts] = fma(w, set1(x), y[r][col % kParts]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    store_tile(piece, tile_index, first_row + r, (y[r][0] + y[r][1]) + (y[r][2] + y[r][3]));
  }
}

struct Bf16Pairs {};

template <int R>
void bf16_tile_rows(const LinearPiece& piece, int64_t tile_index, int64_t first_row) {
  const Tile tile(*piece.weight, tile_index);
  const int64_t num_words = (piece.weight->cols() + 1) / 2;
  f32x16 y[R][2] = {};
  for (int64_t w = 0; w < num_words; ++w) {
    const u32x16 word = tile.word(w);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      uint32_t x;
      std::memcpy(&x, piece.input.row(first_row + r) + 4 * w, 4);
      if (w % 2 == 0) {
        y[r][0] = dot_bf16(y[r][0], word, x);
      } else {
        y[r][1] = dot_bf16(y[r][1], word, x);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) store_tile(piece, tile_index, first_row + r, y[r][0] + y[r][1]);
}

template <class Widen, int R>
void rows(const LinearPiece& piece, int64_t tile, int64_t row) {
  if constexpr (std::is_same_v<Widen, Bf16Pairs>) {
    bf16_tile_rows<R>(piece, tile, row);
  } else {
    tile_rows<Widen, R>(piece, tile, row);
  }
}

template <class Widen>
void piece_of(const LinearPiece& piece) {
  for (int64_t tile = piece.first_tile; tile < piece.last_tile; ++tile) {
    int64_t row = piece.first_row;
    for (; row + 4 <= piece.last_row; row += 4) rows<Widen, 4>(piece, tile, row);
    for (; row < piece.last_row; ++row) rows<Widen, 1>(piece, tile, row);
  }
}

}  // namespace

void linear_float(const LinearPiece& piece) {
  if (piece.input.type == ActivationType::BF16) return piece_of<Bf16Pairs>(piece);
  switch (piece.weight->format()) {
    case Format::F32:
      return piece_of<WidenF32>(piece);
    case Format::F16:
      return piece_of<WidenF16>(piece);
    case Format::BF16:
      return piece_of<WidenBF16>(piece);
    case Format::Q8_0:
      return piece_of<WidenQ8>(piece);
    case Format::Q4_0:
      return piece_of<WidenQ4<false>>(piece);
    case Format::Q4_1:
      return piece_of<WidenQ4<true>>(piece);
  }
}

void linear(const LinearPiece& piece) {
  const ActivationType type = piece.input.type;
  if (type == ActivationType::Int8 || type == ActivationType::Int12) return linear_integer(piece);
  linear_float(piece);
}

}  // namespace jinn::JINN_ISA
