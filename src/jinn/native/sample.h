// Drawing tokens from logits: the fast twin of engine/sampler.py.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace jinn {

struct SampleRequest {
  float temperature = 1.0f;
  int64_t top_k = 0;
  float top_p = 1.0f, min_p = 0.0f;
  float repetition_penalty = 1.0f, presence_penalty = 0.0f, frequency_penalty = 0.0f;
  uint64_t seed = 0, position = 0;
  int num_logprobs = -1;  // -1: none
  std::vector<int32_t> seen_ids, output_counts, banned_ids, bias_ids;
  std::vector<float> bias;
  std::vector<uint32_t> allowed;  // bit i % 32 of word i / 32 for id i; empty where every id may be drawn
};

struct Sampled {
  int32_t token_id = -1;  // -1 where the logits were not finite, or nothing was left to draw
  float logprob = 0.0f;
  std::vector<int32_t> top_ids;
  std::vector<float> top_logprobs;
};

// In [0, 1), from (seed, position) alone.
double uniform(uint64_t seed, uint64_t position);

// May overwrite `logits`.
Sampled sample(const Kernels& kernels, float* logits, int64_t vocab_size, const SampleRequest& request);

}  // namespace jinn
