// Memory that a kernel works in.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "vec.h"

namespace jinn::JINN_ISA {

// Memory of a thread that grows to what its largest piece needs.
template <class Number>
class Scratch {
 public:
  Number* of(int64_t count) {
    if (count > size_) {
      const size_t bytes = (static_cast<size_t>(count) * sizeof(Number) + 63) / 64 * 64;
      data_.reset(static_cast<Number*>(std::aligned_alloc(64, bytes)));
      if (!data_) throw std::bad_alloc();
      size_ = count;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(Number* data) const { std::free(data); }
  };
  std::unique_ptr<Number, Free> data_;
  int64_t size_ = 0;
};

}  // namespace jinn::JINN_ISA
