#include "kv_cache.h"

#include <cstring>
#include <stdexcept>

namespace jinn {

CacheType cache_type_by_name(const std::string& name) {
  if (name == "f32") return CacheType::F32;
  if (name == "bf16") return CacheType::BF16;
  if (name == "int8") return CacheType::Int8;
  throw std::invalid_argument("kv_cache_dtype " + name + " is not one of f32, bf16, int8");
}

KVCache::KVCache(const std::vector<Spec>& layers, CacheType type, int64_t num_blocks, int block_size)
    : type_(type), num_blocks_(num_blocks), block_size_(block_size), data_(1, false) {
  if (num_blocks < 1 || block_size < 16 || block_size % 16 != 0) {
    throw std::invalid_argument("[kv_cache] expected num_blocks >= 1 and block_size a multiple of 16, got " +
                                std::to_string(num_blocks) + " and " + std::to_string(block_size));
  }
  const size_t element = static_cast<size_t>(cache_type_bytes(type));
  for (const Spec& spec : layers) {
    if (spec.num_kv_heads < 1 || spec.key_dim % 4 != 0 || spec.value_dim < 1 || spec.key_dim < 4) {
      throw std::invalid_argument("[kv_cache] expected heads >= 1 and key_dim a multiple of 4");
    }
    KVLayer layer{spec.num_kv_heads, spec.key_dim, spec.value_dim, block_bytes_, 0, 0, 0, 0};
    const size_t positions = static_cast<size_t>(block_size);
    layer.values = positions * static_cast<size_t>(spec.key_dim) * element;
    layer.key_scales = layer.values + positions * static_cast<size_t>(spec.value_dim) * element;
    layer.value_scales = layer.key_scales + (type == CacheType::Int8 ? positions * 4 : 0);
    layer.head_bytes = layer.value_scales + (type == CacheType::Int8 ? positions * 4 : 0);
    block_bytes_ += layer.head_bytes * static_cast<size_t>(spec.num_kv_heads);
    layers_.push_back(layer);
  }
  data_ = Memory(block_bytes_ * static_cast<size_t>(num_blocks), true);
}

void KVCache::copy_block(int64_t source, int64_t target) {
  std::memcpy(data_.data() + block_bytes_ * static_cast<size_t>(target),
              data_.data() + block_bytes_ * static_cast<size_t>(source), block_bytes_);
}

void KVCache::fill_block(int64_t block, uint8_t byte) {
  std::memset(data_.data() + block_bytes_ * static_cast<size_t>(block), byte, block_bytes_);
}

}  // namespace jinn
