// The instructions of linear attention: they read and write the slots of a StateCache.
#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "instructions.h"

namespace jinn {
namespace {

constexpr int64_t kConvCols = 512;  // columns that one claim covers

// Items are (sequence, range of columns).
class CausalConv1d : public Instruction {
 public:
  CausalConv1d(Operand x, int layer, const StateSpec& spec, std::vector<float> taps, Operand out)
      : x_(x), layer_(layer), spec_(spec), taps_(std::move(taps)), out_(out) {}
  std::string name() const override { return "causal_conv1d"; }
  int64_t num_items(const Step& step) const override { return step.batch.num_seqs * num_ranges(); }
  void run(const Step& step, int64_t item) const override {
    const int64_t s = item / num_ranges(), first_col = item % num_ranges() * kConvCols;
    const int64_t slot = step.batch.state_slots[s];
    step.kernels.causal_conv1d({taps_.data(), spec_.conv_kernel, step.matrix(x_), step.matrix(out_),
                                step.batch.state_step(s), step.states->tail(layer_, slot),
                                step.states->inputs(layer_, slot), first_col,
                                std::min(x_.cols, first_col + kConvCols)});
  }

 private:
  int64_t num_ranges() const { return ceil_div(x_.cols, kConvCols); }

  Operand x_;
  int layer_;
  StateSpec spec_;
  std::vector<float> taps_;
  Operand out_;
};

// Items are (sequence, value head, slice of its columns).
class GatedDeltaRule : public Instruction {
 public:
  GatedDeltaRule(Operand qkv, Operand a, Operand b, int layer, const StateSpec& spec, std::vector<float> decay_rates,
                 std::vector<float> dt_bias, Operand out)
      : qkv_(qkv),
        a_(a),
        b_(b),
        layer_(layer),
        spec_(spec),
        decay_rates_(std::move(decay_rates)),
        dt_bias_(std::move(dt_bias)),
        out_(out) {}
  std::string name() const override { return "gated_delta_rule"; }
  int64_t num_items(const Step& step) const override {
    return step.batch.num_seqs * spec_.num_value_heads * spec_.num_slices();
  }
  void run(const Step& step, int64_t item) const override {
    const int64_t slice = item % spec_.num_slices();
    const int64_t head = item / spec_.num_slices() % spec_.num_value_heads;
    const int64_t s = item / spec_.num_slices() / spec_.num_value_heads;
    const int64_t key_head = head / (spec_.num_value_heads / spec_.num_key_heads), key_dim = spec_.key_dim;
    const int64_t all_keys = spec_.num_key_heads * key_dim, first_col = head * spec_.value_dim + slice * kStateCols;
    const int64_t cols = std::min(kStateCols, spec_.value_dim - slice * kStateCols);
    const Matrix qkv = step.matrix(qkv_);
    step.kernels.gated_delta_rule(
        {columns(qkv, key_head * key_dim, key_dim), columns(qkv, all_keys + key_head * key_dim, key_dim),
         columns(qkv, 2 * all_keys + first_col, cols), columns(step.matrix(a_), head, 1),
         columns(step.matrix(b_), head, 1), columns(step.matrix(out_), first_col, cols),
         decay_rates_[static_cast<size_t>(head)], dt_bias_[static_cast<size_t>(head)], step.batch.state_step(s),
         step.states->slice(layer_, step.batch.state_slots[s], head, slice)});
  }

 private:
  static Matrix columns(const Matrix& matrix, int64_t first_col, int64_t cols) {
    return {matrix.data + first_col, matrix.stride, cols};
  }

  Operand qkv_, a_, b_;
  int layer_;
  StateSpec spec_;
  std::vector<float> decay_rates_, dt_bias_;
  Operand out_;
};

}  // namespace

void Program::use_states(int layer, const StateSpec& spec) {
  const size_t index = static_cast<size_t>(layer);
  expect(layer >= 0 && index <= state_specs_.size(), "[program] expected layers with states in order");
  if (index == state_specs_.size()) state_specs_.push_back(spec);
  expect(state_specs_[index] == spec, "[program] expected one state spec per layer");
}

void Program::causal_conv1d(Operand x, Operand out, int layer, const StateSpec& spec, std::vector<float> taps) {
  expect(x.cols == spec.conv_dim() && out.cols == x.cols, "[causal_conv1d] expected conv_dim columns");
  expect(static_cast<int64_t>(taps.size()) == spec.conv_kernel * x.cols,
         "[causal_conv1d] expected conv_kernel taps per column");
  use_states(layer, spec);
  append(std::make_unique<CausalConv1d>(x, layer, spec, std::move(taps), out));
}

void Program::gated_delta_rule(Operand qkv, Operand a, Operand b, Operand out, int layer, const StateSpec& spec,
                               std::vector<float> decay_rates, std::vector<float> dt_bias) {
  expect(qkv.cols == spec.conv_dim() && out.cols == spec.num_value_heads * spec.value_dim,
         "[gated_delta_rule] expected conv_dim columns, and the value heads' as output");
  expect(a.cols == spec.num_value_heads && b.cols == a.cols && static_cast<int64_t>(decay_rates.size()) == a.cols &&
             dt_bias.size() == decay_rates.size(),
         "[gated_delta_rule] expected a, b, A_log and dt_bias per value head");
  use_states(layer, spec);
  append(std::make_unique<GatedDeltaRule>(qkv, a, b, layer, spec, std::move(decay_rates), std::move(dt_bias), out));
}

}  // namespace jinn
