// A convolution of each column with its past, and silu.
#include <cstring>
#include <vector>

#include "kernels.h"
#include "ops.h"
#include "vec.h"

namespace jinn::JINN_ISA {
namespace {

// The inputs of a sequence's step, for some columns: row `t` is that of its token t, from 1 - conv_kernel on.
class Inputs {
 public:
  explicit Inputs(const ConvPiece& piece)
      : piece_(piece), cols_(piece.last_col - piece.first_col), history_(static_cast<size_t>(past() * cols_)) {
    if (piece.step.is_first) return;
    for (int64_t i = 0; i < past(); ++i) copy(history_.data() + i * cols_, kept(i + piece.step.num_accepted));
  }

  const float* row(int64_t t) const {
    if (t < 0) return history_.data() + (past() + t) * cols_;
    return piece_.x.row(piece_.step.first_token + t) + piece_.first_col;
  }

  void copy(float* to, const float* from) const { std::memcpy(to, from, sizeof(float) * static_cast<size_t>(cols_)); }

 private:
  int64_t past() const { return piece_.conv_kernel - 1; }
  // Of the slot's tail, followed by its drafts.
  const float* kept(int64_t i) const {
    const float* rows = i < past() ? piece_.tail : piece_.log;
    return rows + (i < past() ? i : i - past()) * piece_.x.cols + piece_.first_col;
  }

  const ConvPiece& piece_;
  int64_t cols_;
  std::vector<float> history_;
};

void convolve(const ConvPiece& piece, const Inputs& inputs, int64_t t) {
  float* out = piece.out.row(piece.step.first_token + t);
  for (int64_t col = piece.first_col; col < piece.last_col; col += kLanes) {
    const int count = static_cast<int>(piece.last_col - col < kLanes ? piece.last_col - col : kLanes);
    f32x16 sum{};
    for (int64_t j = 0; j < piece.conv_kernel; ++j) {
      const float* x = inputs.row(t - piece.conv_kernel + 1 + j) + (col - piece.first_col);
      sum = fma(load_part(piece.taps + j * piece.x.cols + col, count), load_part(x, count), sum);
    }
    store_part(out + col, sum * sigmoid(sum), count);
  }
}

}  // namespace

void causal_conv1d(const ConvPiece& piece) {
  const Inputs inputs(piece);
  for (int64_t t = 0; t < piece.step.num_tokens(); ++t) convolve(piece, inputs, t);
  const int64_t end = piece.step.num_taken_in, past = piece.conv_kernel - 1;
  for (int64_t i = 0; i < past; ++i) {
    inputs.copy(piece.tail + i * piece.x.cols + piece.first_col, inputs.row(end - past + i));
  }
  for (int64_t draft = 0; draft < piece.step.num_drafts; ++draft) {
    inputs.copy(piece.log + draft * piece.x.cols + piece.first_col, inputs.row(end + draft));
  }
}

}  // namespace jinn::JINN_ISA
