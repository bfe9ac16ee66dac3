// Attention over a bf16 cache, blocks of rows by a partition at once.
//
// A query is the sum of two bfloat16 numbers, and so is p with AMX, which multiplies these terms in the products of
// bf16_products.h; elsewhere both are one float32 number, in the same order of columns. p is taken as a power of 2.
// Keys of 16 positions are what AMX reads as tiles, 32 columns each, and so are values of 32 positions, 16 columns
// each. What of a partition does not lie as tiles do is copied, padded with zeros, once for all blocks.
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
  int num_next_groups;
  const uint8_t* next_keys[kNumGroups];  // of the next partition
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

  // The keys of the partition that follows the one at `start`, up to position end - 1.
  void find_next_keys(int64_t start, int64_t end, PartitionWords& words) const {
    words.num_next_groups = 0;
    for (int64_t next = start + kPartition; next < end && words.num_next_groups < kNumGroups; next += kLanes) {
      words.next_keys[words.num_next_groups++] = key_words(next);
    }
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

// Products of blocks of rows. Scores of 16 keys, and sums of 16 columns of values, are a vector per row; vectors of a
// row are kVecStride numbers apart, rows kRowStride and blocks kBlockStride. Scores become the terms of p in place.
#if defined(JINN_AMX)
class BlockProducts {
 public:
  static constexpr int kRows = kAmxRows, kMaxBlocks = 2;
  static constexpr int64_t kRowStride = kLanes, kVecStride = kRows * kLanes, kBlockStride = kRows * kPartition;

  // Blocks have so many rows at most.
  explicit BlockProducts(int num_rows) : tiles_(tile_rows(static_cast<uint8_t>(num_rows))) {}

  // Numbers of a block of queries: [steps][2 terms][16 rows][32 bfloat16].
  static int64_t query_size(int num_steps) { return num_steps * 2 * kVecStride; }

  // Where a row's columns of a step begin.
  static float* query_at(float* block, int row, int step) { return block + step * 2 * kVecStride + row * kRowStride; }

  // Thirty-two numbers of a query.
  static void put_query(float* to, f32x16 x, f32x16 next) {
    const f32x16 high = nearest_bf16(x), next_high = nearest_bf16(next);
    put(to, high, next_high);
    const auto low = _mm512_cvtne2ps_pbh((__m512)(next - next_high), (__m512)(x - high));
    std::memcpy(to + kVecStride, &low, sizeof(low));
  }
  // Thirty-two weights, in place of their scores.
  static void put_weights(float* scores, f32x16 p, f32x16 next) {
    const f32x16 high = rounded(p), next_high = rounded(next);
    put(scores, high, next_high);
    put(scores + kVecStride, half_added(p - high), half_added(next - next_high));
  }

  // The sums over all steps of the rows of `Blocks` blocks, `size` numbers each, by up to max_vecs<Blocks>() vectors.
  // words(step, vec) is the first of 16 words that are `stride` bytes apart.
  template <int Blocks, class Words>
  static void multiply(const float* blocks, int64_t size, int, int num_steps, Words words, int64_t stride, int num_vecs,
                       float* out) {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    for (int step = 0; step < num_steps; ++step, blocks += 2 * kVecStride) {
      const auto of_vec = [&](int vec) { return vec < num_vecs ? words(step, vec) : nullptr; };
      if constexpr (Blocks == 2) {
        add_two_blocks(blocks, blocks + size, of_vec(0), of_vec(1), stride);
      } else {
        add_one_block<0>(blocks, of_vec(0), of_vec(1), stride);
        if (num_vecs > 2) add_one_block<2>(blocks, of_vec(2), of_vec(3), stride);
      }
    }
    constexpr int64_t kSecond = Blocks == 2 ? kBlockStride : 2 * kVecStride;
    tile_store<0>(out, 4 * kRowStride);
    if (num_vecs > 1) tile_store<1>(out + kVecStride, 4 * kRowStride);
    if (Blocks == 2 || num_vecs > 2) tile_store<2>(out + kSecond, 4 * kRowStride);
    if (Blocks == 2 ? num_vecs > 1 : num_vecs > 3) tile_store<3>(out + kSecond + kVecStride, 4 * kRowStride);
  }

  template <int Blocks>
  static constexpr int max_vecs() {
    return 4 / Blocks;
  }

 private:
  // Products follow each other so that no sum waits for its last one. Words and terms are loaded once for two products.
  JINN_INLINE void add_two_blocks(const float* terms, const float* next_terms, const uint8_t* words,
                                  const uint8_t* next_words, int64_t stride) {
    tile_load<6>(words, stride);
    if (next_words) tile_load<7>(next_words, stride);
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t) {
      tile_load<4>(terms + t * kVecStride, 4 * kRowStride);
      tile_load<5>(next_terms + t * kVecStride, 4 * kRowStride);
      tile_multiply_bf16<0, 4, 6>();
      if (next_words) tile_multiply_bf16<1, 4, 7>();
      tile_multiply_bf16<2, 5, 6>();
      if (next_words) tile_multiply_bf16<3, 5, 7>();
    }
  }
  // To sums `Sum` and the next.
  template <int Sum>
  JINN_INLINE void add_one_block(const float* terms, const uint8_t* words, const uint8_t* next_words, int64_t stride) {
    constexpr int kTerms = 4 + Sum / 2;
    tile_load<6>(words, stride);
    if (next_words) tile_load<7>(next_words, stride);
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t) {
      tile_load<kTerms>(terms + t * kVecStride, 4 * kRowStride);
      tile_multiply_bf16<Sum, kTerms, 6>();
      if (next_words) tile_multiply_bf16<Sum + 1, kTerms, 7>();
    }
  }

  // Nearest bfloat16, ties away from zero: two instructions, of finite numbers.
  JINN_INLINE f32x16 rounded(f32x16 x) { return upper_half(half_added(x)); }
  JINN_INLINE f32x16 half_added(f32x16 x) { return bit_cast<f32x16>(bit_cast<u32x16>(x) + 0x8000u); }

  // Thirty-two columns of bfloat16, in the high halves.
  JINN_INLINE void put(float* to, f32x16 term, f32x16 next) {
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
  static constexpr int kRows = 12, kMaxBlocks = 1;  // even and odd columns: 24 sums
  static constexpr int64_t kRowStride = kPartition, kVecStride = kLanes, kBlockStride = kRows * kPartition;

  explicit BlockProducts(int) {}

  // Numbers of a block of queries: [columns / kPartition][rows][kPartition].
  static int64_t query_size(int num_steps) { return (num_steps + kNumSteps - 1) / kNumSteps * kBlockStride; }

  static float* query_at(float* block, int row, int step) {
    return block + step / kNumSteps * kBlockStride + row * kRowStride + step % kNumSteps * kStepCols;
  }
  static void put_query(float* to, f32x16 x, f32x16 next) {
    store(to, two_terms(x));
    store(to + kVecStride, two_terms(next));
  }
  static void put_weights(float* scores, f32x16 p, f32x16 next) {
    store(scores, p);
    store(scores + kVecStride, next);
  }

  // As with AMX, for the block's first `rows` rows.
  template <int, class Words>
  static void multiply(const float* block, int64_t, int rows, int num_steps, Words words, int64_t stride, int num_vecs,
                       float* out) {
    multiply_up_to<kRows>(block, rows, num_steps, words, stride, num_vecs, out);
  }

  template <int>
  static constexpr int max_vecs() {
    return kNumGroups;
  }

 private:
  JINN_INLINE f32x16 two_terms(f32x16 x) {
    const f32x16 high = nearest_bf16(x);
    return high + nearest_bf16(x - high);
  }

  template <int Rows, class Words>
  static void multiply_up_to(const float* block, int rows, int num_steps, Words words, int64_t stride, int num_vecs,
                             float* out) {
    if constexpr (Rows > 1) {
      if (rows < Rows) return multiply_up_to<Rows - 1>(block, rows, num_steps, words, stride, num_vecs, out);
    }
    multiply_rows<Rows>(block, num_steps, words, stride, num_vecs, out);
  }

  template <int Rows, class Words>
  static void multiply_rows(const float* block, int num_steps, Words words, int64_t stride, int num_vecs, float* out) {
    for (int vec = 0; vec < num_vecs; ++vec) {
      f32x16 y[Rows][1] = {};
      for (int step = 0; step < num_steps; ++step) {
        const uint8_t* const of_vec[1] = {words(step, vec)};
        const float* numbers = block + step / kNumSteps * kBlockStride + step % kNumSteps * kStepCols;
        add_step<Rows, 1, kRowStride>(numbers, of_vec, stride, kStepWords, y);
      }
      for (int r = 0; r < Rows; ++r) store(out + r * kRowStride + vec * kVecStride, y[r][0]);
    }
  }
};
#endif

