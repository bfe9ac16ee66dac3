// Rotary positions: pairs (a, b) become (a cos - b sin, b cos + a sin).
#include "kernels.h"
#include "ops.h"
#include "vec.h"

namespace jinn::JINN_ISA {

void rope(const Rotation& rotation, Matrix x, Matrix out, int64_t first, int64_t last) {
  const int n = rotation.num_pairs;
  const int64_t head_dim = x.cols / rotation.num_heads;
  for (int64_t row = first; row < last; ++row) {
    const float* cos = rotation.table + row * 2 * n;
    const float* sin = cos + n;
    for (int head = 0; head < rotation.num_heads; ++head) {
      const float* from = x.row(row) + head * head_dim;
      float* to = out.row(row) + head * head_dim;
      for (int i = 0; i < n; ++i) {
        const int first_of_pair = rotation.is_interleaved ? 2 * i : i;
        const int second_of_pair = rotation.is_interleaved ? 2 * i + 1 : i + n;
        const float a = from[first_of_pair], b = from[second_of_pair];
        to[first_of_pair] = a * cos[i] - b * sin[i];
        to[second_of_pair] = b * cos[i] + a * sin[i];
      }
      for (int64_t i = 2 * n; i < head_dim; ++i) to[i] = from[i];
    }
  }
}

}  // namespace jinn::JINN_ISA
