#include "kv_cache.h"

#include <cstring>

namespace bitdistill {

KvCache::KvCache(const Config& config, size_t context, Cache form)
    : layers_(config.num_hidden_layers),
      heads_(config.num_key_value_heads),
      head_dim_(config.head_dim),
      padded_dim_(config.padded_head_dim()),
      form_(form),
      width_(form == Cache::i8    ? 1
             : form == Cache::f16 ? 2
                                  : 4),
      positions_(round_up(context, kKeyBlock)) {
  value_at_ = round_up(positions_ * head_dim_ * width_, kAlignment);
  value_bytes_ = round_up(positions_ * padded_dim_ * width_, kAlignment);
  const size_t scale_bytes = form == Cache::i8 ? 2 * positions_ * sizeof(float) : 0;
  per_head_ = value_at_ + value_bytes_ + round_up(scale_bytes, kAlignment);
  pages_ = Pages(layers_ * heads_ * per_head_, false);
}

void KvCache::show(size_t layer, size_t head, Attend& args) const {
  uint8_t* at = place(layer, head);
  args.form = form_;
  args.keys = at;
  args.values = at + value_at_;
  args.key_scale = form_ == Cache::i8 ? scales(at) : nullptr;
  args.value_scale = form_ == Cache::i8 ? scales(at) + positions_ : nullptr;
}

void KvCache::store(const KernelTable& room, size_t layer, size_t head, size_t position, const float* key,
                    const float* value, uint16_t* scratch) {
  uint8_t* at = place(layer, head);
  const size_t block = position / kKeyBlock * head_dim_ * kKeyBlock + position % kKeyBlock;
  const auto transpose = [&](auto* keys, const auto* from) {
    for (size_t e = 0; e < head_dim_; ++e) keys[block + e * kKeyBlock] = from[e];
  };
  uint8_t* row = at + value_at_ + position * padded_dim_ * width_;
  switch (form_) {
    case Cache::f32:
      transpose(reinterpret_cast<float*>(at), key);
      std::memcpy(row, value, head_dim_ * sizeof(float));
      break;
    case Cache::f16:
      room.narrow_f16(key, head_dim_, scratch);
      transpose(reinterpret_cast<uint16_t*>(at), scratch);
      room.narrow_f16(value, head_dim_, reinterpret_cast<uint16_t*>(row));
      break;
    case Cache::i8: {
      auto* codes = reinterpret_cast<int8_t*>(scratch);
      int32_t sum;
      float* scale = scales(at) + position;
      scale[0] = room.quantize(key, head_dim_, head_dim_, head_dim_, Rounding::divide, codes, &sum);
      transpose(reinterpret_cast<int8_t*>(at), codes);
      scale[positions_] =
          room.quantize(value, head_dim_, head_dim_, head_dim_, Rounding::divide, reinterpret_cast<int8_t*>(row), &sum);
    }
  }
}

uint64_t KvCache::bytes(size_t positions) const {
  const size_t scale_bytes = form_ == Cache::i8 ? 2 * sizeof(float) : 0;
  return uint64_t{layers_} * heads_ * positions * ((head_dim_ + padded_dim_) * width_ + scale_bytes);
}

}  // namespace bitdistill
