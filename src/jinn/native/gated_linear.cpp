#include "gated_linear.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "instructions.h"

namespace jinn {
namespace {

constexpr int64_t kTilesPerRun = kGroup / kTileRows;
constexpr int64_t kRowsTimesRuns = 256;  // that are computed at once: 32 KB of gate, and of up

// The piece's tiles first_tile .. last_tile - 1, all rows, at `to`.
void multiply(const Kernels& kernels, LinearPiece piece, int64_t first_tile, int64_t last_tile, Matrix to) {
  if (piece.bias) piece.bias += first_tile * kTileRows;
  piece.last_tile = std::min(piece.last_tile, piece.first_tile + last_tile);
  piece.first_tile += first_tile;
  piece.first_weight_row = piece.first_tile * kTileRows;
  piece.output = to.counted_from(piece.first_row);
  kernels.linear(piece);
}

// Items are blocks of (runs of columns, rows).
class GatedLinear : public Instruction {
 public:
  GatedLinear(int input, ActivationType type, std::vector<std::shared_ptr<PackedTensor>> weights,
              std::vector<std::vector<float>> biases, ActivationType out_type, bool round_to_bf16, int out)
      : input_(input),
        type_(type),
        weights_(std::move(weights)),
        biases_(std::move(biases)),
        out_type_(out_type),
        round_to_bf16_(round_to_bf16),
        out_(out) {}
  std::string name() const override { return "gated_linear " + std::to_string(weights_[0]->rows()); }

  int64_t num_items(const Step& step) const override { return run_blocks(step) * row_blocks(step); }

  std::span<const uint8_t> first_weights(const Step& step, int64_t item) const override {
    if (item >= num_items(step)) return {};
    const auto [first, last] = runs_of(step, item);
    const PackedTensor& gate = *weights_[0];
    return gate.tiles(first * kTilesPerRun, std::min(gate.num_tiles(), last * kTilesPerRun));
  }

  void run(const Step& step, int64_t item) const override {
    const int64_t first_row = item % row_blocks(step) * kLinearRows;
    const int64_t last_row = std::min(step.num_rows(input_), first_row + kLinearRows);
    const auto [first, last] = runs_of(step, item);
    const Activations out{step.buffer(out_), step.row_bytes(out_), weights_[0]->rows(), out_type_};
    gated_linear(
        step.kernels,
        {piece(step, 0, first_row, last_row), piece(step, 1, first_row, last_row), out, first_row, round_to_bf16_},
        first, last);
  }

 private:
  int64_t num_runs() const { return ceil_div(weights_[0]->rows(), kGroup); }
  int64_t row_blocks(const Step& step) const { return ceil_div(step.num_rows(input_), kLinearRows); }
  std::pair<int64_t, int64_t> runs_of(const Step& step, int64_t item) const {
    return item_range(item / row_blocks(step), run_blocks(step), num_runs());
  }
  int64_t run_blocks(const Step& step) const { return weight_blocks(step.num_threads(), row_blocks(step), num_runs()); }

  LinearPiece piece(const Step& step, size_t w, int64_t first_row, int64_t last_row) const {
    const PackedTensor& weight = *weights_[w];
    return {&weight,
            biases_[w].empty() ? nullptr : biases_[w].data(),
            {step.buffer(input_), step.row_bytes(input_), weight.cols(), type_},
            {},
            nullptr,
            0,
            weight.num_tiles(),
            first_row,
            last_row};
  }

  int input_;
  ActivationType type_;
  std::vector<std::shared_ptr<PackedTensor>> weights_;  // gate and up
  std::vector<std::vector<float>> biases_;
  ActivationType out_type_;
  bool round_to_bf16_;
  int out_;
};

}  // namespace

void gated_linear(const Kernels& kernels, const GatedPiece& piece, int64_t first, int64_t last) {
  alignas(64) float hidden[2][kRowsTimesRuns * kGroup];
  const int64_t first_row = piece.gate.first_row, num_rows = piece.gate.last_row - first_row;
  const int64_t at_once = kRowsTimesRuns / num_rows;
  for (int64_t run = first; run < last; run += at_once) {
    const int64_t end = std::min(last, run + at_once), first_col = run * kGroup;
    const int64_t cols = std::min(piece.out.cols, end * kGroup) - first_col;
    const Matrix gate{hidden[0], at_once * kGroup, cols}, up{hidden[1], at_once * kGroup, cols};
    multiply(kernels, piece.gate, run * kTilesPerRun, end * kTilesPerRun, gate);
    multiply(kernels, piece.up, run * kTilesPerRun, end * kTilesPerRun, up);
    kernels.silu_mul(gate, up, gate, 0, num_rows);
    Activations out = piece.out;
    out.first_col = first_col;
    kernels.quantize_rows(piece.round_to_bf16, gate.counted_from(piece.first_out_row), out, piece.first_out_row,
                          piece.first_out_row + num_rows);
  }
}

void Program::gated_linear(int input_buffer, ActivationType type, std::vector<std::shared_ptr<PackedTensor>> weights,
                           std::vector<std::vector<float>> biases, ActivationType out_type, bool round_to_bf16,
                           int out_buffer) {
  expect(weights.size() == 2 && biases.size() == 2, "[gated_linear] expected gate and up");
  const int64_t rows = weights[0]->rows(), cols = weights[0]->cols();
  expect(rows == weights[1]->rows() && cols == weights[1]->cols(), "[gated_linear] expected weights of one shape");
  for (const std::vector<float>& bias : biases) {
    expect(bias.empty() || static_cast<int64_t>(bias.size()) == rows, "[gated_linear] expected a bias per weight row");
  }
  expect(activation_stride(type, cols) <= buffers_[static_cast<size_t>(input_buffer)].row_bytes &&
             activation_stride(out_type, rows) <= buffers_[static_cast<size_t>(out_buffer)].row_bytes,
         "[gated_linear] expected an input and a result as wide as the weights");
  expect(!is_integer(out_type) || rows % kGroup == 0, "[gated_linear] expected columns in groups of 32");
  append(std::make_unique<GatedLinear>(input_buffer, type, std::move(weights), std::move(biases), out_type,
                                       round_to_bf16, out_buffer));
}

}  // namespace jinn
