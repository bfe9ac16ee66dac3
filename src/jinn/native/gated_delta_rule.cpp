// The gated delta rule on a slice of one value head's state, token by token.
//
// A column of the state never meets another, so a slice may be computed anywhere. Sums over key_dim have two parts,
// even and odd rows, added at the end.
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "ops.h"
#include "vec.h"

namespace jinn::JINN_ISA {
namespace {

constexpr float kNormEps = 1e-6f;

float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

// x * scale / sqrt(sum of x^2 + eps)
void normalize(const float* x, int64_t n, float scale, float* out) {
  f32x16 sum{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const f32x16 part = load_part(x + i, static_cast<int>(n - i < kLanes ? n - i : kLanes));
    sum = fma(part, part, sum);
  }
  const float factor = scale / std::sqrt(reduce_add(sum) + kNormEps);
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * factor;
}

// State rows are V vectors wide.
template <int V>
class Rule {
 public:
  explicit Rule(const DeltaRulePiece& piece)
      : piece_(piece), key_dim_(piece.slice.key_dim), query_(static_cast<size_t>(key_dim_)) {}

  void run() {
    const StateStep& step = piece_.step;
    float* state = piece_.slice.state;
    const size_t bytes = sizeof(float) * static_cast<size_t>(key_dim_ * V * kLanes);
    if (step.is_first) std::memset(state, 0, bytes);
    for (int64_t i = 0; i < step.num_accepted; ++i) take_in(state, piece_.slice.update(i));
    alignas(64) float delta[V * kLanes];
    float decay;
    std::vector<float> key(static_cast<size_t>(key_dim_));
    for (int64_t t = 0; t < step.num_taken_in; ++t) {
      token(state, step.first_token + t, {key.data(), delta, &decay});
    }
    if (step.num_drafts == 0) return;
    std::vector<float> drafted(state, state + key_dim_ * V * kLanes);
    for (int64_t i = 0; i < step.num_drafts; ++i) {
      token(drafted.data(), step.first_token + step.num_taken_in + i, piece_.slice.update(i));
    }
  }

 private:
  static void load_row(const float* from, f32x16 (&row)[V]) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = load(from + v * kLanes);
  }

  // The row after decay and update.
  static f32x16 updated(f32x16 row, f32x16 decay, f32x16 key, f32x16 delta) { return fma(key, delta, row * decay); }

  void take_in(float* state, const StateUpdate& update) const {
    const f32x16 decay = set1(*update.decay);
    f32x16 delta[V];
    load_row(update.delta, delta);
    for (int64_t i = 0; i < key_dim_; ++i, state += V * kLanes) {
      const f32x16 key = set1(update.key[i]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        store(state + v * kLanes, updated(load(state + v * kLanes), decay, key, delta[v]));
      }
    }
  }

  // Takes the token into `state`, writes its output, and leaves its update in `update`.
  void token(float* state, int64_t token, const StateUpdate& update) {
    normalize(piece_.q.row(token), key_dim_, 1.0f / std::sqrt(static_cast<float>(key_dim_)), query_.data());
    normalize(piece_.k.row(token), key_dim_, 1.0f, update.key);
    *update.decay = std::exp(-piece_.decay_rate * softplus(piece_.a.row(token)[0] + piece_.dt_bias));
    store_delta(state, token, update);
    store_output(state, token, update);
  }

  // delta = sigmoid(b) * (v - decayed state.T key)
  void store_delta(const float* state, int64_t token, const StateUpdate& update) const {
    f32x16 sums[2][V] = {};
    for (int64_t i = 0; i + 1 < key_dim_; i += 2, state += 2 * V * kLanes) {
      add_row(state, update.key[i], sums[0]);
      add_row(state + V * kLanes, update.key[i + 1], sums[1]);
    }
    if (key_dim_ % 2) add_row(state, update.key[key_dim_ - 1], sums[0]);
    const f32x16 beta = sigmoid(set1(piece_.b.row(token)[0])), decay = set1(*update.decay);
    for (int v = 0; v < V; ++v) {
      const f32x16 value = load_part(piece_.v.row(token) + v * kLanes, columns(v));
      store(update.delta + v * kLanes, beta * (value - (sums[0][v] + sums[1][v]) * decay));
    }
  }

  JINN_INLINE void add_row(const float* row, float factor, f32x16 (&sums)[V]) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[v] = fma(set1(factor), load(row + v * kLanes), sums[v]);
  }

  // out = updated state.T query
  void store_output(float* state, int64_t token, const StateUpdate& update) const {
    const f32x16 decay = set1(*update.decay);
    f32x16 delta[V], sums[2][V] = {};
    load_row(update.delta, delta);
    for (int64_t i = 0; i + 1 < key_dim_; i += 2, state += 2 * V * kLanes) {
      update_row(state, i, update, decay, delta, sums[0]);
      update_row(state + V * kLanes, i + 1, update, decay, delta, sums[1]);
    }
    if (key_dim_ % 2) update_row(state, key_dim_ - 1, update, decay, delta, sums[0]);
    for (int v = 0; v < V; ++v) {
      store_part(piece_.out.row(token) + v * kLanes, sums[0][v] + sums[1][v], columns(v));
    }
  }

  void update_row(float* row, int64_t i, const StateUpdate& update, f32x16 decay, const f32x16 (&delta)[V],
                  f32x16 (&sums)[V]) const {
    const f32x16 key = set1(update.key[i]), query = set1(query_[static_cast<size_t>(i)]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const f32x16 now = updated(load(row + v * kLanes), decay, key, delta[v]);
      store(row + v * kLanes, now);
      sums[v] = fma(query, now, sums[v]);
    }
  }

  // Of vector v; the rest is padding.
  int columns(int v) const {
    const int64_t left = piece_.v.cols - v * kLanes;
    return static_cast<int>(left < kLanes ? left : kLanes);
  }

  const DeltaRulePiece& piece_;
  int64_t key_dim_;
  std::vector<float> query_;
};

}  // namespace

void gated_delta_rule(const DeltaRulePiece& piece) {
  switch (piece.slice.width / kLanes) {
    case 1:
      return Rule<1>(piece).run();
    case 2:
      return Rule<2>(piece).run();
    case 3:
      return Rule<3>(piece).run();
    default:
      return Rule<4>(piece).run();
  }
}

}  // namespace jinn::JINN_ISA
