// This instruction set's table.
#include "kernels.h"

#include "ops.h"

#define JINN_STRING_OF(x) #x
#define JINN_STRING(x) JINN_STRING_OF(x)

namespace jinn::JINN_ISA {

extern const Kernels kernels;
const Kernels kernels = {
    JINN_STRING(JINN_ISA),
    quantize_rows,
    linear,
    rms_norm,
    silu_mul,
    sigmoid_mul,
    add,
    rope,
    store_kv,
    attention,
    causal_conv1d,
    gated_delta_rule,
    route,
    combine,
    find_maximum,
    log_sum_exp,
    exp_scaled,
    read_bytes,
    peak,
};

}  // namespace jinn::JINN_ISA
