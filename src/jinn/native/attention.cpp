// Causal softmax attention over the paged cache.
//
// Keys and values are read only as stored. A row's positions fall into partitions of kPartition at fixed absolute
// positions. Within one: scores, their maximum m, p = exp(score - m), the sum l of p and the sum of p * value.
// Partitions are then merged in order into (M, L, acc). Nothing depends on what other rows are computed beside it,
// so one query and many give the same bits.
//
// Products are float32, key by key, or in blocks of rows where the cache is bf16 (attention_bf16.h).
#include <cmath>

#include "attention_rows.h"
#include "bf16_products.h"
#include "kernels.h"
#include "ops.h"
#include "vec.h"
#if defined(JINN_AVX512)
#include "attention_bf16.h"
#endif

namespace jinn::JINN_ISA {
namespace {

constexpr int kMaxRows = 4;       // query rows that share one reading of keys and values
constexpr int kMaxValueVecs = 4;  // 64 columns of values at a time

typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));

// How a 32-bit word of the cache widens into 4 / size floats per lane, how numbers are stored, in the low bits of
// `numbers`, and how queries are held beside them.
struct WordF32 {
  using Narrow = u32x16;
  static constexpr int kPer = 1;
  static constexpr bool kScaled = false;
  JINN_INLINE f32x16 part(u32x16 word, int) { return bit_cast<f32x16>(word); }
  JINN_INLINE u32x16 numbers(f32x16 x, float) { return bit_cast<u32x16>(x); }
  JINN_INLINE float query(float x) { return x; }
};
struct WordBF16 {
  using Narrow = u16x16;
  static constexpr int kPer = 2;
  static constexpr bool kScaled = false;
  JINN_INLINE f32x16 part(u32x16 word, int i) { return i == 0 ? bf16_low(word) : bf16_high(word); }
  // As float_to_bf16.
  JINN_INLINE u32x16 numbers(f32x16 x, float) {
    const u32x16 bits = bit_cast<u32x16>(x), nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return select((i32x16)((bits & 0x7fffffffu) > 0x7f800000u), (bits >> 16) | 0x40u, nearest);
  }
  // The sum of two bfloat16 numbers.
  JINN_INLINE float query(float x) {
    const float high = bf16_to_float(float_to_bf16(x));
    return high + bf16_to_float(float_to_bf16(x - high));
  }
};
struct WordInt8 {
  using Narrow = u8x16;
  static constexpr int kPer = 4;
  static constexpr bool kScaled = true;
  JINN_INLINE f32x16 part(u32x16 word, int i) { return to_float((i32x16)(word << (24 - 8 * i)) >> 24); }
  JINN_INLINE u32x16 numbers(f32x16 x, float inverse_scale) {
    return (u32x16)convert<i32x16>(round_to_integer(x * inverse_scale)) & 0xffu;
  }
  JINN_INLINE float query(float x) { return x; }
};

JINN_INLINE int lanes_left(int from, int end) { return end - from < kLanes ? end - from : kLanes; }

float largest_magnitude(const float* x, int n) {
  f32x16 largest{};
  for (int i = 0; i < n; i += kLanes) {
    const f32x16 v = load_part(x + i, lanes_left(i, n));
    largest = max(max(v, -v), largest);
  }
  return reduce_max(largest);
}

