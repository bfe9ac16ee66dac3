// Causal softmax attention over the paged cache.
//
// Keys and values are read only as stored. A row's positions fall into partitions of kPartition at fixed absolute
// positions. Within one: scores, their maximum m, p = exp(score - m), the sum l of p and the sum of p * value, key by
// key. Partitions are then merged in order into (M, L, acc). Nothing depends on what other rows are computed beside it,
// so one query and many give the same bits.
#include <cmath>

#include "kernels.h"
#include "ops.h"
#include "vec.h"

namespace jinn::JINN_ISA {
namespace {

constexpr int kPartition = 256;
constexpr int kMaxRows = 4;       // query rows that share one reading of keys and values
constexpr int kMaxValueVecs = 4;  // 64 columns of values at a time

// How a 32-bit word of the cache widens into 4 / size floats per lane.
struct WordF32 {
  static constexpr int kPer = 1;
  static constexpr bool kScaled = false;
  JINN_INLINE f32x16 part(u32x16 word, int) { return bit_cast<f32x16>(word); }
  JINN_INLINE uint32_t number(float x, float) { return bit_cast<uint32_t>(x); }
};
struct WordBF16 {
  static constexpr int kPer = 2;
  static constexpr bool kScaled = false;
  JINN_INLINE f32x16 part(u32x16 word, int i) { return i == 0 ? bf16_low(word) : bf16_high(word); }
  JINN_INLINE uint32_t number(float x, float) { return float_to_bf16(x); }
};
struct WordInt8 {
  static constexpr int kPer = 4;
  static constexpr bool kScaled = true;
  JINN_INLINE f32x16 part(u32x16 word, int i) { return to_float((i32x16)(word << (24 - 8 * i)) >> 24); }
  JINN_INLINE uint32_t number(float x, float inverse_scale) {
    return static_cast<uint8_t>(static_cast<int8_t>(std::nearbyint(x * inverse_scale)));
  }
};

float largest_magnitude(const float* x, int n) {
  float largest = 0.0f;
  for (int i = 0; i < n; ++i) largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
  return largest;
}

template <class Word>
JINN_INLINE void put(uint8_t* plane, int64_t word, int part, uint32_t bits) {
  constexpr int kBytes = 4 / Word::kPer;
  std::memcpy(plane + 4 * word + kBytes * part, &bits, kBytes);
}

// One head's key and value of one position.
template <class Word>
void store_position(uint8_t* head, const KVLayer& layer, int at, const float* k, const float* v) {
  float key_inverse = 0.0f, value_inverse = 0.0f;
  if constexpr (Word::kScaled) {
    const float key_largest = largest_magnitude(k, layer.key_dim);
    const float value_largest = largest_magnitude(v, layer.value_dim);
    key_inverse = key_largest > 0.0f ? 127.0f / key_largest : 0.0f;
    value_inverse = value_largest > 0.0f ? 127.0f / value_largest : 0.0f;
    reinterpret_cast<float*>(head + layer.key_scales)[at] = key_largest / 127.0f;
    reinterpret_cast<float*>(head + layer.value_scales)[at] = value_largest / 127.0f;
  }
  const int key_words = layer.key_dim / Word::kPer;
  for (int i = 0; i < layer.key_dim; ++i) {
    const int64_t word = (static_cast<int64_t>(at / kLanes) * key_words + i / Word::kPer) * kLanes + at % kLanes;
    put<Word>(head, word, i % Word::kPer, Word::number(k[i], key_inverse));
  }
  uint8_t* values = head + layer.values;
  for (int i = 0; i < layer.value_dim; ++i) {
    const int64_t word = static_cast<int64_t>(at / Word::kPer) * layer.value_dim + i;
    put<Word>(values, word, at % Word::kPer, Word::number(v[i], value_inverse));
  }
}

template <class Word>
void store_tokens(const KVCache& cache, int layer, const SequenceView& sequence, Matrix k, Matrix v, int64_t first,
                  int64_t last) {
  const KVLayer& l = cache.layer(layer);
  const int64_t offset = sequence.context_len - sequence.num_tokens - sequence.first_token;
  for (int64_t token = first; token < last; ++token) {
    const int64_t position = token + offset;
    const int in_block = static_cast<int>(position % cache.block_size());
    for (int h = 0; h < l.num_kv_heads; ++h) {
      uint8_t* head = cache.head(layer, sequence.block_table[position / cache.block_size()], h);
      store_position<Word>(head, l, in_block, k.row(token) + h * l.key_dim, v.row(token) + h * l.value_dim);
    }
  }
}

// A query row: one head of one token. It sees positions below `limit`.
struct Row {
  const float* query;
  float* output;
  int64_t limit;
  float max, sum;  // M and L; acc is in output
};

struct Partial {
  alignas(64) float scores[kMaxRows][kPartition];
  float max[kMaxRows], sum[kMaxRows];
};

template <class Word>
class Worker {
 public:
  explicit Worker(const AttentionPiece& piece)
      : piece_(piece), cache_(*piece.cache), layer_(cache_.layer(piece.layer)) {}

