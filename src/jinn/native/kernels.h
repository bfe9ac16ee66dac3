// The kernels that each instruction set has its own build of. Every function computes one claimable piece of an op;
// what a piece covers never changes the value of any number in it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kv_cache.h"
#include "packed.h"
#include "state_cache.h"

namespace jinn {

// A float32 matrix: `cols` columns in rows that are `stride` floats apart.
struct Matrix {
  float* data = nullptr;
  int64_t stride = 0;
  int64_t cols = 0;
  float* row(int64_t r) const { return data + r * stride; }
  // The same rows by other numbers: what was row 0 is row `first`.
  Matrix counted_from(int64_t first) const { return {data - first * stride, stride, cols}; }
};

constexpr int kActivationRows = 16;
constexpr int kMaxOutliers = 2;  // of a group of a row of type Mixed

// How a linear's input is held while weights read it.
enum class ActivationType { F32, BF16, Int8, Mixed, Int12 };
constexpr bool is_integer(ActivationType type) { return type >= ActivationType::Int8; }

// Rows of activations, `stride` bytes each. F32: as they are, or rounded to bf16. BF16: pairs, padded to even.
//
// Integers share a scale in groups of 32 columns: x = scale * code, |code| <= 127 (Int8) or 2032 (Int12). Int12 codes
// are kept as two int8, code = kHigh * high + low. Mixed is Int8, but a number that outweighs the rest of its group, an
// outlier, is held in float32 beside a code of 0; so is then one that outweighs the rest without it. Rows come in
// blocks of 16, so that what a kernel needs of 16 rows lies side by side: per group [16][32 codes, or of Int12 32 high
// and 32 low], then per group [16] scales (f32), [16] sums of the codes (i32), [16] scaled sums (f32) and [16] sums of
// the first half's codes (i32), then, of Mixed, for each of kMaxOutliers per group [16] outliers (f32, 0 where there is
// none), and for each per group [16] bytes: their columns in the group.
struct Activations {
  uint8_t* data = nullptr;
  int64_t stride = 0;
  int64_t cols = 0;
  ActivationType type = ActivationType::F32;
  int64_t first_col = 0;  // that kernels see; a whole group of integers, a whole pair of BF16

  uint8_t* row(int64_t r) const { return data + r * stride + first_col * (type == ActivationType::BF16 ? 2 : 4); }
  int64_t group_bytes() const { return type == ActivationType::Int12 ? 2 * kGroup : kGroup; }  // of codes
  // Of group 0; group g is kActivationRows * g groups or numbers further.
  uint8_t* codes(int64_t r) const {
    return block(r) + (first_col / kGroup * kActivationRows + r % kActivationRows) * group_bytes();
  }
  float* scales(int64_t r) const { return plane<float>(r, 0); }
  int32_t* sums(int64_t r) const { return plane<int32_t>(r, 1); }
  float* scaled_sums(int64_t r) const { return plane<float>(r, 2); }
  int32_t* half_sums(int64_t r) const { return plane<int32_t>(r, 3); }
  float* outliers(int64_t r, int i) const { return plane<float>(r, 4 + i); }
  uint8_t* outlier_cols(int64_t r, int i) const {
    return reinterpret_cast<uint8_t*>(planes(r) + (4 + kMaxOutliers) * plane_size()) + number(r, i);
  }

