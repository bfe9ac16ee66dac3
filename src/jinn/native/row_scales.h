// What integer linears add up: exact dot products, scaled, of rows that lie in one block of activations.
#pragma once

#include <cstring>

#include "block_codes.h"
#include "kernels.h"
#include "scratch.h"

namespace jinn::JINN_ISA {

// Where the groups of rows begin that lie side by side.
struct RowPlanes {
  const uint8_t* codes;
  const float* scales;
  const int32_t* sums;
  const float* scaled_sums;
  const int32_t* half_sums;
};

// Rows from `row` to the end of its block: group g is kActivationRows * g groups or numbers further.
inline RowPlanes rows_of_block(const Activations& x, int64_t row) {
  return {x.codes(row), x.scales(row), x.sums(row), x.scaled_sums(row), x.half_sums(row)};
}

// A copy of what RowScales reads of one row, in which group g is g groups or numbers further, until the thread's next.
// It takes a sixteenth of the lines of the first level of cache, through which weights stream.
template <class Codes>
RowPlanes copy_row(const Activations& x, int64_t row, int64_t num_groups) {
  static thread_local Scratch<uint8_t> scratch;
  const RowPlanes from = rows_of_block(x, row);
  const int64_t group_bytes = x.group_bytes();
  uint8_t* codes = scratch.of(num_groups * (group_bytes + 16));
  float* scales = reinterpret_cast<float*>(codes + num_groups * group_bytes);
  int32_t* sums = reinterpret_cast<int32_t*>(scales + num_groups);
  float* scaled_sums = reinterpret_cast<float*>(sums + num_groups);
  int32_t* half_sums = reinterpret_cast<int32_t*>(scaled_sums + num_groups);
  for (int64_t g = 0; g < num_groups; ++g) {
    const int64_t at = g * kActivationRows;
    std::memcpy(codes + g * group_bytes, from.codes + at * group_bytes, static_cast<size_t>(group_bytes));
    scales[g] = from.scales[at];
    if constexpr (Codes::kOffset != 0 || Codes::kScales > 1) sums[g] = from.sums[at];
    if constexpr (Codes::kHasMins && Codes::kScales == 1) scaled_sums[g] = from.scaled_sums[at];
    if constexpr (Codes::kScales > 1) half_sums[g] = from.half_sums[at];
  }
  return {codes, scales, sums, scaled_sums, half_sums};
}

// Of rows whose groups are `BlockRows` apart. `part` says which of Codes::kScales scales of a group, and which of its
// columns, is meant.
template <class Codes, int BlockRows = kActivationRows>
class RowScales {
 public:
  explicit RowScales(const RowPlanes& rows) : rows_(rows) {}

  // The sum of a row's codes.
  int32_t sum(int64_t group, int part, int row) const {
    const int64_t at = group * BlockRows + row;
    if constexpr (Codes::kScales == 1) return rows_.sums[at];
    return part == 0 ? rows_.half_sums[at] : rows_.sums[at] - rows_.half_sums[at];
  }

  // y, and what the dot product of codes less their offset adds to it.
  f32x16 add(i32x16 dot, f32x16 scale, f32x16 min, int64_t group, int part, int row, f32x16 y) const {
    const float row_scale = rows_.scales[group * BlockRows + row];
    y = fma(to_float(dot), scale * row_scale, y);
    if constexpr (Codes::kHasMins) y = fma(min, set1(scaled_sum(group, part, row)), y);
    return y;
  }

 private:
  float scaled_sum(int64_t group, int part, int row) const {
    const int64_t at = group * BlockRows + row;
    if constexpr (Codes::kScales == 1) return rows_.scaled_sums[at];
    return rows_.scales[at] * static_cast<float>(sum(group, part, row));
  }

  RowPlanes rows_;
};

}  // namespace jinn::JINN_ISA
