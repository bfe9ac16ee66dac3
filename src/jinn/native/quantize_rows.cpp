// Activations as the weights read them.
#include "kernels.h"
#include "ops.h"
#include "vec.h"

namespace jinn::JINN_ISA {
namespace {

// What shares a scale.
struct Group {
  f32x16 low, high;

  explicit Group(const float* x) : low(load(x)), high(load(x + kLanes)) {}

  float largest_magnitude() const { return reduce_max(max(max(low, -low), max(high, -high))); }

  // Whether the square of the largest number is more than half of the sum of squares: the others then have few of the
  // steps of 8 bits.
  bool has_outlier(float largest) const { return 2.0f * (largest * largest) > reduce_add(low * low + high * high); }

  // Puts 0 in the place of the one number of that magnitude; returns its column.
  int take(float magnitude) {
    const i32x16 in_low = max(low, -low) == set1(magnitude), in_high = max(high, -high) == set1(magnitude);
    low = select(in_low, f32x16{}, low);
    high = select(in_high, f32x16{}, high);
    return reduce_add((in_low & lane_numbers()) + (in_high & (lane_numbers() + kLanes)));
  }
};

// Sixteen codes, x * inverse to the nearest, ties to even; returns their sum. Low halves come a group later.
template <bool HasLow>
int32_t quantize_half(f32x16 x, float inverse, int8_t* out) {
  const f32x16 rounded = round_to_integer(x * inverse);
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

// code = round(x * (127 / max |x|)) and scale = max |x| / 127; 2032 in place of 127 for 12 bits.
template <ActivationType Type>
void quantize_integer(const float* x, int64_t cols, Activations out, int64_t row) {
  constexpr bool kHasLow = Type == ActivationType::Int12;
  constexpr float kLevels = kHasLow ? 127.0f * kHigh : 127.0f;
  int8_t* codes = reinterpret_cast<int8_t*>(out.codes(row));
  for (int64_t g = 0; g < cols / kGroup; ++g, codes += kActivationRows * out.group_bytes()) {
    const int64_t at = g * kActivationRows;
    Group group(x + g * kGroup);
    float largest = group.largest_magnitude();
    if constexpr (Type == ActivationType::Mixed) {
      int count = 0;
      for (; count < kMaxOutliers && group.has_outlier(largest); ++count) {
        const int col = group.take(largest);
        out.outlier_cols(row, count)[at] = static_cast<uint8_t>(col);
        out.outliers(row, count)[at] = x[g * kGroup + col];
        largest = group.largest_magnitude();
      }
      for (; count < kMaxOutliers; ++count) out.outliers(row, count)[at] = 0.0f;
    }
    const float inverse = largest > 0.0f ? kLevels / largest : 0.0f;
    const int32_t first_half = quantize_half<kHasLow>(group.low, inverse, codes);
    const int32_t sum = first_half + quantize_half<kHasLow>(group.high, inverse, codes + kLanes);
    out.scales(row)[at] = largest / kLevels;
    out.sums(row)[at] = sum;
    out.half_sums(row)[at] = first_half;
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
