// Sixteen lanes, the one vector width that kernels are written in.
//
// Plain operators work and every target compiles them: one zmm register on AVX-512, two ymm on AVX2, four 128-bit
// registers on NEON. Only what operators cannot say has an intrinsic here.
// Everything is in the namespace of the instruction set that this file is compiled for, so that the linker can never
// put code of one set into another's path.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(JINN_AVX512) || defined(JINN_AVX2)
#include <immintrin.h>
#endif

#define JINN_INLINE static inline __attribute__((always_inline))

namespace jinn::JINN_ISA {

constexpr int kLanes = 16;

#if defined(JINN_AVX512)
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
#else
// A vector of several registers. The compiler's own vectors of this size would live in memory.
template <class Number>
struct Lanes {
#if defined(JINN_AVX2)
  static constexpr int kPartLanes = 8;
#else
  static constexpr int kPartLanes = 4;
#endif
  static constexpr int kParts = kLanes / kPartLanes;
  typedef Number Part __attribute__((vector_size(4 * kPartLanes)));
  Part parts[kParts];

  Number operator[](int lane) const { return parts[lane / kPartLanes][lane % kPartLanes]; }

  // The same bits as other numbers.
  template <class Other>
  explicit operator Lanes<Other>() const {
    return each([this](int p) { return (typename Lanes<Other>::Part)parts[p]; });
  }

  friend Lanes operator-(const Lanes& a) {
    return each([&](int p) { return -a.parts[p]; });
  }
  friend Lanes operator~(const Lanes& a) {
    return each([&](int p) { return ~a.parts[p]; });
  }

  // clang-format off
#define JINN_OPERATOR(op)                                             \
  friend auto operator op(const Lanes& a, const Lanes& b) {           \
    return each([&](int p) { return a.parts[p] op b.parts[p]; });     \
  }                                                                   \
  friend auto operator op(const Lanes& a, Number b) {                 \
    return each([&](int p) { return a.parts[p] op b; });              \
  }                                                                   \
  friend auto operator op(Number a, const Lanes& b) {                 \
    return each([&](int p) { return a op b.parts[p]; });              \
  }
#define JINN_ASSIGNING_OPERATOR(op) \
  JINN_OPERATOR(op)                 \
  template <class Other> Lanes& operator op##=(const Other& b) { return *this = *this op b; }
  JINN_ASSIGNING_OPERATOR(+)
  JINN_ASSIGNING_OPERATOR(-)
  JINN_ASSIGNING_OPERATOR(*)
  JINN_ASSIGNING_OPERATOR(/)
  JINN_ASSIGNING_OPERATOR(&)
  JINN_ASSIGNING_OPERATOR(|)
  JINN_ASSIGNING_OPERATOR(^)
  JINN_ASSIGNING_OPERATOR(<<)
  JINN_ASSIGNING_OPERATOR(>>)
  JINN_OPERATOR(<)
  JINN_OPERATOR(>)
  JINN_OPERATOR(==)
#undef JINN_ASSIGNING_OPERATOR
#undef JINN_OPERATOR
  // clang-format on

  // A vector of what `part` gives for each part.
  template <class Function>
  JINN_INLINE auto each(Function part) {
    using Result = decltype(part(0));
    Lanes<std::remove_cvref_t<decltype(Result{}[0])> > result;
    for (int p = 0; p < kParts; ++p) result.parts[p] = part(p);
    return result;
  }
};
using f32x16 = Lanes<float>;
using i32x16 = Lanes<int32_t>;
using u32x16 = Lanes<uint32_t>;
#endif

template <class To, class From>
JINN_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  if constexpr (sizeof(To) == 4 * kLanes) {
    return (To)from;
  } else {
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
  }
}

// Lanes are copied part by part: a compiler copies a struct as a whole in other pieces, by way of the stack.
template <class Vector>
JINN_INLINE Vector load_as(const void* from) {
  Vector v;
#if !defined(JINN_AVX512)
  if constexpr (requires { Vector::kParts; }) {
    for (int p = 0; p < Vector::kParts; ++p) {
      std::memcpy(&v.parts[p], static_cast<const uint8_t*>(from) + sizeof(v.parts[p]) * p, sizeof(v.parts[p]));
    }
    return v;
  }
#endif
  std::memcpy(&v, from, sizeof(v));
  return v;
}

