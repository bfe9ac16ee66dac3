// The rows of an attention piece.
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
  float max, sum;  // M and L

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

}  // namespace jinn::JINN_ISA