  void rows(Row* rows, int count) {
    int64_t longest = 0;
    for (int r = 0; r < count; ++r) {
      rows[r].max = -INFINITY;
      rows[r].sum = 0.0f;
      longest = rows[r].limit > longest ? rows[r].limit : longest;
    }
    for (int64_t start = 0; start < longest; start += kPartition) {
      switch (count) {
        case 1:
          partition<1>(rows, start);
          break;
        case 2:
          partition<2>(rows, start);
          break;
        case 3:
          partition<3>(rows, start);
          break;
        default:
          partition<4>(rows, start);
          break;
      }
    }
    for (int r = 0; r < count; ++r) {
      const float inverse = 1.0f / rows[r].sum;
      for (int i = 0; i < layer_.value_dim; ++i) rows[r].output[i] *= inverse;
    }
  }

 private:
  uint8_t* head_of(int64_t position) const {
    return cache_.head(piece_.layer, piece_.sequence.block_table[position / cache_.block_size()], piece_.kv_head);
  }

  template <int R>
  void partition(Row* rows, int64_t start) {
    int keys[R];  // of this partition, per row
    int most = 0;
    for (int r = 0; r < R; ++r) {
      const int64_t left = rows[r].limit - start;
      keys[r] = static_cast<int>(left < 0 ? 0 : left > kPartition ? kPartition : left);
      most = keys[r] > most ? keys[r] : most;
    }
    for (int at = 0; at < most;) {
      const int in_block = static_cast<int>((start + at) % cache_.block_size());
      const uint8_t* head = head_of(start + at);
      for (int lane = in_block; lane < cache_.block_size() && at < most; lane += kLanes, at += kLanes) {
        score_lanes<R>(rows, head, lane, at);
      }
    }
    for (int r = 0; r < R; ++r) softmax(keys[r], r);
    for (int col = 0; col < layer_.value_dim; col += kMaxValueVecs * kLanes) values<R>(rows, start, keys, col);
    for (int r = 0; r < R; ++r) {
      if (keys[r] == 0) continue;
      const float max = rows[r].max > partial_.max[r] ? rows[r].max : partial_.max[r];
      rows[r].sum = rows[r].sum * exp(rows[r].max - max) + partial_.sum[r] * exp(partial_.max[r] - max);
      rows[r].max = max;
    }
  }

