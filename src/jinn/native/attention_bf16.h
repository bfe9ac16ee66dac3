// Attention over a bf16 cache, a block of rows by a partition at once.
//
// A query is the sum of two bfloat16 numbers. AMX multiplies these terms, and the three that p is exactly the sum of,
// in the products of bf16_products.h; elsewhere both are one float32 number, in the same order of columns. Keys of 16
// positions are what AMX reads as tiles, 32 columns each, and so are values of 32 positions, 16 columns each. What of a
// partition does not lie as tiles do is copied, padded with zeros, once for all blocks.
#pragma once

#include "attention_rows.h"
#include "bf16_products.h"
#include "kernels.h"
#include "vec.h"

namespace jinn::JINN_ISA {

constexpr int kPieceRows = 128;  // that share a reading of a partition
constexpr int kNumGroups = kPartition / kLanes, kNumSteps = kPartition / kStepCols;

// Where the words of a partition lie.
struct PartitionWords {
  const uint8_t* keys[kNumGroups];   // of 16 positions: [steps][16 words][16 positions]
  const uint8_t* values[kNumSteps];  // of 32 positions: [16 words][columns], value_stride bytes apart
  int64_t value_stride;
};

class PartitionReader {
 public:
  explicit PartitionReader(const AttentionPiece& piece)
      : piece_(piece),
        cache_(*piece.cache),
        layer_(cache_.layer(piece.layer)),
        num_key_steps_((layer_.key_dim + kStepCols - 1) / kStepCols),
        padded_cols_((layer_.value_dim + kLanes - 1) / kLanes * kLanes) {}

  int num_key_steps() const { return num_key_steps_; }
  int num_value_vecs() const { return padded_cols_ / kLanes; }

  // The words of positions start .. end - 1, which lie in one partition; those from end on count as zero in values.
  void read(int64_t start, int64_t end, PartitionWords& words) {
    words.value_stride = 4 * padded_cols_;
    for (int g = 0; start + g * kLanes < end; ++g) words.keys[g] = key_group(start + g * kLanes, g);
    for (int s = 0; start + s * kStepCols < end; ++s) words.values[s] = value_step(start + s * kStepCols, end, s);
  }

 private:
  const uint8_t* head_of(int64_t position) const {
    return cache_.head(piece_.layer, piece_.sequence.block_table[position / cache_.block_size()], piece_.kv_head);
  }
  int in_block(int64_t position) const { return static_cast<int>(position % cache_.block_size()); }

  const uint8_t* key_words(int64_t position) const {
    return head_of(position) + in_block(position) / kLanes * static_cast<int64_t>(32 * layer_.key_dim);
  }

  const uint8_t* key_group(int64_t position, int g) {
    const int64_t bytes = 32 * layer_.key_dim;
    const uint8_t* group = key_words(position);
    if (layer_.key_dim % kStepCols == 0) return group;
    const int64_t padded = num_key_steps_ * 64 * kStepWords;
    uint8_t* copy = key_copies_.of(kNumGroups * padded) + g * padded;
    std::memcpy(copy, group, static_cast<size_t>(bytes));
    std::memset(copy + bytes, 0, static_cast<size_t>(padded - bytes));
    return copy;
  }

  // Two positions of all columns.
  const uint8_t* value_words(int64_t position) const {
    return head_of(position) + layer_.values + static_cast<int64_t>(in_block(position) / 2) * layer_.value_dim * 4;
  }

  const uint8_t* value_step(int64_t position, int64_t end, int s) {
    const bool is_one_run = cache_.block_size() % kStepCols == 0 && position + kStepCols <= end;
    if (is_one_run && padded_cols_ == layer_.value_dim) return value_words(position);
    const int64_t bytes = 4 * layer_.value_dim, stride = 4 * padded_cols_;
    uint8_t* copy = value_copies_.of(kNumSteps * kStepWords * stride) + s * kStepWords * stride;
    std::memset(copy, 0, static_cast<size_t>(kStepWords * stride));
    for (int w = 0; w < kStepWords && position + 2 * w < end; ++w) {
      std::memcpy(copy + w * stride, value_words(position + 2 * w), static_cast<size_t>(bytes));
      if (position + 2 * w + 1 == end) drop_high_halves(copy + w * stride);
    }
    return copy;
  }

  void drop_high_halves(uint8_t* words) const {
    for (int i = 0; i < layer_.value_dim; ++i) std::memset(words + 4 * i + 2, 0, 2);
  }

