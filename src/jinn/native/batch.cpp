#include "batch.h"

#include <stdexcept>
#include <string>
#include <vector>

namespace jinn {
namespace {

void expect(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(std::string("[batch] ") + what);
}

void check_sequence(const BatchView& batch, int64_t s, const KVCache& cache) {
  const SequenceView sequence = batch.sequence(s);
  expect(sequence.num_tokens > 0 && sequence.context_len >= sequence.num_tokens, "empty sequence");
  const int64_t blocks = (sequence.context_len + cache.block_size() - 1) / cache.block_size();
  expect(blocks <= batch.max_blocks, "block table shorter than the context");
  for (int64_t i = 0; i < blocks; ++i) {
    expect(sequence.block_table[i] >= 0 && sequence.block_table[i] < cache.num_blocks(), "no such block");
  }
  for (int64_t i = 0; i < sequence.num_tokens; ++i) {
    expect(batch.positions[sequence.first_token + i] == sequence.context_len - sequence.num_tokens + i,
           "positions of a sequence are not consecutive up to its context");
  }
}

void check_states(const BatchView& batch, const StateCache& states) {
  expect(batch.state_slots, "expected a state slot per sequence");
  std::vector<bool> is_taken(static_cast<size_t>(states.num_slots()));
  for (int64_t s = 0; s < batch.num_seqs; ++s) {
    const int64_t slot = batch.state_slots[s], drafts = batch.num_drafts[s], accepted = batch.num_accepted[s];
    const SequenceView sequence = batch.sequence(s);
    expect(slot >= 0 && slot < states.num_slots(), "no such state slot");
    expect(!is_taken[static_cast<size_t>(slot)], "two sequences share a state slot");
    is_taken[static_cast<size_t>(slot)] = true;
    expect(drafts >= 0 && drafts <= states.max_drafts() && drafts <= sequence.num_tokens,
           "more drafts than tokens, or than the states keep aside");
    const int64_t start = sequence.context_len - sequence.num_tokens;
    expect(accepted >= 0 && (accepted == 0 || (start > 0 && accepted <= states.progress(slot).num_drafts)),
           "more drafts accepted than were kept aside");
    expect(start == 0 || states.progress(slot).num_tokens + accepted == start,
           "a sequence does not go on where its state slot ends");
  }
}

}  // namespace

std::vector<AdapterRun> BatchView::adapter_runs() const {
  std::vector<AdapterRun> runs;
  for (int64_t s = 0; adapters && s < num_seqs; ++s) {
    if (adapters[s] < 0) continue;
    if (!runs.empty() && runs.back().adapter == adapters[s] && runs.back().last_row == query_start[s]) {
      runs.back().last_row = query_start[s + 1];
    } else {
      runs.push_back({adapters[s], query_start[s], query_start[s + 1]});
    }
  }
  return runs;
}

void check_batch(const BatchView& batch, const KVCache& cache, const StateCache* states, int64_t vocab_size,
                 int64_t num_adapters) {
  expect(batch.query_start[0] == 0 && batch.query_start[batch.num_seqs] == batch.num_tokens,
         "query_start does not cover the tokens");
  for (int64_t i = 0; i < batch.num_tokens; ++i) {
    expect(batch.token_ids[i] >= 0 && batch.token_ids[i] < vocab_size, "token id outside the vocabulary");
  }
  for (int64_t s = 0; s < batch.num_seqs; ++s) check_sequence(batch, s, cache);
  for (int64_t i = 0; i < batch.num_rows; ++i) {
    expect(batch.logit_rows[i] >= 0 && batch.logit_rows[i] < batch.num_tokens, "logit row out of range");
  }
  for (int64_t s = 0; batch.adapters && s < batch.num_seqs; ++s) {
    expect(batch.adapters[s] >= -1 && batch.adapters[s] < num_adapters, "no such adapter");
  }
  if (states) check_states(batch, *states);
}

}  // namespace jinn
