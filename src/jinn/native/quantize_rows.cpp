// Activations as the weights read them.
#include "kernels.h"
#include "ops.h"
#include "vec.h"

namespace jinn::JINN_ISA {
namespace {

// A group of 32: scale = max |x| / 127, code = x * (127 / max |x|) to the nearest, ties to even.
void quantize_group(const float* x, int8_t* codes, float& scale, float& scaled_sum, int32_t& sum) {
  const f32x16 low = load(x), high = load(x + kLanes);
  const float largest = reduce_max(max(max(low, -low), max(high, -high)));
  const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
  const i32x16 low_codes = __builtin_convertvector(round_to_integer(low * inverse), i32x16);
  const i32x16 high_codes = __builtin_convertvector(round_to_integer(high * inverse), i32x16);
  store_bytes(codes, low_codes);
  store_bytes(codes + kLanes, high_codes);
  sum = reduce_add(low_codes + high_codes);
  scale = largest / 127.0f;
  scaled_sum = scale * static_cast<float>(sum);
}

void quantize_int8(const float* x, Activations out, int64_t row) {
  int8_t* codes = reinterpret_cast<int8_t*>(out.codes(row));
  for (int64_t g = 0; g < out.cols / kGroup; ++g) {
    const int64_t at = g * kActivationRows;
    quantize_group(x + g * kGroup, codes + g * kGroup, out.scales(row)[at], out.scaled_sums(row)[at],
                   out.sums(row)[at]);
  }
}

void round_bf16_pairs(const float* x, Activations out, int64_t row) {
  uint16_t* to = reinterpret_cast<uint16_t*>(out.row(row));
  for (int64_t i = 0; i < out.cols; ++i) to[i] = float_to_bf16(x[i]);
  if (out.cols % 2) to[out.cols] = 0;
}

void copy_f32(const float* x, Activations out, int64_t row, bool round_to_bf16) {
  float* to = reinterpret_cast<float*>(out.row(row));
  for (int64_t i = 0; i < out.cols; ++i) to[i] = round_to_bf16 ? bf16_to_float(float_to_bf16(x[i])) : x[i];
}

}  // namespace

void quantize_rows(ActivationType type, bool round_to_bf16, Matrix x, Activations out, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    if (type == ActivationType::Int8) {
      quantize_int8(x.row(row), out, row);
    } else if (type == ActivationType::BF16) {
      round_bf16_pairs(x.row(row), out, row);
    } else {
      copy_f32(x.row(row), out, row, round_to_bf16);
    }
  }
}

}  // namespace jinn::JINN_ISA
