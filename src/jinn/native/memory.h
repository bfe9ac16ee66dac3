// Anonymous memory, zeroed and given back to the system when its owner goes.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

namespace jinn {

class Memory {
 public:
  // Pages come when they are first written. Huge ones spare the TLB where all of it will be read.
  Memory(size_t bytes, bool use_huge_pages) : bytes_(bytes) {
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
    if (use_huge_pages) madvise(data, bytes, MADV_HUGEPAGE);
    data_ = static_cast<uint8_t*>(data);
  }
  Memory(Memory&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
  Memory& operator=(Memory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Memory() {
    if (data_) munmap(data_, bytes_);
  }

  uint8_t* data() const { return data_; }

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_;
};

}  // namespace jinn