  // Scores of 16 positions for R rows; even and odd columns are summed apart, then together.
  template <int R>
  void score_lanes(const Row* rows, const uint8_t* head, int in_block, int at) {
    const int key_words = layer_.key_dim / Word::kPer;
    const uint8_t* words = head + static_cast<int64_t>(in_block / kLanes) * key_words * 64;
    constexpr int kWords = Word::kPer == 1 ? 2 : 1;  // that make pairs of columns
    f32x16 sums[2][R] = {};
    for (int w = 0; w < key_words; w += kWords) {
#pragma GCC unroll 4
      for (int i = 0; i < kWords * Word::kPer; ++i) {
        const f32x16 key = Word::part(load_as<u32x16>(words + (w + i / Word::kPer) * 64), i % Word::kPer);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          sums[i % 2][r] = fma(key, set1(rows[r].query[w * Word::kPer + i]), sums[i % 2][r]);
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      f32x16 score = (sums[0][r] + sums[1][r]) * piece_.scale;
      if constexpr (Word::kScaled) score = score * load(scales(head, layer_.key_scales) + in_block);
      store(partial_.scores[r] + at, score);
    }
  }

  static const float* scales(const uint8_t* head, size_t offset) {
    return reinterpret_cast<const float*>(head + offset);
  }

  // scores become p = exp(score - max); lanes past the last key become 0.
  void softmax(int keys, int r) {
    float* scores = partial_.scores[r];
    f32x16 largest = set1(-INFINITY), sum{};
    for (int at = 0; at < keys; at += kLanes) {
      const f32x16 score = select(lanes_below(keys - at), load(scores + at), set1(-INFINITY));
      store(scores + at, score);
      largest = max(largest, score);
    }
    const float m = reduce_max(largest);
    for (int at = 0; at < keys; at += kLanes) {
      const f32x16 p = select(lanes_below(keys - at), exp(load(scores + at) - m), f32x16{});
      store(scores + at, p);
      sum = sum + p;
    }
    partial_.max[r] = m;
    partial_.sum[r] = reduce_add(sum);
  }

  // Adds p * value of this partition into the rows' outputs, for 64 columns from `col` on.
  template <int R>
  void values(Row* rows, int64_t start, const int* keys, int col) {
    int shared = keys[0];
    for (int r = 1; r < R; ++r) shared = keys[r] < shared ? keys[r] : shared;
    shared -= shared % Word::kPer;
    f32x16 acc[R][kMaxValueVecs] = {};
    accumulate<R>(acc, start, 0, shared, col, 0);
    for (int r = 0; r < R; ++r) {
      accumulate<1>(acc + r, start, shared, keys[r], col, r);
      merge(rows[r], acc[r], keys[r], r, col);
    }
  }

  // Rows first_row .. first_row + R - 1 take the keys from .. to - 1, in order.
  template <int R>
  void accumulate(f32x16 (*acc)[kMaxValueVecs], int64_t start, int from, int to, int col, int first_row) {
    const int vecs = num_vecs(col);
    for (int at = from; at < to;) {
      const int64_t position = start + at;
      const int in_block = static_cast<int>(position % cache_.block_size());
      const uint8_t* head = head_of(position);
      const int end = to - at < cache_.block_size() - in_block ? to : at + cache_.block_size() - in_block;
      if (vecs == kMaxValueVecs) {
        block_values<R, kMaxValueVecs>(acc, head, in_block, at, end, col, first_row);
      } else {
        for (int v = 0; v < vecs; ++v) block_values<R, 1>(acc, head, in_block, at, end, col + v * kLanes, first_row, v);
      }
      at = end;
    }
  }

  template <int R, int V>
  void block_values(f32x16 (*acc)[kMaxValueVecs], const uint8_t* head, int in_block, int at, int end, int col,
                    int first_row, int first_vec = 0) {
    const int width = V == 1 ? part_width(col) : kLanes;
    f32x16 sums[R][V];  // apart from acc, which the compiler must take for memory that loads may alias
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] = acc[r][first_vec + v];
    }
    // Keys come word by word; only the last word may be used in part.
    for (; at < end; at += Word::kPer, in_block += Word::kPer) {
      const uint8_t* words =
          head + layer_.values + (static_cast<int64_t>(in_block / Word::kPer) * layer_.value_dim + col) * 4;
      u32x16 word[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        word[v] = V == 1 ? bit_cast<u32x16>(load_part(reinterpret_cast<const float*>(words), width))
                         : load_as<u32x16>(words + 64 * v);
#pragma GCC unroll 4
      for (int i = 0; i < Word::kPer; ++i) {
        if (at + i == end) break;
        f32x16 p[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          float weight = partial_.scores[first_row + r][at + i];
          if constexpr (Word::kScaled) weight *= scales(head, layer_.value_scales)[in_block + i];
          p[r] = set1(weight);
        }
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          const f32x16 value = Word::part(word[v], i);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) sums[r][v] = fma(value, p[r], sums[r][v]);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][first_vec + v] = sums[r][v];
    }
  }

