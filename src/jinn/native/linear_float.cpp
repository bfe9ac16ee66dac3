// y = x W^T with float activations: weights are widened to float32 in registers, or multiplied as bfloat16 pairs.
//
// Each output has kParts partial sums, column c in part c % kParts (bfloat16: word w in part w % 2); they are added in
// one fixed order at the end, whatever is computed beside it.
#include <type_traits>

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
    default:
      with_block_codes(piece.weight->format(), [&](auto codes) { piece_of<WidenCodes<decltype(codes)>>(piece); });
  }
}

void linear(const LinearPiece& piece) {
  const ActivationType type = piece.input.type;
  if (type == ActivationType::Int8 || type == ActivationType::Int12) return linear_integer(piece);
  linear_float(piece);
}

}  // namespace jinn::JINN_ISA
