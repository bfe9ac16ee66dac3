// Rows that are multiplied together, and the numbers that they hold in float32.
#pragma once

#include <span>

#include "row_scales.h"

namespace jinn::JINN_ISA {

// Rows of one block of activations, and their outliers, group by group.
struct RowChunk {
  int64_t first_row;
  int num_rows;
  RowPlanes planes;
  const int32_t* starts;  // [num_groups + 1], where a group's begin in the lists; null where there are none
  const float* outliers;
  const uint32_t* places;  // kActivationRows * column of the group + row of the chunk

  // Calls `use` with each outlier of a group, its column in the group and its row in the chunk.
  template <class Use>
  __attribute__((always_inline)) void outliers_of(int64_t group, const Use& use) const {
    if (starts == nullptr) return;
    for (int32_t i = starts[group], end = starts[group + 1]; i < end; ++i) {
      const uint32_t place = places[i];
      use(outliers[i], place / kActivationRows, place % kActivationRows);
    }
  }
};

// Lists the outliers of chunks for as long as the thread lists no others.
class OutlierLists {
 public:
  OutlierLists(int64_t num_groups, int64_t num_rows) : num_groups_(num_groups) {
    static thread_local Scratch<float> outliers;
    static thread_local Scratch<uint32_t> places;
    static thread_local Scratch<int32_t> starts;
    const int64_t room = kMaxOutliers * num_rows * num_groups;
    outliers_ = outliers.of(room);
    places_ = places.of(room);
    starts_ = starts.of(num_rows * (num_groups + 1));
  }

  // Of Activations, 16 lanes from the chunk's first row on are read, and those beyond its rows dropped.
  void add(const Activations& x, RowChunk& chunk) {
    const uint32_t is_of_chunk = (1u << chunk.num_rows) - 1;
    chunk.starts = starts_;
    chunk.outliers = outliers_;
    chunk.places = places_;
    int32_t count = 0;
    for (int64_t g = 0; g < num_groups_; ++g) {
      *starts_++ = count;
      for (int i = 0; i < kMaxOutliers; ++i) {
        const float* outliers = x.outliers(chunk.first_row, i) + g * kActivationRows;
        const uint8_t* cols = x.outlier_cols(chunk.first_row, i) + g * kActivationRows;
        uint32_t rows = lane_bits(~(load(outliers) == set1(0.0f))) & is_of_chunk;
        if (rows == 0) break;
        for (; rows; rows &= rows - 1, ++count) {
          const uint32_t row = static_cast<uint32_t>(__builtin_ctz(rows));
          outliers_[count] = outliers[row];
          places_[count] = cols[row] * kActivationRows + row;
        }
      }
    }
    *starts_++ = count;
    outliers_ += count;
    places_ += count;
  }

 private:
  int64_t num_groups_;
  float* outliers_;
  uint32_t* places_;
  int32_t* starts_;
};

// Rows first_row .. last_row - 1 in chunks, until the thread's next: of MaxRows rows, a power of two, while there are
// so many, then of half of that, down to FewRows, and what is left.
template <int MaxRows, int FewRows>
std::span<const RowChunk> chunks_of(const Activations& x, int64_t num_groups, int64_t first_row, int64_t last_row) {
  static thread_local Scratch<RowChunk> scratch;
  const bool has_outliers = x.type == ActivationType::Mixed;
  OutlierLists lists(num_groups, has_outliers ? last_row - first_row : 0);
  RowChunk* chunks = scratch.of(last_row - first_row);
  size_t count = 0;
  for (int64_t row = first_row; row < last_row; row += chunks[count++].num_rows) {
    int rows = MaxRows;
    while (rows > FewRows && row + rows > last_row) rows /= 2;
    if (row + rows > last_row) rows = static_cast<int>(last_row - row);
    chunks[count] = {row, rows, rows_of_block(x, row), nullptr, nullptr, nullptr};
    if (has_outliers) lists.add(x, chunks[count]);
  }
  return {chunks, count};
}

}  // namespace jinn::JINN_ISA