  // acc = acc * exp(M - M') + partial * exp(m - M'), with M' the larger maximum.
  void merge(const Row& row, const f32x16* acc, int keys, int r, int col) {
    if (keys == 0) return;
    const float max = row.max > partial_.max[r] ? row.max : partial_.max[r];
    const f32x16 before = set1(exp(row.max - max)), now = set1(exp(partial_.max[r] - max));
    const bool is_first = row.max == -INFINITY;
    for (int v = 0; v < num_vecs(col); ++v) {
      const int at = col + v * kLanes, width = part_width(at);
      const f32x16 old = is_first ? f32x16{} : load_part(row.output + at, width);
      store_part(row.output + at, fma(acc[v], now, old * before), width);
    }
  }

  int num_vecs(int col) const {
    const int left = (layer_.value_dim - col + kLanes - 1) / kLanes;
    return left < kMaxValueVecs ? left : layer_.value_dim - col < kMaxValueVecs * kLanes ? left : kMaxValueVecs;
  }
  int part_width(int col) const { return layer_.value_dim - col < kLanes ? layer_.value_dim - col : kLanes; }

  const AttentionPiece& piece_;
  const KVCache& cache_;
  const KVLayer& layer_;
  Partial partial_;
};

template <class Word>
void attend(const AttentionPiece& piece) {
  const KVLayer& layer = piece.cache->layer(piece.layer);
  const SequenceView& sequence = piece.sequence;
  const int64_t first_position = sequence.context_len - sequence.num_tokens;
  Worker<Word> worker(piece);
  Row rows[kMaxRows];
  int count = 0;
  for (int64_t token = piece.first_token; token < piece.last_token; ++token) {
    for (int64_t head = piece.first_head; head < piece.last_head; ++head) {
      Row& row = rows[count++];
      row.query = piece.query.row(token) + head * layer.key_dim;
      row.output = piece.output.row(token) + head * layer.value_dim;
      row.limit = first_position + (token - sequence.first_token) + 1;
      if (count < kMaxRows) continue;
      worker.rows(rows, count);
      count = 0;
    }
  }
  if (count > 0) worker.rows(rows, count);
}

}  // namespace

void store_kv(const KVCache& cache, int layer, const SequenceView& sequence, Matrix k, Matrix v, int64_t first,
              int64_t last) {
  switch (cache.type()) {
    case CacheType::F32:
      return store_tokens<WordF32>(cache, layer, sequence, k, v, first, last);
    case CacheType::BF16:
      return store_tokens<WordBF16>(cache, layer, sequence, k, v, first, last);
    case CacheType::Int8:
      return store_tokens<WordInt8>(cache, layer, sequence, k, v, first, last);
  }
}

void attention(const AttentionPiece& piece) {
  switch (piece.cache->type()) {
    case CacheType::F32:
      return attend<WordF32>(piece);
    case CacheType::BF16:
      return attend<WordBF16>(piece);
    case CacheType::Int8:
      return attend<WordInt8>(piece);
  }
}

}  // namespace jinn::JINN_ISA
