// The machine's limits: streaming reads, and multiply-adds in registers.
#include "kernels.h"
#include "ops.h"
#include "vec.h"
#if defined(JINN_AMX)
#include "linear_amx.h"
#endif

namespace jinn::JINN_ISA {
namespace {

constexpr int kAccumulators = 12;  // independent chains, enough to hide the latency
constexpr int kStreams = 4;

// Keeps a value in its register without storing it.
template <class Vector>
JINN_INLINE void keep(Vector& v) {
#if defined(JINN_AVX512)
  asm volatile("" : "+v"(v));
#elif defined(JINN_AVX2)
  asm volatile("" : "+x"(v.parts[0]), "+x"(v.parts[1]));
#else
  asm volatile("" : : "r"(&v) : "memory");
#endif
}

template <class Vector, class Step>
JINN_INLINE uint32_t run(int64_t rounds, Step step) {
  Vector sums[kAccumulators] = {};
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kAccumulators; ++i) {
      sums[i] = step(sums[i]);
      keep(sums[i]);
    }
  }
  uint32_t mixed = 0;
#pragma GCC unroll 12
  for (int i = 0; i < kAccumulators; ++i) mixed ^= bit_cast<u32x16>(sums[i])[0];
  return mixed;
}

#if defined(JINN_AMX)
// Four sums of whole tiles, 16 rows by 16 columns by 64 bytes each.
template <bool IsInteger>
int64_t amx_peak(int64_t rounds, uint32_t* sink) {
  AmxConfig config;
  for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = 64, config.rows[tile] = 16;
  alignas(64) uint8_t data[1024] = {1};
  config.load();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, data, 64);
  _tile_loadd(5, data, 64);
  _tile_loadd(6, data, 64);
  _tile_loadd(7, data, 64);
  for (int64_t round = 0; round < rounds; ++round) {
    if constexpr (IsInteger) {
      _tile_dpbssd(0, 4, 5);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(2, 6, 5);
      _tile_dpbssd(3, 6, 7);
    } else {
      _tile_dpbf16ps(0, 4, 5);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 6, 5);
      _tile_dpbf16ps(3, 6, 7);
    }
  }
  _tile_stored(0, data, 64);
  _tile_release();
  *sink ^= data[0];
  return rounds * 4 * 16 * 16 * (IsInteger ? 64 : 32) * 2;
}
#endif

}  // namespace

void read_bytes(const uint8_t* from, size_t bytes, uint32_t* sink) {
  u32x16 mixed[kStreams] = {};
  for (size_t at = 0; at + kStreams * 64 <= bytes; at += kStreams * 64) {
    for (int i = 0; i < kStreams; ++i) mixed[i] ^= load_as<u32x16>(from + at + 64 * i);
  }
  for (int i = 1; i < kStreams; ++i) mixed[0] ^= mixed[i];
  for (int i = 0; i < kLanes; ++i) *sink ^= mixed[0][i];
}

int64_t peak(Peak kind, int64_t rounds, uint32_t* sink) {
  const int64_t per_round = 2 * kAccumulators * kLanes;
  if (kind == Peak::Int8) {
#if defined(JINN_AMX)
    return amx_peak<true>(rounds, sink);
#endif
    u32x16 w = set1_bits(0x03030303u);
    keep(w);
    static constexpr uint8_t kFour[4] = {5, 5, 5, 5};
    const FourBytes a = spread_bytes(kFour);
    *sink ^= run<i32x16>(rounds, [w, a](i32x16 sum) { return dot_u8s8(sum, w, a); });
    return rounds * per_round * 4;
  }
#if defined(JINN_AMX)
  if (kind == Peak::BF16) return amx_peak<false>(rounds, sink);
#endif
  f32x16 factor = set1(0.5f), addend = set1(1.0f);
  keep(factor);
  *sink ^= run<f32x16>(rounds, [factor, addend](f32x16 sum) { return fma(sum, factor, addend); });
  return rounds * per_round;
}

}  // namespace jinn::JINN_ISA