// 2^x to 1.6e-7 of it for x up to 1; below -149, 0. A polynomial of degree 5 for the fraction, exact at 0, of least
// relative error in [-1/2, 1/2].
JINN_INLINE f32x16 exp2(f32x16 x) {
  const f32x16 bounded = max(set1(-150.0f), x), n = round_to_integer(bounded), f = bounded - n;
  f32x16 p = set1(1.3264727e-3f);
  p = fma(p, f, set1(9.671513e-3f));
  p = fma(p, f, set1(5.5507336e-2f));
  p = fma(p, f, set1(2.4022242e-1f));
  p = fma(p, f, set1(6.93147e-1f));
  p = fma(p, f, set1(1.0f));
  return (f32x16)_mm512_scalef_ps((__m512)p, (__m512)n);
}

class Bf16Attention {
 public:
  explicit Bf16Attention(const AttentionPiece& piece) : piece_(piece), layer_(piece.cache->layer(piece.layer)) {}

  void attend() {
    for (int64_t first = 0, end = num_rows(piece_); first < end; first += kPieceRows) {
      const int count = static_cast<int>(end - first < kPieceRows ? end - first : kPieceRows);
      for (int r = 0; r < count; ++r) rows_[r] = row_at(piece_, first + r);
      split_queries(count);
      values_ = scratch(1).of(count * padded_cols());
      const int64_t longest = longest_limit(rows_, count);
      is_fetched_ahead_ = count <= kFewRows;
      for (int64_t start = 0; start < longest; start += kPartition) {
        reader_.read(start, start + kPartition < longest ? start + kPartition : longest, words_);
        if (is_fetched_ahead_) reader_.find_next_keys(start, longest, words_);
        for (int r = 0; r < count; r += kMaxRows) {
          if (count - r > kRows) {
            add_partition<kMaxBlocks>(r, count - r < kMaxRows ? count - r : kMaxRows, start);
          } else {
            add_partition<1>(r, count - r, start);
          }
        }
      }
    }
  }