// Asks for a line of 64 bytes: for the second level of cache with AMX, whose kernels need the first, elsewhere for the
// first. GCC drops calls of functions that do no more than __builtin_prefetch.
JINN_INLINE void prefetch(const uint8_t* from) {
#if defined(JINN_AMX)
  asm volatile("prefetcht1 %0" ::"m"(*from));
#elif defined(JINN_AVX512) || defined(JINN_AVX2)
  asm volatile("prefetcht0 %0" ::"m"(*from));
#else
  __builtin_prefetch(from);
#endif
}
template <int Lines>
JINN_INLINE void prefetch(const uint8_t* from) {
#pragma GCC unroll 16
  for (int line = 0; line < Lines; ++line) prefetch(from + 64 * line);
}

JINN_INLINE f32x16 set1(float x) {
#if defined(JINN_AVX512)
  return f32x16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
#else
  return f32x16::each([x](int) { return f32x16::Part{} + x; });
#endif
}
JINN_INLINE u32x16 set1_bits(uint32_t x) { return u32x16{} + x; }

JINN_INLINE f32x16 load(const float* from) { return load_as<f32x16>(from); }
JINN_INLINE void store(float* to, f32x16 v) {
#if defined(JINN_AVX512)
  std::memcpy(to, &v, sizeof(v));
#else
  for (int p = 0; p < f32x16::kParts; ++p) std::memcpy(to + p * f32x16::kPartLanes, &v.parts[p], sizeof(v.parts[p]));
#endif
}

// The first `count` lanes; the rest are zero.
JINN_INLINE f32x16 load_part(const float* from, int count) {
#if defined(JINN_AVX512)
  return (f32x16)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
#else
  if (count == kLanes) return load(from);
  float v[kLanes] = {};
  std::memcpy(v, from, sizeof(float) * static_cast<size_t>(count));
  return load(v);
#endif
}
JINN_INLINE void store_part(float* to, f32x16 v, int count) {
#if defined(JINN_AVX512)
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), (__m512)v);
#else
  if (count == kLanes) return store(to, v);
  float numbers[kLanes];
  store(numbers, v);
  std::memcpy(to, numbers, sizeof(float) * static_cast<size_t>(count));
#endif
}

// Numbers of another kind, narrow or wide.
#if defined(JINN_AVX512)
template <class To, class From>
JINN_INLINE To convert(From v) {
  return __builtin_convertvector(v, To);
}
#else
template <class To, class From>
JINN_INLINE To convert(From v) {
  using Number = std::remove_cvref_t<decltype(To{}[0])>;
  constexpr int kPartLanes = f32x16::kPartLanes;
  typedef Number ToPart __attribute__((vector_size(sizeof(Number) * kPartLanes)));
  typedef std::remove_cvref_t<decltype(From{}[0])> FromPart
      __attribute__((vector_size(sizeof(From) / kLanes * kPartLanes)));
  if constexpr (requires { To::kParts, From::kParts; }) {
    return To::each([&](int p) { return __builtin_convertvector(v.parts[p], ToPart); });
  }
  To to;
  for (int p = 0; p < f32x16::kParts; ++p) {
    FromPart part;
    std::memcpy(&part, reinterpret_cast<const char*>(&v) + sizeof(part) * p, sizeof(part));
    const ToPart converted = __builtin_convertvector(part, ToPart);
    std::memcpy(reinterpret_cast<char*>(&to) + sizeof(converted) * p, &converted, sizeof(converted));
  }
  return to;
}
#endif
JINN_INLINE f32x16 to_float(i32x16 v) { return convert<f32x16>(v); }

JINN_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
#if defined(JINN_AVX512)
  return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(JINN_AVX2)
  return f32x16::each(
      [&](int p) { return (f32x16::Part)_mm256_fmadd_ps((__m256)a.parts[p], (__m256)b.parts[p], (__m256)c.parts[p]); });
#else
  return a * b + c;
#endif
}