  const AttentionPiece& piece_;
  const KVCache& cache_;
  const KVLayer& layer_;
  int num_key_steps_, padded_cols_;
  Scratch<uint8_t> key_copies_, value_copies_;
};

// The terms of a block of rows: [columns / kBlockCols][rows][kWeightTerms][kBlockCols]; queries may have fewer.
constexpr int kBlockCols = kPartition;
constexpr int kMaxVecs = 4;  // of a multiplication

#if defined(JINN_AMX)
class BlockProducts {
 public:
  static constexpr int kRows = kAmxRows, kQueryTerms = 2, kWeightTerms = 3;
  using Number = uint16_t;
  static constexpr int64_t kColBlock = kRows * kWeightTerms * kBlockCols;

  // Blocks have so many rows at most.
  explicit BlockProducts(int num_rows) : tiles_(tile_rows(static_cast<uint8_t>(num_rows))) {}

  // Sixteen numbers of a query.
  JINN_INLINE void put_query(Number* to, f32x16 high, f32x16 low) {
    put(to, high);
    put(to + kBlockCols, low);
  }
  // Thirty-two weights: their upper, middle and lower eight bits, which are all they have.
  JINN_INLINE void put_weights(Number* to, f32x16 p, f32x16 next) {
    for (int t = 0; t < kWeightTerms; ++t, to += kBlockCols) {
      put(to, p, next);
      p = p - upper_half(p);
      next = next - upper_half(next);
    }
  }

  // out [rows][out_stride]: the sums over all steps of the rows' terms by `num_vecs` vectors. words(step, vec) is the
  // first of 16 words that are `stride` bytes apart.
  template <int Terms, class Words>
  JINN_INLINE void multiply(const Number* block, int, int num_steps, Words words, int64_t stride, int num_vecs,
                            float* out, int64_t out_stride) {
    finish_stores(block);
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    for (int step = 0; step < num_steps; ++step) {
      const int64_t col = static_cast<int64_t>(step) * kStepCols;
      const Number* terms = block + col / kBlockCols * kColBlock + col % kBlockCols;
      const auto of_vec = [&](int vec) { return vec < num_vecs ? words(step, vec) : nullptr; };
      add_products<0, Terms>(terms, of_vec(0), of_vec(1), stride);
      if (num_vecs > 2) add_products<2, Terms>(terms, of_vec(2), of_vec(3), stride);
    }
    tile_store<0>(out, 4 * out_stride);
    if (num_vecs > 1) tile_store<1>(out + kLanes, 4 * out_stride);
    if (num_vecs > 2) tile_store<2>(out + 2 * kLanes, 4 * out_stride);
    if (num_vecs > 3) tile_store<3>(out + 3 * kLanes, 4 * out_stride);
    finish_stores(out);
  }

 private:
  // Adds the products of one step's terms with one or two vectors to sums `Sum` and the next. Two by two, so that a
  // sum's terms, which follow each other, do not wait for each other.
  template <int Sum, int Terms>
  JINN_INLINE void add_products(const Number* terms, const uint8_t* words, const uint8_t* next, int64_t stride) {
    constexpr int kRowBytes = kWeightTerms * kBlockCols * 2, kTerms = 4 + Sum / 2;
    tile_load<6>(words, stride);
    if (next) tile_load<7>(next, stride);
#pragma GCC unroll 3
    for (int t = 0; t < Terms; ++t, terms += kBlockCols) {
      tile_load<kTerms>(terms, kRowBytes);
      tile_multiply_bf16<Sum, kTerms, 6>();
      if (next) tile_multiply_bf16<Sum + 1, kTerms, 7>();
    }
  }

  // Sixteen columns of bfloat16, in the high halves.
  JINN_INLINE void put(Number* to, f32x16 term) {
    const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)term, 16));
    std::memcpy(to, &halves, sizeof(halves));
  }
  // Sixteen, and the sixteen after them.
  JINN_INLINE void put(Number* to, f32x16 term, f32x16 next) {
    alignas(64) static constexpr uint16_t kHighHalves[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                             23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                             45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const __m512i order = _mm512_load_si512(kHighHalves);
    const __m512i halves = _mm512_permutex2var_epi16((__m512i)term, order, (__m512i)next);
    std::memcpy(to, &halves, sizeof(halves));
  }

  static Bf16Tiles tile_rows(uint8_t n) { return Bf16Tiles({n, n, n, n, n, n, kStepWords, kStepWords}); }

  Bf16Tiles tiles_;
};
#else
class BlockProducts {
 public:
  static constexpr int kRows = 12, kQueryTerms = 1, kWeightTerms = 1;  // even and odd: 24 sums
  using Number = float;
  static constexpr int64_t kColBlock = kRows * kBlockCols;

  explicit BlockProducts(int) {}

