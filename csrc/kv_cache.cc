#include "kv_cache.h"

#include <cstring>

namespace bitdistill {

KvCache::KvCache(const Config& config, size_t context, bool exact)
    : layers_(config.num_hidden_layers),
      heads_(config.num_key_value_heads),
      head_dim_(config.head_dim),
      padded_dim_(config.padded_head_dim()),
      half_(!exact) {
  const size_t size = half_ ? 2 : 4, positions = round_up(context, kKeyBlock);
  key_bytes_ = round_up(positions * head_dim_ * size, kAlignment);
  per_head_ = key_bytes_ + round_up(positions * padded_dim_ * size, kAlignment);
  pages_ = Pages(layers_ * heads_ * per_head_, false);
}

void KvCache::store(const KernelTable& room, size_t layer, size_t head, size_t position, const float* key,
                    const float* value, uint16_t* scratch) {
  const size_t block = position / kKeyBlock * head_dim_ * kKeyBlock + position % kKeyBlock;
  if (half_) {
    auto* keys = reinterpret_cast<uint16_t*>(key_place(layer, head)) + block;
    room.narrow_f16(key, head_dim_, scratch);
    for (size_t e = 0; e < head_dim_; ++e) keys[e * kKeyBlock] = scratch[e];
    room.narrow_f16(value, head_dim_, reinterpret_cast<uint16_t*>(value_place(layer, head)) + position * padded_dim_);
  } else {
    auto* keys = reinterpret_cast<float*>(key_place(layer, head)) + block;
    for (size_t e = 0; e < head_dim_; ++e) keys[e * kKeyBlock] = key[e];
    std::memcpy(reinterpret_cast<float*>(value_place(layer, head)) + position * padded_dim_, value, head_dim_ * 4);
  }
}

uint64_t KvCache::bytes(size_t positions) const {
  return uint64_t{layers_} * heads_ * positions * (head_dim_ + padded_dim_) * (half_ ? 2 : 4);
}

}  // namespace bitdistill
