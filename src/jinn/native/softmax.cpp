// Passes over a row of logits, for sampling.
#include <cmath>

#include "kernels.h"
#include "ops.h"
#include "vec.h"

namespace jinn::JINN_ISA {

// The largest value; false if any is NaN or +inf, or all are -inf.
bool find_maximum(const float* x, int64_t n, float* maximum) {
  f32x16 largest = set1(-INFINITY);
  i32x16 is_bad{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const f32x16 v = load(x + i);
    largest = max(v, largest);
    is_bad |= ~(v < set1(INFINITY));
  }
  float m = reduce_max(largest);
  bool is_fine = true;
  for (int lane = 0; lane < kLanes; ++lane) is_fine = is_fine && is_bad[lane] == 0;
  for (; i < n; ++i) {
    m = x[i] > m ? x[i] : m;
    is_fine = is_fine && x[i] < INFINITY;
  }
  *maximum = m;
  return is_fine && m > -INFINITY;
}

// log(sum(exp(x))), x at most `maximum`.
float log_sum_exp(const float* x, int64_t n, float maximum) {
  f32x16 sum{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum = sum + exp(load(x + i) - maximum);
  float total = reduce_add(sum);
  for (; i < n; ++i) total += exp(x[i] - maximum);
  return maximum + std::log(total);
}

// exp((x - maximum) * inverse_temperature)
void exp_scaled(const float* x, int64_t n, float maximum, float inverse_temperature, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, exp((load(x + i) - maximum) * inverse_temperature));
  for (; i < n; ++i) out[i] = exp((x[i] - maximum) * inverse_temperature);
}

}  // namespace jinn::JINN_ISA