template <class Vector>
JINN_INLINE Vector select(i32x16 mask, Vector yes, Vector no) {
#if defined(JINN_AVX512)
  return mask ? yes : no;
#else
  return Vector::each([&](int p) { return mask.parts[p] ? yes.parts[p] : no.parts[p]; });
#endif
}
// a > b ? a : b, and a < b ? a : b: b where one is NaN.
JINN_INLINE f32x16 max(f32x16 a, f32x16 b) {
#if defined(JINN_AVX512)
  return (f32x16)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(JINN_AVX2)
  return f32x16::each([&](int p) { return (f32x16::Part)_mm256_max_ps((__m256)a.parts[p], (__m256)b.parts[p]); });
#else
  return select(a > b, a, b);
#endif
}
JINN_INLINE f32x16 min(f32x16 a, f32x16 b) {
#if defined(JINN_AVX512)
  return (f32x16)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(JINN_AVX2)
  return f32x16::each([&](int p) { return (f32x16::Part)_mm256_min_ps((__m256)a.parts[p], (__m256)b.parts[p]); });
#else
  return select(a < b, a, b);
#endif
}

JINN_INLINE i32x16 lane_numbers() {
  static constexpr int32_t kIndex[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load_as<i32x16>(kIndex);
}
// Lanes below `count` as all ones.
JINN_INLINE i32x16 lanes_below(int count) { return lane_numbers() < (i32x16{} + count); }

// A bit per lane, the lowest of lane 0, where all bits of a lane are ones.
JINN_INLINE uint32_t lane_bits(i32x16 mask) {
#if defined(JINN_AVX512)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(JINN_AVX2)
  const auto part = [&](int p) { return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask.parts[p])); };
  return part(0) | part(1) << 8;
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
#endif
}

#if !defined(JINN_AVX512)
// Lanes i, i + 8 and then i + 4 taken together, i below 4.
template <class Vector, class Take>
JINN_INLINE auto fold(const Vector& v, Take take) {
#if defined(JINN_AVX2)
  const auto eight = take(v.parts[0], v.parts[1]);
  return take(__builtin_shufflevector(eight, eight, 0, 1, 2, 3), __builtin_shufflevector(eight, eight, 4, 5, 6, 7));
#else
  return take(take(v.parts[0], v.parts[2]), take(v.parts[1], v.parts[3]));
#endif
}
#endif

// The tree is fixed: lane i with lane i + 8, then + 4, + 2, + 1.
JINN_INLINE float reduce_add(f32x16 v) {
#if defined(JINN_AVX512)
  return _mm512_reduce_add_ps((__m512)v);
#else
  const auto four = fold(v, [](auto a, auto b) { return a + b; });
  return (four[0] + four[2]) + (four[1] + four[3]);
#endif
}

JINN_INLINE float reduce_max(f32x16 v) {
#if defined(JINN_AVX512)
  return _mm512_reduce_max_ps((__m512)v);
#else
  const auto four = fold(v, [](auto a, auto b) { return a > b ? a : b; });
  const float even = four[0] > four[2] ? four[0] : four[2], odd = four[1] > four[3] ? four[1] : four[3];
  return even > odd ? even : odd;
#endif
}

JINN_INLINE int32_t reduce_add(i32x16 v) {
#if defined(JINN_AVX512)
  return _mm512_reduce_add_epi32((__m512i)v);
#else
  const auto four = fold(v, [](auto a, auto b) { return a + b; });
  return (four[0] + four[2]) + (four[1] + four[3]);
#endif
}

// Sixteen numbers that fit into bytes.
JINN_INLINE void store_bytes(int8_t* to, i32x16 v) {
#if defined(JINN_AVX512)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)v));
#elif defined(JINN_AVX2)
  typedef int8_t i8x16 __attribute__((vector_size(16)));
  const i8x16 bytes = convert<i8x16>(v);
  std::memcpy(to, &bytes, sizeof(bytes));
#else
  for (int i = 0; i < kLanes; ++i) to[i] = static_cast<int8_t>(v[i]);
#endif
}

#if defined(JINN_AVX2) && !defined(JINN_AVX_VNNI)
JINN_INLINE __m256i dot_part(__m256i sum, __m256i w, __m256i a) {
  const __m256i even =
      _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(0xff)), _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(a, 8));
  return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}
