#include "sample.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>

namespace jinn {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

bool is_allowed(const SampleRequest& request, int32_t id) {
  return request.allowed[static_cast<size_t>(id) / 32] >> (id % 32) & 1u;
}

// The ids below `vocab_size` that are allowed, ascending.
std::vector<int32_t> allowed_ids(const SampleRequest& request, int64_t vocab_size) {
  std::vector<int32_t> ids;
  for (size_t word = 0; word < request.allowed.size(); ++word)
    for (uint32_t bits = request.allowed[word]; bits != 0; bits &= bits - 1)
      ids.push_back(static_cast<int32_t>(word * 32) + std::countr_zero(bits));
  while (!ids.empty() && ids.back() >= vocab_size) ids.pop_back();
  return ids;
}

// Keeps what is allowed and not banned; the ban gives way where it would leave nothing.
void restrict_to_allowed(float* x, int64_t vocab_size, const SampleRequest& request) {
  std::vector<float> kept(static_cast<size_t>(vocab_size), kNever);
  const auto& banned = request.banned_ids;
  const std::vector<int32_t> ids = allowed_ids(request, vocab_size);
  for (const int32_t id : ids) kept[static_cast<size_t>(id)] = x[id];
  const auto num_banned =
      std::count_if(banned.begin(), banned.end(), [&](int32_t id) { return is_allowed(request, id); });
  if (num_banned < static_cast<std::ptrdiff_t>(ids.size()))
    for (const int32_t id : banned) kept[static_cast<size_t>(id)] = kNever;
  std::copy(kept.begin(), kept.end(), x);
}

void adjust(float* x, int64_t vocab_size, const SampleRequest& request) {
  if (!request.allowed.empty()) {
    restrict_to_allowed(x, vocab_size, request);
  } else {
    for (const int32_t id : request.banned_ids) x[id] = kNever;
  }
  for (size_t i = 0; i < request.bias_ids.size(); ++i) x[request.bias_ids[i]] += request.bias[i];
  for (size_t i = 0; i < request.seen_ids.size(); ++i) {
    float& value = x[request.seen_ids[i]];
    value = value > 0.0f ? value / request.repetition_penalty : value * request.repetition_penalty;
    const int32_t count = request.output_counts[i];
    if (count == 0) continue;
    value -= request.presence_penalty;
    value -= request.frequency_penalty * static_cast<float>(count);
  }
}

// Orders ids by x, best first, the lower id first among equals.
auto by_value(const float* x) {
  return [x](int32_t a, int32_t b) { return x[a] > x[b] || (x[a] == x[b] && a < b); };
}

// The ids of the `count` largest of x[ids], best first, the lower id first among equals.
std::vector<int32_t> largest(const float* x, std::vector<int32_t> ids, size_t count) {
  count = std::min(count, ids.size());
  const auto end = ids.begin() + static_cast<std::ptrdiff_t>(count);
  std::nth_element(ids.begin(), end, ids.end(), by_value(x));
  ids.resize(count);
  std::sort(ids.begin(), ids.end(), by_value(x));
  return ids;
}

std::vector<int32_t> all_ids(int64_t vocab_size) {
  std::vector<int32_t> ids(static_cast<size_t>(vocab_size));
  std::iota(ids.begin(), ids.end(), 0);
  return ids;
}

// A superset of the `count` largest: everything from the smallest of a first guess up.
std::vector<int32_t> top_ids(const float* x, int64_t vocab_size, size_t count) {
  count = std::min(count, static_cast<size_t>(vocab_size));
  if (count == 0) return {};
  std::vector<float> first(x, x + count);
  const float guess = *std::min_element(first.begin(), first.end());
  std::vector<int32_t> ids;
  float threshold = guess;
  for (int64_t i = 0; i < vocab_size; ++i) {
    if (!(x[i] >= threshold)) continue;
    ids.push_back(static_cast<int32_t>(i));
    if (ids.size() < 8 * count + 64) continue;
    ids = largest(x, std::move(ids), count);
    threshold = x[ids.back()];
  }
  return largest(x, std::move(ids), count);
}

double total(const std::vector<int32_t>& ids, const float* weights) {
  double sum = 0;
  for (const int32_t id : ids) sum += weights[id];
  return sum;
}

// How many of the heaviest ids first reach `wanted`; moves them to the front. Halves the part that the edge lies in, so
// that only a few are ever sorted.
size_t reach(std::vector<int32_t>& ids, const float* weights, double wanted) {
  auto first = ids.begin(), last = ids.end();
  double sum = 0;
  while (last - first > 64) {
    const auto middle = first + (last - first) / 2;
    std::nth_element(first, middle, last, by_value(weights));
    const double half = std::accumulate(first, middle, 0.0, [&](double s, int32_t id) { return s + weights[id]; });
    if (sum + half >= wanted) {
      last = middle;
    } else {
      sum += half;
      first = middle;
    }
  }
  std::sort(first, last, by_value(weights));
  while (first != last && sum < wanted) sum += weights[*first++];
  return static_cast<size_t>(first - ids.begin());
}

// The heaviest ids whose sum first reaches top_p of all, in ascending order.
std::vector<int32_t> nucleus(std::vector<int32_t> ids, const float* weights, float top_p) {
  const double wanted = static_cast<double>(top_p) * total(ids, weights);
  std::vector<int32_t> heavy;  // mostly a handful holds nearly all
  std::copy_if(ids.begin(), ids.end(), std::back_inserter(heavy), [&](int32_t id) { return weights[id] >= 1e-3f; });
  if (total(heavy, weights) >= wanted) ids = std::move(heavy);
  ids.resize(std::max<size_t>(reach(ids, weights, wanted), 1));
  std::sort(ids.begin(), ids.end());
  return ids;
}

int32_t draw(const Kernels& kernels, const float* x, int64_t vocab_size, float maximum, const SampleRequest& request) {
  std::vector<float> weights(static_cast<size_t>(vocab_size));
  const float temperature = std::max(request.temperature, std::numeric_limits<float>::min());  // a finite inverse
  kernels.exp_scaled(x, vocab_size, maximum, 1.0f / temperature, weights.data());
  std::vector<int32_t> ids;
  const bool has_top_k = request.top_k > 0 && request.top_k < vocab_size;
  if (!request.allowed.empty()) {
    ids = allowed_ids(request, vocab_size);
    if (has_top_k) ids = largest(x, std::move(ids), static_cast<size_t>(request.top_k));
  } else {
    ids = has_top_k ? top_ids(x, vocab_size, static_cast<size_t>(request.top_k)) : all_ids(vocab_size);
  }
  if (has_top_k) std::sort(ids.begin(), ids.end());
  if (request.min_p > 0.0f)
    std::erase_if(ids, [&](int32_t id) { return weights[static_cast<size_t>(id)] < request.min_p; });
  if (request.top_p < 1.0f) ids = nucleus(std::move(ids), weights.data(), request.top_p);
  const double target = uniform(request.seed, request.position) * total(ids, weights.data());
  double running = 0;
  int32_t last_possible = ids.front();
  for (const int32_t id : ids) {
    running += weights[static_cast<size_t>(id)];
    if (weights[static_cast<size_t>(id)] > 0.0f) last_possible = id;
    if (running > target) return id;
  }
  return last_possible;
}

}  // namespace