 private:
  uint8_t* block(int64_t r) const { return data + r / kActivationRows * kActivationRows * stride; }
  template <class Number>
  Number* plane(int64_t r, int64_t index) const {
    return reinterpret_cast<Number*>(planes(r) + number(r, index));
  }
  // Of four bytes each, after the codes.
  uint32_t* planes(int64_t r) const { return reinterpret_cast<uint32_t*>(block(r) + plane_size() * group_bytes()); }
  int64_t plane_size() const { return cols / kGroup * kActivationRows; }
  int64_t number(int64_t r, int64_t plane) const {
    return plane * plane_size() + first_col / kGroup * kActivationRows + r % kActivationRows;
  }
};

constexpr int kHigh = 16;

int64_t activation_stride(ActivationType type, int64_t cols);

// Tiles first_tile .. last_tile - 1 of `weight` for rows first_row .. last_row - 1.
struct LinearPiece {
  const PackedTensor* weight;
  const float* bias;  // [rows of weight] or null
  Activations input;
  Matrix output;
  const Matrix* residual;  // added to the result, or null
  int64_t first_tile, last_tile, first_row, last_row;
  int64_t first_weight_row = 0;  // that the output's column 0 is the product of
};

struct Rotation {
  const float* table;  // [tokens][2 * num_pairs]: cos, then sin
  int num_pairs, num_heads;
  bool is_interleaved;
};

// One sequence's place in the step and in the cache.
struct SequenceView {
  int64_t first_token, num_tokens;
  int64_t context_len;  // positions up to and including the last token
  const int32_t* block_table;
};

constexpr int kAttentionPartition = 256;  // positions whose softmax is one; at fixed absolute positions

struct AttentionPiece {
  const KVCache* cache;
  int layer;
  SequenceView sequence;
  int kv_head;
  int64_t first_head, last_head;    // of the queries
  int64_t first_token, last_token;  // of the batch
  float scale;
  Matrix query, output;
};

// Columns first_col .. last_col - 1 of one sequence, whose tail and log are [rows][x.cols] each.
struct ConvPiece {
  const float* taps;  // [conv_kernel][x.cols], oldest input first
  int64_t conv_kernel;
  Matrix x, out;
  StateStep step;
  float *tail, *log;
  int64_t first_col, last_col;
};

// A slice of one value head of one sequence: its key head's q and k, its columns of v and out, its column of a and b.
struct DeltaRulePiece {
  Matrix q, k, v, a, b, out;
  float decay_rate, dt_bias;  // decay = exp(-decay_rate * softplus(a + dt_bias))
  StateStep step;
  StateSlice slice;
};

// How each token's experts are chosen, as RouteSpec in ops/protocol.py has it.
struct RouteSpec {
  bool is_sigmoid = false, is_renormalized = false;
  int num_experts_per_tok = 0, num_groups = 1, num_chosen_groups = 1;
  float scaling = 1.0f;
  const float* bias = nullptr;  // [num_experts], added for choosing alone, or null
};

// Float32 columns: scores [num_experts], weights [num_experts_per_tok], and ids as int32 in the same room as weights.
struct RouteOutput {
  Matrix scores, weights, ids;
};

enum class Peak { Int8, BF16, F32 };

struct Kernels {
  const char* name;

  // Columns of x, to as many of `out` from its first_col on.
  void (*quantize_rows)(bool round_to_bf16, Matrix x, Activations out, int64_t first, int64_t last);
  void (*linear)(const LinearPiece& piece);
  void (*rms_norm)(Matrix x, const float* weight, int64_t width, float eps, Matrix out, int64_t first, int64_t last);
  void (*silu_mul)(Matrix gate, Matrix up, Matrix out, int64_t first, int64_t last);
  // `gate` has as many columns as x, or one for the whole row.
  void (*sigmoid_mul)(Matrix x, Matrix gate, Matrix out, int64_t first, int64_t last);
  void (*add)(Matrix a, Matrix b, Matrix out, int64_t first, int64_t last);
  void (*rope)(const Rotation& rotation, Matrix x, Matrix out, int64_t first, int64_t last);
  void (*store_kv)(const KVCache& cache, int layer, const SequenceView& sequence, Matrix k, Matrix v, int64_t first,
                   int64_t last);
  void (*attention)(const AttentionPiece& piece);
  void (*causal_conv1d)(const ConvPiece& piece);
  void (*gated_delta_rule)(const DeltaRulePiece& piece);
  void (*route)(const RouteSpec& spec, Matrix logits, const RouteOutput& out, int64_t first, int64_t last);
  // Row r is the sum over its weights, in order, of weights[i] * x[places[r * weights.cols + i]].
  void (*combine)(Matrix x, const int32_t* places, Matrix weights, Matrix out, int64_t first, int64_t last);
  bool (*find_maximum)(const float* x, int64_t n, float* maximum);
  float (*log_sum_exp)(const float* x, int64_t n, float maximum);
  void (*exp_scaled)(const float* x, int64_t n, float maximum, float inverse_temperature, float* out);
  // The machine's limits: reads `bytes`; does `rounds` rounds of independent multiply-adds and returns how many
  // operations (two per multiply-add) they were. `sink` keeps the compiler from dropping the work.
  void (*read_bytes)(const uint8_t* from, size_t bytes, uint32_t* sink);
  int64_t (*peak)(Peak kind, int64_t rounds, uint32_t* sink);
};

namespace portable {
extern const Kernels kernels;
}
#if defined(JINN_X86)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx_vnni {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace amx {
extern const Kernels kernels;
}
#endif

// The best set this machine has, or the one named; throws std::invalid_argument naming what there is.
const Kernels& choose_kernels(const char* name);
// Names that this machine can run, best first.
int available_kernels(const Kernels** out, int capacity);

}  // namespace jinn
