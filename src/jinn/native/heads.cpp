// Instructions that know a value's columns as heads.
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "instructions.h"

namespace jinn {
namespace {

void copy(const float* from, int64_t count, float* to) {
  std::memcpy(to, from, sizeof(float) * static_cast<size_t>(count));
}

// The parts of a value's heads, side by side or apart.
class HeadParts : public RowWise {
 public:
  HeadParts(Operand whole, std::vector<Operand> parts, int64_t num_heads, int row_buffer)
      : RowWise(row_buffer), whole_(whole), parts_(std::move(parts)), num_heads_(num_heads) {}
  void rows(const Step& step, int64_t first, int64_t last) const override {
    const Matrix whole = step.matrix(whole_);
    int64_t start = 0;  // of a part's run in each head
    for (const Operand& operand : parts_) {
      const Matrix part = step.matrix(operand);
      const int64_t width = operand.cols / num_heads_;
      for (int64_t row = first; row < last; ++row) {
        for (int64_t h = 0; h < num_heads_; ++h) {
          move(whole.row(row) + h * (whole.cols / num_heads_) + start, part.row(row) + h * width, width);
        }
      }
      start += width;
    }
  }

 private:
  virtual void move(float* whole, float* part, int64_t width) const = 0;

  Operand whole_;
  std::vector<Operand> parts_;
  int64_t num_heads_;
};

class SplitHeads : public HeadParts {
 public:
  SplitHeads(Operand x, std::vector<Operand> outputs, int64_t num_heads)
      : HeadParts(x, std::move(outputs), num_heads, x.buffer) {}
  std::string name() const override { return "split_heads"; }

 private:
  void move(float* whole, float* part, int64_t width) const override { copy(whole, width, part); }
};

class JoinHeads : public HeadParts {
 public:
  JoinHeads(std::vector<Operand> values, int64_t num_heads, Operand out)
      : HeadParts(out, std::move(values), num_heads, out.buffer) {}
  std::string name() const override { return "join_heads"; }

 private:
  void move(float* whole, float* part, int64_t width) const override { copy(part, width, whole); }
};

// Items are (head, block of rows).
class HeadLinear : public Instruction {
 public:
  HeadLinear(int input, ActivationType type, std::shared_ptr<PackedExperts> weight, Operand out)
      : input_(input), type_(type), weight_(std::move(weight)), out_(out) {}
  std::string name() const override { return "head_linear " + std::to_string(out_.cols); }
  int64_t num_items(const Step& step) const override { return weight_->num_experts() * row_blocks(step); }
  void run(const Step& step, int64_t item) const override {
    const int64_t head = item / row_blocks(step), first_row = item % row_blocks(step) * kLinearRows;
    const int64_t first_tile = weight_->first_tile(head), out_cols = weight_->rows();
    Activations x{step.buffer(input_), step.row_bytes(input_), weight_->num_experts() * weight_->cols(), type_};
    x.first_col = head * weight_->cols();
    const Matrix out = step.matrix(out_);
    step.kernels.linear({&weight_->tensor(),
                         nullptr,
                         x,
                         {out.data + head * out_cols, out.stride, out_cols},
                         nullptr,
                         first_tile,
                         first_tile + weight_->num_tiles(),
                         first_row,
                         std::min(step.num_rows(input_), first_row + kLinearRows),
                         first_tile * kTileRows});
  }

 private:
  int64_t row_blocks(const Step& step) const { return ceil_div(step.num_rows(input_), kLinearRows); }

  int input_;
  ActivationType type_;
  std::shared_ptr<PackedExperts> weight_;
  Operand out_;
};

bool are_parts(const std::vector<Operand>& parts, int64_t num_heads, const Operand& whole) {
  int64_t cols = 0;
  for (const Operand& part : parts) {
    if (num_heads < 1 || part.cols % num_heads != 0) return false;
    cols += part.cols;
  }
  return cols == whole.cols;
}

}  // namespace

void Program::split_heads(Operand x, std::vector<Operand> outputs, int64_t num_heads) {
  expect(are_parts(outputs, num_heads, x), "[split_heads] expected runs that make up each head");
  append(std::make_unique<SplitHeads>(x, std::move(outputs), num_heads));
}

void Program::join_heads(std::vector<Operand> values, Operand out, int64_t num_heads) {
  expect(are_parts(values, num_heads, out), "[join_heads] expected runs that make up each head");
  append(std::make_unique<JoinHeads>(std::move(values), num_heads, out));
}

void Program::head_linear(int input_buffer, ActivationType type, std::shared_ptr<PackedExperts> weight, Operand out) {
  const int64_t cols = weight->num_experts() * weight->cols();
  expect(activation_stride(type, cols) <= buffers_[static_cast<size_t>(input_buffer)].row_bytes,
         "[head_linear] expected an input of all heads");
  expect(weight->num_experts() * weight->rows() == out.cols, "[head_linear] expected the heads' outputs side by side");
  expect(type != ActivationType::BF16 || weight->cols() % 2 == 0, "[head_linear] expected pairs of bf16 columns");
  append(std::make_unique<HeadLinear>(input_buffer, type, std::move(weight), out));
}

}  // namespace jinn