#elif defined(JINN_AVX2)
JINN_INLINE __m256i dot_part(__m256i sum, __m256i w, __m256i a) { return _mm256_dpbusd_avx_epi32(sum, w, a); }
#elif !defined(JINN_AVX512)
// The products fit into 16 bits, even and odd bytes apart.
JINN_INLINE i32x16::Part dot_part(u32x16::Part w, uint32_t a) {
  typedef int16_t Halves __attribute__((vector_size(sizeof(w))));
  const auto bytes = [a](int byte) { return static_cast<uint32_t>(static_cast<int8_t>(a >> (8 * byte))); };
  const u32x16::Part even_bytes = u32x16::Part{} + ((bytes(0) & 0xffffu) | (bytes(2) << 16));
  const u32x16::Part odd_bytes = u32x16::Part{} + ((bytes(1) & 0xffffu) | (bytes(3) << 16));
  const i32x16::Part even = (i32x16::Part)((Halves)(w & 0x00ff00ffu) * (Halves)even_bytes);
  const i32x16::Part odd = (i32x16::Part)((Halves)((w >> 8) & 0x00ff00ffu) * (Halves)odd_bytes);
  return ((even << 16 >> 16) + (even >> 16)) + ((odd << 16 >> 16) + (odd >> 16));
}
#endif

// The same four bytes in every lane. They are spread by the load: by way of a general register takes longer.
#if defined(JINN_AVX512)
typedef __m512i FourBytes;
JINN_INLINE FourBytes spread_bytes(const uint8_t* four) { return _mm512_broadcastd_epi32(_mm_loadu_si32(four)); }
#elif defined(JINN_AVX2)
typedef __m256i FourBytes;
JINN_INLINE FourBytes spread_bytes(const uint8_t* four) { return _mm256_broadcastd_epi32(_mm_loadu_si32(four)); }
#else
typedef uint32_t FourBytes;
JINN_INLINE FourBytes spread_bytes(const uint8_t* four) { return load_as<uint32_t>(four); }
#endif

// Sums of four products per lane: unsigned bytes of `w` with the four signed bytes of `a`.
JINN_INLINE i32x16 dot_u8s8(i32x16 sum, u32x16 w, FourBytes a) {
#if defined(JINN_AVX512)
  return (i32x16)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, a);
#elif defined(JINN_AVX2)
  return i32x16::each([&](int p) { return (i32x16::Part)dot_part((__m256i)sum.parts[p], (__m256i)w.parts[p], a); });
#else
  return i32x16::each([&](int p) { return sum.parts[p] + dot_part(w.parts[p], a); });
#endif
}

// A sum of products of words of bytes of so many bits, of at most kMaxWords words, that goes on from `start`.
template <int Bits>
struct Products {
  static constexpr int kMaxWords = 1 << 20;
  i32x16 start = {};

  void add(u32x16 w, FourBytes a) { start = dot_u8s8(start, w, a); }
  i32x16 total() const { return start; }
};
#if defined(JINN_AVX2) && !defined(JINN_AVX_VNNI)
// As many words as 16 bits hold the sums of.
template <int Bits>
  requires(Bits < 8)
struct Products<Bits> {
  static constexpr int kMaxWords = 32767 / (2 * 128 * ((1 << Bits) - 1));
  i32x16 start = {};
  __m256i sums[i32x16::kParts] = {};

  void add(u32x16 w, FourBytes a) {
    for (int p = 0; p < i32x16::kParts; ++p) {
      sums[p] = _mm256_add_epi16(sums[p], _mm256_maddubs_epi16((__m256i)w.parts[p], a));
    }
  }
  i32x16 total() const {
    const __m256i ones = _mm256_set1_epi16(1);
    return i32x16::each([&](int p) { return start.parts[p] + (i32x16::Part)_mm256_madd_epi16(sums[p], ones); });
  }
};
#endif

JINN_INLINE float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu, fraction = half & 0x3ffu;
  if (exponent == 0) {  // zero and subnormals: fraction * 2^-24
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  const uint32_t biased = exponent == 31 ? 255 : exponent + 112;
  return bit_cast<float>(sign | (biased << 23) | (fraction << 13));
}

JINN_INLINE u32x16 load_u16(const uint8_t* from) {
  typedef uint16_t u16x16 __attribute__((vector_size(32)));
  return convert<u32x16>(load_as<u16x16>(from));
}