 private:
#if defined(JINN_AMX)
  static constexpr int kFewRows = 0;  // none: tiles of queries have been fast enough
#else
  static constexpr int kFewRows = 8;
#endif
  static constexpr int kStepBytes = 64 * kStepWords;
  static constexpr int kRows = BlockProducts::kRows, kMaxBlocks = BlockProducts::kMaxBlocks;
  static constexpr int kMaxRows = kMaxBlocks * kRows, kVecRows = (kMaxRows + kLanes - 1) / kLanes * kLanes;

  void split_queries(int count) {
    query_size_ = BlockProducts::query_size(reader_.num_key_steps());
    queries_ = scratch(0).of((count + kRows - 1) / kRows * query_size_);
    for (int r = 0; r < count; ++r) {
      float* block = queries_ + r / kRows * query_size_;
      for (int step = 0, left = layer_.key_dim; left > 0; ++step, left -= kStepCols) {
        const float* from = rows_[r].query + step * kStepCols;
        const int second = left - kLanes;
        BlockProducts::put_query(BlockProducts::query_at(block, r % kRows, step),
                                 load_part(from, left < kLanes ? left : kLanes),
                                 load_part(from + kLanes, second < 0        ? 0
                                                          : second < kLanes ? second
                                                                            : kLanes));
      }
    }
  }