double uniform(uint64_t seed, uint64_t position) {
  const uint64_t state = mix(seed) + (position + 1) * 0x9E3779B97F4A7C15u;
  return static_cast<double>(mix(state) >> 11) * 0x1p-53;
}

Sampled sample(const Kernels& kernels, float* logits, int64_t vocab_size, const SampleRequest& request) {
  Sampled sampled;
  float maximum;
  if (!kernels.find_maximum(logits, vocab_size, &maximum)) return sampled;
  float log_sum = 0.0f;
  std::vector<float> raw;
  if (request.num_logprobs >= 0) {
    log_sum = kernels.log_sum_exp(logits, vocab_size, maximum);
    sampled.top_ids = top_ids(logits, vocab_size, static_cast<size_t>(request.num_logprobs));
    for (const int32_t id : sampled.top_ids) sampled.top_logprobs.push_back(logits[id] - log_sum);
    raw.assign(logits, logits + vocab_size);
  }
  adjust(logits, vocab_size, request);
  kernels.find_maximum(logits, vocab_size, &maximum);
  if (maximum == kNever) return sampled;
  if (request.temperature == 0.0f) {
    sampled.token_id = static_cast<int32_t>(std::find(logits, logits + vocab_size, maximum) - logits);
  } else {
    sampled.token_id = draw(kernels, logits, vocab_size, maximum, request);
  }
  if (request.num_logprobs >= 0) sampled.logprob = raw[static_cast<size_t>(sampled.token_id)] - log_sum;
  return sampled;
}

}  // namespace jinn