// Part `part` of `count` words. The words' other parts are of other positions, which another thread may be storing.
template <class Word>
JINN_INLINE void put_parts(uint8_t* words, u32x16 numbers, int part, int count) {
  constexpr int kBytes = 4 / Word::kPer;
#if defined(JINN_AVX512)
  constexpr uint64_t kFirstParts = kBytes == 4 ? ~0ull : kBytes == 2 ? 0x3333333333333333ull : 0x1111111111111111ull;
  const uint64_t there = ~0ull >> (64 - 4 * count);
  _mm512_mask_storeu_epi8(words, (kFirstParts << (kBytes * part)) & there, (__m512i)(numbers << (8 * kBytes * part)));
#else
  for (int i = 0; i < count; ++i) {
    const uint32_t number = numbers[i];
    std::memcpy(words + 4 * i + kBytes * part, &number, kBytes);
  }
#endif
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
  const int64_t key_words = layer.key_dim / Word::kPer;
  uint8_t* keys = head + (at / kLanes * key_words * kLanes + at % kLanes) * 4;
  for (int i = 0; i < layer.key_dim; i += kLanes) {
    const int count = lanes_left(i, layer.key_dim);
    const u32x16 numbers = Word::numbers(load_part(k + i, count), key_inverse);
    const typename Word::Narrow packed = convert<typename Word::Narrow>(numbers);
    uint32_t words[kLanes];
    std::memcpy(words, &packed, sizeof(packed));
    for (int w = 0; w < count / Word::kPer; ++w, keys += 4 * kLanes) std::memcpy(keys, words + w, 4);
  }
  uint8_t* values = head + layer.values + static_cast<int64_t>(at / Word::kPer) * layer.value_dim * 4;
  for (int i = 0; i < layer.value_dim; i += kLanes) {
    const int count = lanes_left(i, layer.value_dim);
    put_parts<Word>(values + 4 * i, Word::numbers(load_part(v + i, count), value_inverse), at % Word::kPer, count);
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

struct Partial {
  alignas(64) float scores[kMaxRows][kPartition];
  float max[kMaxRows], sum[kMaxRows];
};

// acc = acc * exp(M - M') + partial * exp(m - M'), with M' the larger maximum.
struct MergeFactors {
  float before, now;
  bool is_first;

  MergeFactors(const AttentionRow& row, float m) : is_first(row.max == -INFINITY) {
    const float max = row.max > m ? row.max : m;
    before = exp(row.max - max);
    now = exp(m - max);
  }
};

template <class Word>
class Worker {
 public:
  explicit Worker(const AttentionPiece& piece)
      : piece_(piece), cache_(*piece.cache), layer_(cache_.layer(piece.layer)) {}

  void rows(AttentionRow* rows, int count) {
    for (int64_t start = 0, end = longest_limit(rows, count); start < end; start += kPartition) {
      partition(rows, count, start);
    }
    for (int r = 0; r < count; ++r) {
      const float inverse = 1.0f / rows[r].sum;
      for (int i = 0; i < layer_.value_dim; ++i) rows[r].output[i] *= inverse;
    }
  }

 private:
  void partition(AttentionRow* rows, int count, int64_t start) {
    switch (count) {
      case 1:
        return partition<1>(rows, start);
      case 2:
        return partition<2>(rows, start);
      case 3:
        return partition<3>(rows, start);
      default:
        return partition<4>(rows, start);
    }
  }

  uint8_t* head_of(int64_t position) const {
    return cache_.head(piece_.layer, piece_.sequence.block_table[position / cache_.block_size()], piece_.kv_head);
  }

  template <int R>
  void partition(AttentionRow* rows, int64_t start) {
    int keys[R];  // of this partition, per row
    int most = 0;
    for (int r = 0; r < R; ++r) {
      keys[r] = keys_from(rows[r], start);
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
      const MergeFactors factors(rows[r], partial_.max[r]);
      rows[r].merge(partial_.max[r], partial_.sum[r], factors.before, factors.now);
    }
  }

  // Scores of 16 positions for R rows; even and odd columns are summed apart, then together.
  template <int R>
  void score_lanes(const AttentionRow* rows, const uint8_t* head, int in_block, int at) {
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
  void values(AttentionRow* rows, int64_t start, const int* keys, int col) {
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

  void merge(const AttentionRow& row, const f32x16* acc, int keys, int r, int col) {
    if (keys == 0) return;
    const MergeFactors factors(row, partial_.max[r]);
    for (int v = 0; v < num_vecs(col); ++v) {
      const int at = col + v * kLanes;
      const f32x16 old = factors.is_first ? f32x16{} : load_part(row.output + at, part_width(at));
      store_part(row.output + at, fma(acc[v], set1(factors.now), old * factors.before), part_width(at));
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
  const int64_t key_dim = piece.cache->layer(piece.layer).key_dim;
  static thread_local Scratch<float> scratch;
  float* queries = scratch.of(kMaxRows * key_dim);
  Worker<Word> worker(piece);
  AttentionRow rows[kMaxRows];
  for (int64_t first = 0, end = num_rows(piece); first < end; first += kMaxRows) {
    const int count = static_cast<int>(end - first < kMaxRows ? end - first : kMaxRows);
    for (int r = 0; r < count; ++r) {
      rows[r] = row_at(piece, first + r);
      for (int64_t i = 0; i < key_dim; ++i) queries[r * key_dim + i] = Word::query(rows[r].query[i]);
      rows[r].query = queries + r * key_dim;
    }
    worker.rows(rows, count);
  }
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
#if defined(JINN_AVX512)
      return attend_bf16(piece);
#else
      return attend<WordBF16>(piece);
#endif
    case CacheType::Int8:
      return attend<WordInt8>(piece);
  }
}

}  // namespace jinn::JINN_ISA