  // Merges the partition at `start` into the rows of `Blocks` blocks from row `first` on.
  template <int Blocks>
  void add_partition(int first, int count, int64_t start) {
    AttentionRow* rows = rows_ + first;
    int keys[kMaxRows];
    for (int r = 0; r < count; ++r) keys[r] = keys_from(rows[r], start);
    const int64_t left = longest_limit(rows, count) - start;
    if (left <= 0) return;
    const int most = static_cast<int>(left < kPartition ? left : kPartition);
    score<Blocks>(queries_ + first / kRows * query_size_, count, (most + kLanes - 1) / kLanes);
    // All rows in each stage, so that none waits for what the one before it still computes.
    const int num_steps = (most + kStepCols - 1) / kStepCols;
    for (int r = 0; r < count; ++r) max_[r] = maximum(scores_ + offset(r), keys[r]);
    for (int r = 0; r < count; ++r) sum_[r] = softmax(scores_ + offset(r), max_[r], keys[r], num_steps);
    merge_sums(rows, count);
    for (int vec = 0; vec < reader_.num_value_vecs(); vec += BlockProducts::max_vecs<Blocks>()) {
      add_values<Blocks>(first, count, num_steps, vec, start == 0, left <= kPartition);
    }
  }

  // Of a row's numbers in the blocks.
  static int64_t offset(int row) {
    return row / kRows * BlockProducts::kBlockStride + row % kRows * BlockProducts::kRowStride;
  }

  template <int Blocks>
  void score(const float* queries, int count, int num_groups) {
    constexpr int kVecs = BlockProducts::max_vecs<Blocks>();
    for (int g = 0; g < num_groups; g += kVecs) {
      products_.multiply<Blocks>(
          queries, query_size_, count, reader_.num_key_steps(),
          [&](int step, int vec) {
            if (is_fetched_ahead_) fetch_values((g + vec) * reader_.num_key_steps() + step, num_groups);
            return words_.keys[g + vec] + kStepBytes * step;
          },
          64, num_groups - g < kVecs ? num_groups - g : kVecs, scores_ + g * BlockProducts::kVecStride);
    }
  }

  // Few rows wait for memory: the values of a partition are asked for while its keys are multiplied, the keys of the
  // next one while its values are, a kilobyte for each that is multiplied.
  void fetch_values(int at, int num_groups) const {
    const int vecs = reader_.num_value_vecs();
    if (at < (num_groups + 1) / 2 * vecs) prefetch<kStepWords>(words_.values[at / vecs] + at % vecs * kStepBytes);
  }
  void fetch_keys(int at) const {
    const int steps = reader_.num_key_steps();
    if (at >= words_.num_next_groups * steps) return;
    prefetch<kStepWords>(words_.next_keys[at / steps] + at % steps * kStepBytes);
  }

  static float maximum(const float* scores, int keys) {
    f32x16 largest = set1(-INFINITY);
    for (; keys >= kLanes; keys -= kLanes, scores += BlockProducts::kVecStride) largest = max(load(scores), largest);
    if (keys > 0) largest = max(select(lanes_below(keys), load(scores), largest), largest);
    return reduce_max(largest);
  }

  // Scores become the terms of p = 2^(scale * (score - m)), 1 for the largest, 0 past the last key; returns their sum.
  float softmax(float* scores, float m, int keys, int num_steps) const {
    f32x16 sum{};
    for (int step = 0; step < num_steps; ++step, keys -= kStepCols, scores += 2 * BlockProducts::kVecStride) {
      f32x16 p = exp2((load(scores) - m) * scale_);
      f32x16 next = exp2((load(scores + BlockProducts::kVecStride) - m) * scale_);
      if (keys < kStepCols) {
        p = select(lanes_below(keys), p, f32x16{});
        next = select(lanes_below(keys - kLanes), next, f32x16{});
      }
      BlockProducts::put_weights(scores, p, next);
      sum = sum + p;
      sum = sum + next;
    }
    return reduce_add(sum);
  }