  JINN_INLINE void put_query(Number* to, f32x16 high, f32x16 low) { store(to, high + low); }
  JINN_INLINE void put_weights(Number* to, f32x16 p, f32x16 next) {
    store(to, p);
    store(to + kLanes, next);
  }

  // As with AMX, for the block's first `rows` rows.
  template <int Terms, class Words>
  static void multiply(const Number* block, int rows, int num_steps, Words words, int64_t stride, int num_vecs,
                       float* out, int64_t out_stride) {
    multiply_up_to<kRows>(block, rows, num_steps, words, stride, num_vecs, out, out_stride);
  }

 private:
  template <int Rows, class Words>
  static void multiply_up_to(const Number* block, int rows, int num_steps, Words words, int64_t stride, int num_vecs,
                             float* out, int64_t out_stride) {
    if constexpr (Rows > 1) {
      if (rows < Rows) {
        return multiply_up_to<Rows - 1>(block, rows, num_steps, words, stride, num_vecs, out, out_stride);
      }
    }
    multiply_rows<Rows>(block, num_steps, words, stride, num_vecs, out, out_stride);
  }

  template <int Rows, class Words>
  static void multiply_rows(const Number* block, int num_steps, Words words, int64_t stride, int num_vecs, float* out,
                            int64_t out_stride) {
    for (int vec = 0; vec < num_vecs; ++vec) {
      f32x16 y[Rows] = {};
      for (int step = 0; step < num_steps; ++step) {
        const int64_t col = static_cast<int64_t>(step) * kStepCols;
        const Number* terms = block + col / kBlockCols * kColBlock + col % kBlockCols;
        add_step<Rows, 1, BlockLayout>(terms, words(step, vec), stride, kStepWords, y);
      }
      for (int r = 0; r < Rows; ++r) store(out + r * out_stride + vec * kLanes, y[r]);
    }
  }

  struct BlockLayout {
    static constexpr int kColStride = 1, kTermStride = 0, kRowStride = kBlockCols;
  };
};
#endif

JINN_INLINE BlockProducts::Number* terms_at(BlockProducts::Number* block, int row, int64_t col) {
  constexpr int kRowStride = BlockProducts::kWeightTerms * kBlockCols;
  return block + col / kBlockCols * BlockProducts::kColBlock + row * kRowStride + col % kBlockCols;
}

class Bf16Attention {
 public:
  explicit Bf16Attention(const AttentionPiece& piece) : piece_(piece), layer_(piece.cache->layer(piece.layer)) {}

  void attend() {
    AttentionRow rows[kPieceRows];
    for (int64_t first = 0, end = num_rows(piece_); first < end; first += kPieceRows) {
      const int count = static_cast<int>(end - first < kPieceRows ? end - first : kPieceRows);
      for (int r = 0; r < count; ++r) rows[r] = row_at(piece_, first + r);
      split_queries(rows, count);
      const int64_t longest = longest_limit(rows, count);
      for_each_partition(piece_, rows, count, [&](int64_t start) {
        reader_.read(start, start + kPartition < longest ? start + kPartition : longest, words_);
        for (int r = 0; r < count; r += kRows) block(rows + r, count - r < kRows ? count - r : kRows, start, r / kRows);
      });
    }
  }

 private:
  static constexpr int kRows = BlockProducts::kRows;
  using Number = BlockProducts::Number;

  int64_t query_block_size() const { return (layer_.key_dim + kBlockCols - 1) / kBlockCols * BlockProducts::kColBlock; }

  void split_queries(const AttentionRow* rows, int count) {
    queries_ = query_scratch().of((count + kRows - 1) / kRows * query_block_size());
    for (int r = 0; r < count; ++r) {
      Number* block = queries_ + r / kRows * query_block_size();
      for (int col = 0; col < reader_.num_key_steps() * kStepCols; col += kLanes) {
        const int left = layer_.key_dim - col, width = left < 0 ? 0 : left < kLanes ? left : kLanes;
        const f32x16 x = load_part(rows[r].query + col, width), high = nearest_bf16(x);
        BlockProducts::put_query(terms_at(block, r % kRows, col), high, nearest_bf16(x - high));
      }
    }
  }

