// Memory from the system, zeroed, or a range of a file; given back when its owner goes.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

namespace jinn {

// A range of a file that starts at a page. What is written to it, if that is allowed, is written to the file.
struct FileRange {
  std::string path;
  size_t offset;
  bool is_writable;
};

class Memory {
 public:
  // Pages come when they are first written. Huge ones spare the TLB where all of it will be read.
  Memory(size_t bytes, bool use_huge_pages) : bytes_(bytes) {
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
    if (use_huge_pages) madvise(data, bytes, MADV_HUGEPAGE);
    data_ = static_cast<uint8_t*>(data);
  }
  // Pages come from the file when they are first read, and may go whenever the system needs room.
  Memory(size_t bytes, const FileRange& range) : bytes_(bytes) {
    const int file = open(range.path.c_str(), (range.is_writable ? O_RDWR : O_RDONLY) | O_CLOEXEC);
    struct stat status;
    const bool is_long_enough = file >= 0 && fstat(file, &status) == 0 && status.st_size >= 0 &&
                                static_cast<size_t>(status.st_size) >= range.offset + bytes;
    const int access = PROT_READ | (range.is_writable ? PROT_WRITE : 0);
    void* data =
        is_long_enough ? mmap(nullptr, bytes, access, MAP_SHARED, file, static_cast<off_t>(range.offset)) : MAP_FAILED;
    if (file >= 0) close(file);
    if (data == MAP_FAILED) throw std::invalid_argument("[memory] " + range.path + " cannot be mapped where expected");
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
  size_t size() const { return bytes_; }
  // Of a file: lets its pages go; they are read again when touched.
  void drop_pages() const { madvise(data_, bytes_, MADV_DONTNEED); }

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_;
};

}  // namespace jinn
