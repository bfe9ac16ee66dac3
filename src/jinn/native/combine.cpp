// The sum of each token's experts.
#include "kernels.h"
#include "ops.h"
#include "vec.h"

namespace jinn::JINN_ISA {

void combine(Matrix x, const int32_t* places, Matrix weights, Matrix out, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const int32_t* from = places + row * weights.cols;
    const float* weight = weights.row(row);
    for (int64_t col = 0; col < out.cols; col += kLanes) {
      const int count = static_cast<int>(out.cols - col < kLanes ? out.cols - col : kLanes);
      f32x16 sum{};
      for (int64_t rank = 0; rank < weights.cols; ++rank) {
        sum = fma(set1(weight[rank]), load_part(x.row(from[rank]) + col, count), sum);
      }
      store_part(out.row(row) + col, sum, count);
    }
  }
}

}  // namespace jinn::JINN_ISA
