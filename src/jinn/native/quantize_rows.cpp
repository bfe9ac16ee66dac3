// Activations as the weights read them.
#include "kernels.h"
#include "ops.h"
#include "vec.h"

namespace jinn::JINN_ISA {
namespace {

float largest_magnitude(const float* x) {
  const f32x16 low = load(x), high = load(x + kLanes);
  return reduce_max(max(max(low, -low), max(high, -high)));
}

// Sixteen codes, x * inverse to the nearest, ties to even; returns their sum.
template <bool IsWide>
int32_t quantize_half(const float* x, float inverse, int8_t* out) {
  const f32x16 rounded = round_to_integer(load(x) * inverse);
  const i32x16 codes = convert<i32x16>(rounded);
  if constexpr (IsWide) {
    const i32x16 high = convert<i32x16>(round_to_integer(rounded * (1.0f / kHigh)));
    store_bytes(out, high);
    store_bytes(out + kGroup, codes - high * kHigh);
  } else {
    store_bytes(out, codes);
  }
  return reduce_add(codes);
}

// scale = max |x| / 127, code = round(x * (127 / max |x|)); 2032 in place of 127 for Int12.
template <bool IsWide>
void quantize_integer(const float* x, int64_t cols, Activations out, int64_t row) {
  constexpr float kLevels = IsWide ? 127.0f * kHigh : 127.0f;
  int8_t* codes = reinterpret_cast<int8_t*>(out.codes(row));
  for (int64_t g = 0; g < cols / kGroup; ++g, x += kGroup, codes += kActivationRows * out.group_bytes()) {
    const float largest = largest_magnitude(x);
    const float inverse = largest > 0.0f ? kLevels / largest : 0.0f;
    const int32_t half_sum = quantize_half<IsWide>(x, inverse, codes);
    const int32_t sum = half_sum + quantize_half<IsWide>(x + kLanes, inverse, codes + kLanes);
    const int64_t at = g * kActivationRows;
    out.scales(row)[at] = largest / kLevels;
    out.sums(row)[at] = sum;
    out.half_sums(row)[at] = half_sum;
    out.scaled_sums(row)[at] = out.scales(row)[at] * static_cast<float>(sum);
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
        quantize_integer<false>(x.row(row), x.cols, out, row);
        break;
      case ActivationType::Int12:
        quantize_integer<true>(x.row(row), x.cols, out, row);
        break;
    }
  }
}

}  // namespace jinn::JINN_ISA
