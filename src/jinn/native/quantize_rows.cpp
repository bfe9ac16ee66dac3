// Activations as the weights read them.
#include <cstring>

#include "kernels.h"
#include "ops.h"
#include "vec.h"

namespace jinn::JINN_ISA {
namespace {

float largest_magnitude(const float* x) {
  const f32x16 low = load(x), high = load(x + kLanes);
  return reduce_max(max(max(low, -low), max(high, -high)));
}

// Whether the square of a group's largest number is more than half of the sum of its squares: the others then have few
// of the steps of 8 bits.
bool has_outlier(const float* x, float largest) {
  const f32x16 low = load(x), high = load(x + kLanes);
  return 2.0f * largest * largest > reduce_add(low * low + high * high);
}

// Sixteen codes, x * inverse to the nearest, ties to even; returns their sum. Low halves come a group later.
template <bool HasLow>
int32_t quantize_half(const float* x, float inverse, int8_t* out) {
  const f32x16 rounded = round_to_integer(load(x) * inverse);
  const i32x16 codes = convert<i32x16>(rounded);
  if constexpr (HasLow) {
    const i32x16 high = convert<i32x16>(round_to_integer(rounded * (1.0f / kHigh)));
    store_bytes(out, high);
    store_bytes(out + kGroup, codes - high * kHigh);
  } else {
    store_bytes(out, codes);
  }
  return reduce_add(codes);
}

struct GroupSums {
  int32_t first_half, all;
};

// code = round(x * (127 / max |x|)); 2032 in place of 127 for 12 bits.
template <bool HasLow>
GroupSums quantize_group(const float* x, float largest, int8_t* codes) {
  constexpr float kLevels = HasLow ? 127.0f * kHigh : 127.0f;
  const float inverse = largest > 0.0f ? kLevels / largest : 0.0f;
  const int32_t first_half = quantize_half<HasLow>(x, inverse, codes);
  return {first_half, first_half + quantize_half<HasLow>(x + kLanes, inverse, codes + kLanes)};
}

// The codes of 12 bits, or of 8 bits times kHigh.
template <bool HasLow>
GroupSums quantize_wide_group(const float* x, float largest, int8_t* codes) {
  const GroupSums sums = quantize_group<HasLow>(x, largest, codes);
  if constexpr (HasLow) return sums;
  std::memset(codes + kGroup, 0, kGroup);
  return {kHigh * sums.first_half, kHigh * sums.all};
}

// scale = max |x| / 127, or 2032 where codes have low halves or may have them.
template <ActivationType Type>
void quantize_integer(const float* x, int64_t cols, Activations out, int64_t row) {
  constexpr float kLevels = is_wide(Type) ? 127.0f * kHigh : 127.0f;
  int8_t* codes = reinterpret_cast<int8_t*>(out.codes(row));
  for (int64_t g = 0; g < cols / kGroup; ++g, x += kGroup, codes += kActivationRows * out.group_bytes()) {
    const float largest = largest_magnitude(x);
    const int64_t at = g * kActivationRows;
    GroupSums sums;
    if constexpr (is_wide(Type)) {
      const bool has_low = Type == ActivationType::Int12 || has_outlier(x, largest);
      sums = (has_low ? quantize_wide_group<true> : quantize_wide_group<false>)(x, largest, codes);
      out.has_low(row)[at] = has_low;
    } else {
      sums = quantize_group<false>(x, largest, codes);
    }
    out.scales(row)[at] = largest / kLevels;
    out.sums(row)[at] = sums.all;
    out.half_sums(row)[at] = sums.first_half;
    out.scaled_sums(row)[at] = out.scales(row)[at] * static_cast<float>(sums.all);
  }
}

void round_bf16_pairs(const float* x, int64_t cols, Activations out, int64_t row) {
  uint16_t* to = reinterpret_cast<uint16_t*>(out.row(row));
  for (int64_t i = 0; i < cols; ++i) to[i] = float_to_bf16(x[i]);
  if (cols % 2) to[cols] = 0;
}

void copy_f32(const float* x, int64_t cols, Activations out, int64_t row, bool round_to_bf16) {
  float* to = reinterpret_cast<float*>(out.row(row));
  for (int64_t i = 0; i < cols; ++i) to[i] = round_to_bf16 ? bf16_to_float(float_to_bf16(x[i])) : x[i];
}

}  // namespace

void quantize_rows(bool round_to_bf16, Matrix x, Activations out, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    switch (out.type) {
      case ActivationType::F32:
        copy_f32(x.row(row), x.cols, out, row, round_to_bf16);
        break;
      case ActivationType::BF16:
        round_bf16_pairs(x.row(row), x.cols, out, row);
        break;
      case ActivationType::Int8:
        quantize_integer<ActivationType::Int8>(x.row(row), x.cols, out, row);
        break;
      case ActivationType::Mixed:
        quantize_integer<ActivationType::Mixed>(x.row(row), x.cols, out, row);
        break;
      case ActivationType::Int12:
        quantize_integer<ActivationType::Int12>(x.row(row), x.cols, out, row);
        break;
    }
  }
}

}  // namespace jinn::JINN_ISA
