// The packed tokens of one step, as ops/protocol.py's Batch has them.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "kv_cache.h"
#include "state_cache.h"

namespace jinn {

// Tokens of neighbouring sequences that go through one adapter.
struct AdapterRun {
  int64_t adapter, first_row, last_row;
};

struct BatchView {
  const int32_t* token_ids = nullptr;
  const int32_t* positions = nullptr;
  const int32_t* query_start = nullptr;
  const int32_t* context_lens = nullptr;
  const int32_t* block_tables = nullptr;
  const int32_t* logit_rows = nullptr;
  const int32_t* state_slots = nullptr;  // null, as the next two, where the model keeps no states
  const int32_t* num_drafts = nullptr;
  const int32_t* num_accepted = nullptr;
  Matrix hidden;                      // [tokens, hidden_size]
  const int32_t* adapters = nullptr;  // null where no sequence has one
  int64_t num_tokens = 0, num_seqs = 0, max_blocks = 0, num_rows = 0;

  SequenceView sequence(int64_t s) const {
    return {query_start[s], query_start[s + 1] - query_start[s], context_lens[s], block_tables + s * max_blocks};
  }
  StateStep state_step(int64_t s) const {
    const SequenceView view = sequence(s);
    return {view.first_token, view.num_tokens - num_drafts[s], num_drafts[s], num_accepted[s],
            view.context_len == view.num_tokens};
  }
  std::vector<AdapterRun> adapter_runs() const;
};

// Throws std::invalid_argument unless every index is in range and every sequence goes on where its cache ends. `states`
// is null for a program without recurrent states, `num_adapters` 0 for one without adapters.
void check_batch(const BatchView& batch, const KVCache& cache, const StateCache* states, int64_t vocab_size,
                 int64_t num_adapters);

}  // namespace jinn
