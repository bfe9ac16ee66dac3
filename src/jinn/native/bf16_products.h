// Sums of products of bfloat16 pairs, in the order in which AMX's tdpbf16ps takes them.
//
// Columns come in steps of 32. A step's even columns are a chain of fused multiply-adds that starts at zero, its odd
// columns another; both are added together, and then to the result. Numbers below the smallest normal one count as
// zero, so vector code that shall have the same bits holds a FlushToZero. Where float32 numbers meet bfloat16 ones,
// they are taken apart into terms that are bfloat16 numbers, each multiplied by itself, step by step.
#pragma once

#include <cstdlib>
#include <memory>

#include "kernels.h"
#include "scratch.h"
#include "vec.h"

#if defined(JINN_AVX512)
#include <xmmintrin.h>
#endif
#if defined(JINN_AMX)
#include "linear_amx.h"
#endif

namespace jinn::JINN_ISA {

constexpr int kStepWords = 16;  // words of a step, two columns each
constexpr int kStepCols = 2 * kStepWords;

#if defined(JINN_AVX512)
class FlushToZero {
 public:
  FlushToZero() { _mm_setcsr(control_ | kFlush | kDenormalsAreZero); }
  ~FlushToZero() { _mm_setcsr(control_); }
  FlushToZero(const FlushToZero&) = delete;

 private:
  static constexpr unsigned kFlush = 0x8000, kDenormalsAreZero = 0x40;
  unsigned control_ = _mm_getcsr();
};
#else
struct FlushToZero {
  FlushToZero() {}  // no other path has the bits of AMX
};
#endif

// Adds a step, or the `num_words` words that are left of one, to `Vecs` vectors of each of Rows rows. Row r's columns
// are at panel + r * RowStride, a stride that the compiler knows, which keeps addresses out of registers; word w of
// vector v is at words[v] + w * stride.
template <int Rows, int Vecs, int RowStride>
JINN_INLINE void add_step(const float* panel, const uint8_t* const (&words)[Vecs], int64_t stride, int num_words,
                          f32x16 (*y)[Vecs]) {
  f32x16 even[Rows][Vecs] = {}, odd[Rows][Vecs] = {};
  for (int w = 0; w < num_words; ++w, panel += 2) {
    f32x16 low[Vecs], high[Vecs];
#pragma GCC unroll 2
    for (int v = 0; v < Vecs; ++v) {
      const u32x16 word = load_as<u32x16>(words[v] + w * stride);
      low[v] = bf16_low(word);
      high[v] = bf16_high(word);
    }
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const f32x16 x = set1(panel[r * RowStride]);
#pragma GCC unroll 2
      for (int v = 0; v < Vecs; ++v) even[r][v] = fma(low[v], x, even[r][v]);
    }
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const f32x16 x = set1(panel[r * RowStride + 1]);
#pragma GCC unroll 2
      for (int v = 0; v < Vecs; ++v) odd[r][v] = fma(high[v], x, odd[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < Vecs; ++v) y[r][v] = y[r][v] + (even[r][v] + odd[r][v]);
  }
}

#if defined(JINN_AVX512)
// The nearest bfloat16 number; one below the smallest normal number is zero.
JINN_INLINE f32x16 nearest_bf16(f32x16 x) {
  const __m256i halves = (__m256i)_mm512_cvtneps_pbh((__m512)x);
  return (f32x16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
}
// The bfloat16 number of the upper half of its bits.
JINN_INLINE f32x16 upper_half(f32x16 x) { return bf16_high(bit_cast<u32x16>(x)); }
#endif

#if defined(JINN_AMX)
constexpr int kTileBytes = 1024;

// Eight tiles of so many rows of 64 bytes.
class Bf16Tiles {
 public:
  explicit Bf16Tiles(const uint8_t (&num_rows)[8]) {
    AmxConfig config;
    for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = 64, config.rows[tile] = num_rows[tile];
    config.load();
  }
  ~Bf16Tiles() { _tile_release(); }
  Bf16Tiles(const Bf16Tiles&) = delete;
};
#endif

}  // namespace jinn::JINN_ISA
