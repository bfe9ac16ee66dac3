// Low-rank adapters (LoRA): what each sequence's adapter adds to a linear, as two products of small float32 matrices.
#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "instructions.h"

namespace jinn {
namespace {

constexpr int64_t kAdapterRows = 64;            // rows that one claim covers
constexpr int64_t kProductsPerClaim = 1 << 16;  // fewer are not worth another thread

// Items are (run of rows of one adapter, block of its rows, block of tiles); the tiles of all outputs count as one
// sequence. An adapter that has fewer tiles than the output has room for leaves the others out.
class AdapterLinear : public Instruction {
 public:
  AdapterLinear(std::vector<Operand> inputs, std::vector<Operand> outputs, AdapterWeights weights, bool is_sum)
      : inputs_(std::move(inputs)), outputs_(std::move(outputs)), weights_(std::move(weights)), is_sum_(is_sum) {
    for (size_t p = 0; p < outputs_.size(); ++p) {
      num_tiles_ += tiles(p);
      products_ += inputs_[p].cols * outputs_[p].cols;
    }
  }
  std::string name() const override { return "adapter_linear " + std::to_string(num_tiles_ * kTileRows); }

  int64_t num_items(const Step& step) const override {
    int64_t blocks = 0;
    for (const AdapterRun& run : step.adapter_runs) blocks += row_blocks(run);
    return blocks * tile_blocks(step);
  }

  void run(const Step& step, int64_t item) const override {
    int64_t block = item / tile_blocks(step);
    size_t r = 0;
    while (block >= row_blocks(step.adapter_runs[r])) block -= row_blocks(step.adapter_runs[r++]);
    const AdapterRun& run = step.adapter_runs[r];
    const int64_t first_row = run.first_row + block * kAdapterRows;
    const AdapterRun rows{run.adapter, first_row, std::min(run.last_row, first_row + kAdapterRows)};
    int64_t first = item % tile_blocks(step) * tiles_per_item(step), last = first + tiles_per_item(step);
    for (size_t p = 0; p < outputs_.size() && last > 0; ++p) {
      if (first < tiles(p)) tiles_of(step, p, rows, std::max<int64_t>(first, 0), last);
      first -= tiles(p);
      last -= tiles(p);
    }
  }

 private:
  int64_t tiles(size_t p) const { return ceil_div(outputs_[p].cols, kTileRows); }
  static int64_t row_blocks(const AdapterRun& run) { return ceil_div(run.last_row - run.first_row, kAdapterRows); }
  int64_t tile_blocks(const Step& step) const { return ceil_div(num_tiles_, tiles_per_item(step)); }
  int64_t tiles_per_item(const Step& step) const {
    const int64_t rows = std::min(step.num_rows(inputs_[0].buffer), kAdapterRows);
    const int64_t claims = ceil_div(products_ * rows, kProductsPerClaim);
    return ceil_div(num_tiles_, std::min<int64_t>(claims, kClaimsPerThread * step.num_threads()));
  }

  // `last` may be more than there are.
  void tiles_of(const Step& step, size_t p, const AdapterRun& rows, int64_t first, int64_t last) const {
    const PackedTensor* weight = weights_[p][static_cast<size_t>(rows.adapter)].get();
    if (!weight) return;
    last = std::min(last, weight->num_tiles());
    if (first >= last) return;
    const Matrix input = step.matrix(inputs_[p]), output = step.matrix(outputs_[p]);
    const int64_t row_bytes = input.stride * static_cast<int64_t>(sizeof(float));
    step.kernels.linear({weight,
                         nullptr,
                         {reinterpret_cast<uint8_t*>(input.data), row_bytes, weight->cols(), ActivationType::F32},
                         {output.data, output.stride, weight->rows()},
                         is_sum_ ? &output : nullptr,
                         first,
                         last,
                         rows.first_row,
                         rows.last_row});
  }

  std::vector<Operand> inputs_, outputs_;
  AdapterWeights weights_;
  bool is_sum_;
  int64_t num_tiles_ = 0, products_ = 0;  // of a row
};

}  // namespace

void Program::adapter_linear(std::vector<Operand> inputs, std::vector<Operand> outputs, AdapterWeights weights,
                             bool is_sum) {
  expect(!outputs.empty() && inputs.size() == outputs.size() && weights.size() == outputs.size(),
         "[adapter_linear] expected an input and weights per output");
  for (size_t p = 0; p < outputs.size(); ++p) {
    expect(rows_of(inputs[p]) == Rows::Tokens && rows_of(outputs[p]) == Rows::Tokens,
           "[adapter_linear] expected a row per token");
    const int64_t count = static_cast<int64_t>(weights[p].size());
    expect(count > 0 && (num_adapters_ == 0 || num_adapters_ == count),
           "[adapter_linear] expected as many weights as adapters");
    num_adapters_ = count;
    for (const auto& weight : weights[p]) {
      if (!weight) continue;
      expect(weight->format() == Format::F32, "[adapter_linear] expected float32 weights");
      expect(weight->cols() <= inputs[p].cols && weight->rows() <= outputs[p].cols,
             "[adapter_linear] expected weights that fit the input and the output");
    }
  }
  append(std::make_unique<AdapterLinear>(std::move(inputs), std::move(outputs), std::move(weights), is_sum));
}

}  // namespace jinn
