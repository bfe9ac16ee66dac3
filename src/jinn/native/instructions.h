// What the files that define instructions share.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "program.h"

namespace jinn {

constexpr int64_t kRowsPerItem = kActivationRows;  // rows of a row-wise op that one claim covers
constexpr int64_t kLinearRows = 64;                // rows that a reading of integer weights is shared by
constexpr int64_t kClaimsPerThread = 8;            // enough to even out threads that run at different speeds
constexpr int64_t kWeightClaimsPerThread = 3;      // the same of few rows: each claim's first weights come slowly

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where item `i` of `count` starts and ends in work of `size` pieces. Items shrink toward the end, so that threads end
// together: the first takes some 2 / count of it all, the last 1 / count^2.
inline std::pair<int64_t, int64_t> item_range(int64_t i, int64_t count, int64_t size) {
  const auto start = [&](int64_t item) { return size * item * (2 * count - item) / (count * count); };
  return {start(i), start(i + 1)};
}

// Into how many blocks `size` pieces of weights are divided that are multiplied with so many blocks of rows.
inline int64_t weight_blocks(int64_t num_threads, int64_t row_blocks, int64_t size) {
  const int64_t claims = (row_blocks > 1 ? kClaimsPerThread : kWeightClaimsPerThread) * num_threads;
  return std::clamp<int64_t>(claims / std::max<int64_t>(1, row_blocks), 1, size);
}

inline void expect(bool condition, const std::string& what) {
  if (!condition) throw std::invalid_argument(what);
}

// Ops that compute each row by itself.
class RowWise : public Instruction {
 public:
  explicit RowWise(int buffer) : buffer_(buffer) {}
  int row_buffer() const override { return buffer_; }
  int64_t num_items(const Step& step) const override { return ceil_div(step.num_rows(buffer_), kRowsPerItem); }
  void run(const Step& step, int64_t item) const override {
    rows(step, item * kRowsPerItem, std::min(step.num_rows(buffer_), (item + 1) * kRowsPerItem));
  }
  virtual void rows(const Step& step, int64_t first, int64_t last) const = 0;

 protected:
  int buffer_;
};

}  // namespace jinn
