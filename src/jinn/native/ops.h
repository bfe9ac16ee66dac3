// What one instruction set's kernel files define; kernels.cpp gathers them into its table.
#pragma once

#include "kernels.h"

namespace jinn::JINN_ISA {

void quantize_rows(bool round_to_bf16, Matrix x, Activations out, int64_t first, int64_t last);
void linear(const LinearPiece& piece);
void linear_integer(const LinearPiece& piece);
void linear_float(const LinearPiece& piece);
void rms_norm(Matrix x, const float* weight, int64_t width, float eps, Matrix out, int64_t first, int64_t last);
void silu_mul(Matrix gate, Matrix up, Matrix out, int64_t first, int64_t last);
void sigmoid_mul(Matrix x, Matrix gate, Matrix out, int64_t first, int64_t last);
void add(Matrix a, Matrix b, Matrix out, int64_t first, int64_t last);
void rope(const Rotation& rotation, Matrix x, Matrix out, int64_t first, int64_t last);
void store_kv(const KVCache& cache, int layer, const SequenceView& sequence, Matrix k, Matrix v, int64_t first,
              int64_t last);
void attention(const AttentionPiece& piece);
void causal_conv1d(const ConvPiece& piece);
void gated_delta_rule(const DeltaRulePiece& piece);
void route(const RouteSpec& spec, Matrix logits, const RouteOutput& out, int64_t first, int64_t last);
void combine(Matrix x, const int32_t* places, Matrix weights, Matrix out, int64_t first, int64_t last);
bool find_maximum(const float* x, int64_t n, float* maximum);
float log_sum_exp(const float* x, int64_t n, float maximum);
void exp_scaled(const float* x, int64_t n, float maximum, float inverse_temperature, float* out);
void read_bytes(const uint8_t* from, size_t bytes, uint32_t* sink);
int64_t peak(Peak kind, int64_t rounds, uint32_t* sink);

}  // namespace jinn::JINN_ISA