#if !defined(JINN_AVX512) && !defined(JINN_AVX2)
// The same for each word. The factor moves the exponent, of subnormal numbers too.
JINN_INLINE f32x16 half_bits_to_float(u32x16 halves) {
  const u32x16 sign = (halves & 0x8000u) << 16, magnitude = (halves & 0x7fffu) << 13;
  const u32x16 finite = bit_cast<u32x16>(bit_cast<f32x16>(magnitude) * 0x1p112f);
  const i32x16 is_finite = (i32x16)magnitude < 0x0f800000;
  return bit_cast<f32x16>(sign | select(is_finite, finite, magnitude | 0x7f800000u));
}
#endif

JINN_INLINE f32x16 load_f16(const uint16_t* from) {
#if defined(JINN_AVX512)
  return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(JINN_AVX2)
  return f32x16::each([from](int p) {
    return (f32x16::Part)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + p));
  });
#else
  return half_bits_to_float(load_u16(reinterpret_cast<const uint8_t*>(from)));
#endif
}

// Each byte of `words`, which is below 16, is replaced by that byte of the table.
JINN_INLINE u32x16 look_up(const uint8_t (&table)[16], u32x16 words) {
#if defined(JINN_AVX512)
  const __m512i tables = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  return (u32x16)_mm512_shuffle_epi8(tables, (__m512i)words);
#elif defined(JINN_AVX2)
  const __m256i tables = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  return u32x16::each([&](int p) { return (u32x16::Part)_mm256_shuffle_epi8(tables, (__m256i)words.parts[p]); });
#else
  uint8_t bytes[sizeof(words)];
  std::memcpy(bytes, &words, sizeof(words));
  for (uint8_t& byte : bytes) byte = table[byte];
  return load_as<u32x16>(bytes);
#endif
}

// Words hold two half or bfloat16 numbers each.
JINN_INLINE f32x16 f16_low(u32x16 words) {
#if defined(JINN_AVX512)
  return (f32x16)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)words));
#elif defined(JINN_AVX2)
  typedef uint16_t u16x16 __attribute__((vector_size(32)));
  const u16x16 halves = convert<u16x16>(words & 0xffffu);
  return load_f16(reinterpret_cast<const uint16_t*>(&halves));
#else
  return half_bits_to_float(words & 0xffffu);
#endif
}
JINN_INLINE f32x16 f16_high(u32x16 words) { return f16_low(words >> 16); }
JINN_INLINE f32x16 bf16_low(u32x16 words) { return bit_cast<f32x16>(words << 16); }
JINN_INLINE f32x16 bf16_high(u32x16 words) { return bit_cast<f32x16>(words & 0xffff0000u); }

JINN_INLINE float bf16_to_float(uint16_t x) { return bit_cast<float>(static_cast<uint32_t>(x) << 16); }

// Round to nearest, ties to even; NaN stays NaN.
JINN_INLINE uint16_t float_to_bf16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Nearest integer, ties to even, for |x| < 2^22.
JINN_INLINE f32x16 round_to_integer(f32x16 x) {
  const f32x16 magic = set1(0x1.8p23f);
  return (x + magic) - magic;
}

// e^x to 2 ulp for x in [-87, 88]; below, 0. Range reduction by ln 2 in two parts, then a polynomial of degree 6
// (Cephes expf).
JINN_INLINE f32x16 exp(f32x16 x) {
  const f32x16 n = round_to_integer(max(x, set1(-104.0f)) * 1.44269504088896341f);
  f32x16 r = fma(n, set1(-0.693359375f), max(x, set1(-104.0f)));
  r = fma(n, set1(2.12194440e-4f), r);
  f32x16 p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
#if defined(JINN_AVX512)
  return (f32x16)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)x, (__m512)set1(-87.0f), _CMP_NLT_UQ), (__m512)p,
                                        (__m512)n);
#else
  const i32x16 exponent = convert<i32x16>(n);
  const f32x16 scaled = p * bit_cast<f32x16>((exponent + 127) << 23);
  return select(x < set1(-87.0f), f32x16{}, scaled);
#endif
}

JINN_INLINE float exp(float x) { return exp(set1(x))[0]; }

JINN_INLINE f32x16 sigmoid(f32x16 x) { return 1.0f / (1.0f + exp(min(-x, set1(88.0f)))); }

}  // namespace jinn::JINN_ISA
