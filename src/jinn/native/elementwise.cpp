// Ops that touch each number once: add, silu_mul, sigmoid_mul.
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

void sigmoid_mul(Matrix x, Matrix gate, Matrix out, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const f32x16 of_row = sigmoid(set1(gate.row(row)[0]));
    for (int64_t i = 0; i < out.cols; i += kLanes) {
      const int count = static_cast<int>(out.cols - i < kLanes ? out.cols - i : kLanes);
      const f32x16 factor = gate.cols == 1 ? of_row : sigmoid(load_part(gate.row(row) + i, count));
      store_part(out.row(row) + i, load_part(x.row(row) + i, count) * factor, count);
    }
  }
}

}  // namespace jinn::JINN_ISA
