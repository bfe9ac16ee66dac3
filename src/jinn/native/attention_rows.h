// The rows of an attention piece, and how a row's partitions become one result.
#pragma once

#include <cmath>

#include "kernels.h"
#include "vec.h"

namespace jinn::JINN_ISA {

constexpr int kPartition = kAttentionPartition;

// A query row: one head of one token. It sees positions below `limit`.
struct AttentionRow {
  const float* query;
  float* output;
  int64_t limit;
  float max, sum;  // M and L; acc is in output

  // Takes a partition's m and l; `before` is exp(M - M') and `now` exp(m - M'), as for the values.
  void merge(float m, float l, float before, float now) {
    sum = sum * before + l * now;
    max = max > m ? max : m;
  }
};

JINN_INLINE int64_t num_rows(const AttentionPiece& piece) {
  return (piece.last_token - piece.first_token) * (piece.last_head - piece.first_head);
}

// Heads of one token follow each other.
JINN_INLINE AttentionRow row_at(const AttentionPiece& piece, int64_t index) {
  const KVLayer& layer = piece.cache->layer(piece.layer);
  const int64_t num_heads = piece.last_head - piece.first_head;
  const int64_t token = piece.first_token + index / num_heads, head = piece.first_head + index % num_heads;
  const int64_t first_position = piece.sequence.context_len - piece.sequence.num_tokens;
  return {piece.query.row(token) + head * layer.key_dim, piece.output.row(token) + head * layer.value_dim,
          first_position + (token - piece.sequence.first_token) + 1, -INFINITY, 0.0f};
}

// Keys that the row sees of the partition that starts at `start`.
JINN_INLINE int keys_from(const AttentionRow& row, int64_t start) {
  const int64_t left = row.limit - start;
  return static_cast<int>(left < 0 ? 0 : left > kPartition ? kPartition : left);
}

JINN_INLINE int64_t longest_limit(const AttentionRow* rows, int count) {
  int64_t longest = 0;
  for (int r = 0; r < count; ++r) longest = rows[r].limit > longest ? rows[r].limit : longest;
  return longest;
}

// acc = acc * exp(M - M') + partial * exp(m - M'), with M' the larger maximum.
struct MergeFactors {
  f32x16 before, now;
  bool is_first;
};

JINN_INLINE MergeFactors merge_factors(const AttentionRow& row, float m) {
  const float max = row.max > m ? row.max : m;
  return {set1(exp(row.max - max)), set1(exp(m - max)), row.max == -INFINITY};
}

JINN_INLINE void merge_values(float* acc, f32x16 partial, const MergeFactors& factors, int width) {
  const f32x16 old = factors.is_first ? f32x16{} : load_part(acc, width);
  store_part(acc, fma(partial, factors.now, old * factors.before), width);
}

// Calls partition(start), which merges one partition into the rows, for each that any row sees.
template <class F>
void for_each_partition(const AttentionPiece& piece, AttentionRow* rows, int count, F partition) {
  const int64_t longest = longest_limit(rows, count), value_dim = piece.cache->layer(piece.layer).value_dim;
  for (int64_t start = 0; start < longest; start += kPartition) partition(start);
  for (int r = 0; r < count; ++r) {
    const float inverse = 1.0f / rows[r].sum;
    for (int64_t i = 0; i < value_dim; ++i) rows[r].output[i] *= inverse;
  }
}

}  // namespace jinn::JINN_ISA