  // The rows' maxima and sums with this partition, and what their values are multiplied by: first and, with the last
  // partition, in the end. A row that sees nothing of it stays as it is.
  void merge_sums(AttentionRow* rows, int count) {
    alignas(64) float old_max[kVecRows] = {};
    for (int r = 0; r < count; ++r) old_max[r] = rows[r].max;
    for (int r = 0; r < count; r += kLanes) {
      const f32x16 before = load(old_max + r), now = load(max_ + r), larger = max(before, now);
      store(before_ + r, exp2((before - larger) * scale_));
      store(now_ + r, exp2((now - larger) * scale_));
    }
    for (int r = 0; r < count; ++r) {
      rows[r].merge(max_[r], sum_[r], before_[r], now_[r]);
      inverse_[r] = 1.0f / rows[r].sum;
    }
  }

  // Columns from 16 * `first_vec` on. What the last partition leaves goes to the output.
  template <int Blocks>
  void add_values(int first_row, int count, int num_steps, int first_vec, bool is_first, bool is_last) {
    constexpr int kVecs = BlockProducts::max_vecs<Blocks>();
    const int vecs = reader_.num_value_vecs() - first_vec < kVecs ? reader_.num_value_vecs() - first_vec : kVecs;
    products_.multiply<Blocks>(
        scores_, BlockProducts::kBlockStride, count, num_steps,
        [&](int step, int vec) {
          if (is_fetched_ahead_) fetch_keys((first_vec + vec) * num_steps + step);
          return words_.values[step] + 64 * (first_vec + vec);
        },
        words_.value_stride, vecs, sums_);
    for (int r = 0; r < count; ++r) {
      const AttentionRow& row = rows_[first_row + r];
      const f32x16 before = set1(before_[r]), now = set1(now_[r]), inverse = set1(inverse_[r]);
      for (int v = 0; v < vecs; ++v) {
        const int col = (first_vec + v) * kLanes, left = layer_.value_dim - col;
        float* total = values_ + (first_row + r) * padded_cols() + col;
        const f32x16 old = is_first ? f32x16{} : load(total) * before;
        const f32x16 merged = fma(load(sums_ + offset(r) + v * BlockProducts::kVecStride), now, old);
        if (is_last) {
          store_part(row.output + col, merged * inverse, left < kLanes ? left : kLanes);
        } else {
          store(total, merged);
        }
      }
    }
  }

  int64_t padded_cols() const { return reader_.num_value_vecs() * kLanes; }

  static Scratch<float>& scratch(int i) {
    static thread_local Scratch<float> scratches[2];
    return scratches[i];
  }

  const AttentionPiece& piece_;
  const KVLayer& layer_;
  const float scale_ = piece_.scale * 1.44269504088896341f;  // log2(e)
  PartitionReader reader_{piece_};
  BlockProducts products_{static_cast<int>(num_rows(piece_) < kRows ? num_rows(piece_) : kRows)};
  PartitionWords words_;
  bool is_fetched_ahead_ = false;  // the whole piece has few rows
  AttentionRow rows_[kPieceRows];
  float* queries_ = nullptr;  // of blocks
  int64_t query_size_ = 0;    // of a block
  float* values_ = nullptr;   // [rows][padded columns]: the sums before the last partition
  alignas(64) float scores_[kMaxBlocks * BlockProducts::kBlockStride];
  alignas(64) float sums_[kMaxBlocks * BlockProducts::kBlockStride];
  alignas(64) float max_[kVecRows] = {}, sum_[kVecRows];  // of each row
  alignas(64) float before_[kVecRows], now_[kVecRows], inverse_[kVecRows];
};

inline void attend_bf16(const AttentionPiece& piece) {
  const FlushToZero flush;
  Bf16Attention(piece).attend();
}

}  // namespace jinn::JINN_ISA
