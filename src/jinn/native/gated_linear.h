// silu(gate) * up as the next linear's input, where gate and up are linears of one input.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace jinn {

struct GatedPiece {
  LinearPiece gate, up;  // all their tiles, without outputs
  Activations out;
  int64_t first_out_row;  // where the result of the pieces' first row goes
  bool round_to_bf16;
};

// Columns of `out` come in runs of kGroup, which an input of integer weights needs whole. Computes runs first ..
// last - 1 for the pieces' rows, at most kLinearRows. Gate and up stay in the thread's cache.
void gated_linear(const Kernels& kernels, const GatedPiece& piece, int64_t first, int64_t last);

}  // namespace jinn
