// Which experts each token takes, and with what weight.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "ops.h"
#include "vec.h"

namespace jinn::JINN_ISA {
namespace {

constexpr float kTinySum = 1e-20f;

// y, or NaN where x is, which exp and sigmoid do not keep.
JINN_INLINE f32x16 keep_nan(f32x16 x, f32x16 y) { return select(x == x, y, x); }

void softmax(const float* x, int64_t n, float* out) {
  float largest = x[0], sum = 0.0f;
  for (int64_t i = 1; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int count = static_cast<int>(n - i < kLanes ? n - i : kLanes);
    const f32x16 difference = load_part(x + i, count) - largest;
    const f32x16 e = select(lanes_below(count), keep_nan(difference, exp(difference)), f32x16{});
    sum += reduce_add(e);
    store_part(out + i, e, count);
  }
  for (int64_t i = 0; i < n; ++i) out[i] /= sum;
}

void sigmoids(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int count = static_cast<int>(n - i < kLanes ? n - i : kLanes);
    const f32x16 logit = load_part(x + i, count);
    store_part(out + i, keep_nan(logit, sigmoid(logit)), count);
  }
}

// The columns of the largest `count` numbers, best first; ties go to the lower column, and NaN ranks last.
void find_best(const float* x, int64_t n, int count, int32_t* best) {
  const auto is_better = [&](int64_t a, int32_t b) { return x[a] > x[b] || (std::isnan(x[b]) && !std::isnan(x[a])); };
  int found = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (found == count && !is_better(i, best[count - 1])) continue;
    int at = found < count ? found++ : count - 1;
    for (; at > 0 && is_better(i, best[at - 1]); --at) best[at] = best[at - 1];
    best[at] = static_cast<int32_t>(i);
  }
}

float sum_of_two_best(const float* x, int64_t n) {
  int32_t best[2];
  find_best(x, n, 2, best);
  return x[best[0]] + x[best[1]];
}

// Sets the experts of groups that may not be chosen from to -inf.
void hide_groups(const RouteSpec& spec, float* ranking, int64_t num_experts) {
  const int64_t group_size = num_experts / spec.num_groups;
  std::vector<float> sums;
  for (int g = 0; g < spec.num_groups; ++g) sums.push_back(sum_of_two_best(ranking + g * group_size, group_size));
  std::vector<int32_t> chosen(static_cast<size_t>(spec.num_chosen_groups));
  find_best(sums.data(), spec.num_groups, spec.num_chosen_groups, chosen.data());
  for (int g = 0; g < spec.num_groups; ++g) {
    if (std::find(chosen.begin(), chosen.end(), g) != chosen.end()) continue;
    std::fill_n(ranking + g * group_size, group_size, -INFINITY);
  }
}

void weigh(const RouteSpec& spec, const float* scores, const int32_t* ids, float* weights) {
  float sum = 0.0f;
  for (int i = 0; i < spec.num_experts_per_tok; ++i) sum += scores[ids[i]];
  for (int i = 0; i < spec.num_experts_per_tok; ++i) {
    const float weight = spec.is_renormalized ? scores[ids[i]] / (sum + kTinySum) : scores[ids[i]];
    weights[i] = weight * spec.scaling;
  }
}

}  // namespace

void route(const RouteSpec& spec, Matrix logits, const RouteOutput& out, int64_t first, int64_t last) {
  const int64_t num_experts = logits.cols;
  std::vector<float> ranking(static_cast<size_t>(num_experts));
  for (int64_t row = first; row < last; ++row) {
    float* scores = out.scores.row(row);
    int32_t* ids = reinterpret_cast<int32_t*>(out.ids.row(row));
    (spec.is_sigmoid ? sigmoids : softmax)(logits.row(row), num_experts, scores);
    for (int64_t e = 0; e < num_experts; ++e) {
      ranking[static_cast<size_t>(e)] = spec.bias ? scores[e] + spec.bias[e] : scores[e];
    }
    if (spec.num_groups > 1) hide_groups(spec, ranking.data(), num_experts);
    find_best(ranking.data(), num_experts, spec.num_experts_per_tok, ids);
    weigh(spec, scores, ids, out.weights.row(row));
  }
}

}  // namespace jinn::JINN_ISA
