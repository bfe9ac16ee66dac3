// Ops that touch each number once: add, silu_mul.
#include "kernels.h"
#include "ops.h"
#include "vec.h"

namespace jinn::JINN_ISA {

void add(Matrix a, Matrix b, Matrix out, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    for (int64_t i = 0; i < out.cols; ++i) out.row(row)[i] = a.row(row)[i] + b.row(row)[i];
  }
}

void silu_mul(Matrix gate, Matrix up, Matrix out, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    int64_t i = 0;
    for (; i + kLanes <= out.cols; i += kLanes) {
      const f32x16 g = load(gate.row(row) + i);
      store(out.row(row) + i, g * sigmoid(g) * load(up.row(row) + i));
    }
    if (i < out.cols) {
      const int count = static_cast<int>(out.cols - i);
      const f32x16 g = load_part(gate.row(row) + i, count);
      store_part(out.row(row) + i, g * sigmoid(g) * load_part(up.row(row) + i, count), count);
    }
  }
}

}  // namespace jinn::JINN_ISA