  // Merges the partition at `start` into a block of rows.
  void block(AttentionRow* rows, int count, int64_t start, int index) {
    int keys[kRows], most = 0;
    for (int r = 0; r < count; ++r) {
      keys[r] = keys_from(rows[r], start);
      most = keys[r] > most ? keys[r] : most;
    }
    if (most == 0) return;
    const int num_groups = (most + kLanes - 1) / kLanes, num_steps = (most + kStepCols - 1) / kStepCols;
    const Number* queries = queries_ + index * query_block_size();
    for (int g = 0; g < num_groups; g += kMaxVecs) {
      products_.multiply<BlockProducts::kQueryTerms>(
          queries, count, reader_.num_key_steps(),
          [&](int step, int vec) { return words_.keys[g + vec] + 64 * kStepWords * step; }, 64,
          num_groups - g < kMaxVecs ? num_groups - g : kMaxVecs, scores_ + g * kLanes, kPartition);
    }
    // All rows in each stage, so that none waits for what the one before it still computes.
    for (int r = 0; r < count; ++r) max_[r] = maximum(r, keys[r]);
    for (int r = 0; r < count; ++r) sum_[r] = softmax(r, keys[r], num_steps);
    merge_sums(rows, keys, count);
    values(rows, keys, count, num_steps, start == 0);
  }

  float maximum(int r, int keys) const {
    const float* scores = scores_ + r * kPartition;
    const int whole = keys / kLanes * kLanes;
    f32x16 largest = set1(-INFINITY);
    for (int at = 0; at < whole; at += kLanes) largest = max(load(scores + at), largest);
    if (whole < keys) largest = max(select(lanes_below(keys - whole), load(scores + whole), largest), largest);
    return reduce_max(largest * piece_.scale);
  }

  // Scores become the terms of p = exp(score - max), 0 past the last key; returns their sum.
  float softmax(int r, int keys, int num_steps) {
    const float *scores = scores_ + r * kPartition, m = max_[r];
    const int whole = keys / kLanes * kLanes;
    const i32x16 is_key = lanes_below(keys - whole);
    const auto weights = [&](int at) {
      if (at >= keys) return f32x16{};
      const f32x16 p = exp(load(scores + at) * piece_.scale - m);
      return at < whole ? p : select(is_key, p, f32x16{});
    };
    f32x16 sum{};
    for (int at = 0; at < num_steps * kStepCols; at += kStepCols) {
      const f32x16 p = weights(at), next = weights(at + kLanes);
      BlockProducts::put_weights(terms_at(p_, r, at), p, next);
      sum = sum + p;
      sum = sum + next;
    }
    return reduce_add(sum);
  }

  // The rows' maxima and sums with this partition, and what their values are multiplied by.
  void merge_sums(AttentionRow* rows, const int* keys, int count) {
    alignas(64) float old_max[kLanes] = {};
    for (int r = 0; r < count; ++r) old_max[r] = rows[r].max;
    const f32x16 before = load(old_max), now = load(max_), larger = max(before, now);
    store(before_, exp(before - larger));
    store(now_, exp(now - larger));
    for (int r = 0; r < count; ++r) {
      if (keys[r] > 0) rows[r].merge(max_[r], sum_[r], before_[r], now_[r]);
    }
  }

  void values(const AttentionRow* rows, const int* keys, int count, int num_steps, bool is_first) {
    alignas(64) float sums[kRows * kMaxVecs * kLanes];
    for (int first = 0; first < reader_.num_value_vecs(); first += kMaxVecs) {
      const int vecs = reader_.num_value_vecs() - first < kMaxVecs ? reader_.num_value_vecs() - first : kMaxVecs;
      products_.multiply<BlockProducts::kWeightTerms>(
          p_, count, num_steps, [&](int step, int vec) { return words_.values[step] + 64 * (first + vec); },
          words_.value_stride, vecs, sums, kMaxVecs * kLanes);
      for (int r = 0; r < count; ++r) {
        if (keys[r] == 0) continue;
        const MergeFactors factors{set1(before_[r]), set1(now_[r]), is_first};
        for (int v = 0; v < vecs; ++v) {
          const int col = (first + v) * kLanes, left = layer_.value_dim - col;
          merge_values(rows[r].output + col, load(sums + (r * kMaxVecs + v) * kLanes), factors,
                       left < kLanes ? left : kLanes);
        }
      }
    }
  }

  static Scratch<Number>& query_scratch() {
    static thread_local Scratch<Number> scratch;
    return scratch;
  }

  const AttentionPiece& piece_;
  const KVLayer& layer_;
  PartitionReader reader_{piece_};
  BlockProducts products_{static_cast<int>(num_rows(piece_) < kRows ? num_rows(piece_) : kRows)};
  PartitionWords words_;
  Number* queries_ = nullptr;
  alignas(64) float scores_[kRows * kPartition];
  alignas(64) Number p_[BlockProducts::kColBlock];
  alignas(64) float max_[kLanes] = {}, sum_[kLanes], before_[kLanes], now_[kLanes];  // of each row
};

inline void attend_bf16(const AttentionPiece& piece) {
  const FlushToZero flush;
  Bf16Attention(piece).attend();
}

}  // namespace jinn::JINN_ISA
