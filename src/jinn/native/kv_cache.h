// The keys and values of all sequences, in fixed-size blocks.
//
// A block holds `block_size` consecutive positions of one sequence for all layers. Inside it, per layer and key/value
// head, each plane is made of 32-bit words that hold 4 / element size numbers:
//
//   keys     words [block_size / 16][key words][16 positions]     a word: consecutive columns of one position
//   values   words [block_size / per_word][value_dim]             a word: one column of consecutive positions
//   scales   f32 [block_size] of keys, f32 [block_size] of values  (int8 only: per position and head)
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "memory.h"

namespace jinn {

enum class CacheType { F32, BF16, Int8 };

CacheType cache_type_by_name(const std::string& name);
inline int cache_type_bytes(CacheType type) { return type == CacheType::F32 ? 4 : type == CacheType::BF16 ? 2 : 1; }

// One layer's place in a block.
struct KVLayer {
  int num_kv_heads, key_dim, value_dim;
  size_t offset;                            // bytes from the block's start
  size_t values, key_scales, value_scales;  // bytes from a head's start; keys come first
  size_t head_bytes;
};

class KVCache {
 public:
  struct Spec {
    int num_kv_heads, key_dim, value_dim;
  };

  // Memory is reserved, not touched, until a block is written.
  KVCache(const std::vector<Spec>& layers, CacheType type, int64_t num_blocks, int block_size);

  CacheType type() const { return type_; }
  int block_size() const { return block_size_; }
  int64_t num_blocks() const { return num_blocks_; }
  size_t block_bytes() const { return block_bytes_; }
  int num_layers() const { return static_cast<int>(layers_.size()); }
  const KVLayer& layer(int i) const { return layers_[static_cast<size_t>(i)]; }
  uint8_t* head(int layer, int64_t block, int kv_head) const {
    const KVLayer& l = layers_[static_cast<size_t>(layer)];
    return data_.data() + block_bytes_ * static_cast<size_t>(block) + l.offset + l.head_bytes * kv_head;
  }

  void copy_block(int64_t source, int64_t target);
  void fill_block(int64_t block, uint8_t byte);  // poison for tests: 0xff makes every float NaN

 private:
  CacheType type_;
  int64_t num_blocks_;
  int block_size_;
  size_t block_bytes_ = 0;
  std::vector<KVLayer> layers_;
  Memory data_;
};

}  // namespace jinn
