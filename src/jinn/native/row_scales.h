// What integer linears add up: exact dot products, scaled, of rows that lie in one block of activations.
#pragma once

#include "block_codes.h"
#include "kernels.h"

namespace jinn::JINN_ISA {

// `part` says which of Codes::kScales scales of a group, and which of its columns, is meant.
template <class Codes>
class RowScales {
 public:
  RowScales(const Activations& x, int64_t first_row)
      : scales_(x.scales(first_row)),
        sums_(x.sums(first_row)),
        scaled_sums_(x.scaled_sums(first_row)),
        half_sums_(x.half_sums(first_row)),
        has_low_(is_wide(x.type) ? x.has_low(first_row) : nullptr) {}

  // The sum of a row's codes.
  int32_t sum(int64_t group, int part, int row) const {
    const int64_t at = group * kActivationRows + row;
    if constexpr (Codes::kScales == 1) return sums_[at];
    return part == 0 ? half_sums_[at] : sums_[at] - half_sums_[at];
  }

  // Whether any of R rows has low halves in a group.
  template <int R>
  bool any_low(int64_t group, int first) const {
    int any = 0;
    for (int r = first; r < first + R; ++r) any |= has_low_[group * kActivationRows + r];
    return any != 0;
  }

  // y, and what the dot product of codes less their offset adds to it.
  f32x16 add(i32x16 dot, f32x16 scale, f32x16 min, int64_t group, int part, int row, f32x16 y) const {
    const float row_scale = scales_[group * kActivationRows + row];
    y = fma(to_float(dot), scale * row_scale, y);
    if constexpr (Codes::kHasMins) y = fma(min, set1(scaled_sum(group, part, row)), y);
    return y;
  }

 private:
  float scaled_sum(int64_t group, int part, int row) const {
    const int64_t at = group * kActivationRows + row;
    if constexpr (Codes::kScales == 1) return scaled_sums_[at];
    return scales_[at] * static_cast<float>(sum(group, part, row));
  }

  const float* scales_;
  const int32_t* sums_;
  const float* scaled_sums_;
  const int32_t* half_sums_;
  const uint8_t* has_low_;
};

}  // namespace jinn::JINN_ISA
