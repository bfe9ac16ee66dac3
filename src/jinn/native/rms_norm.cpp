// x / sqrt(mean(x^2) + eps) * weight over runs of `width` columns.
#include <cmath>

#include "kernels.h"
#include "ops.h"
#include "vec.h"

namespace jinn::JINN_ISA {
namespace {

float sum_of_squares(const float* x, int64_t n) {
  f32x16 sum{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum = fma(load(x + i), load(x + i), sum);
  if (i < n) {
    const f32x16 rest = load_part(x + i, static_cast<int>(n - i));
    sum = fma(rest, rest, sum);
  }
  return reduce_add(sum);
}

}  // namespace

void rms_norm(Matrix x, const float* weight, int64_t width, float eps, Matrix out, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    for (int64_t at = 0; at < x.cols; at += width) {
      const float* from = x.row(row) + at;
      float* to = out.row(row) + at;
      const float inverse = 1.0f / std::sqrt(sum_of_squares(from, width) / static_cast<float>(width) + eps);
      for (int64_t i = 0; i < width; ++i) to[i] = from[i] * inverse * weight[i];
    }
  }
}

}  // namespace jinn::JINN_ISA
