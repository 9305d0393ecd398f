#include "kv_cache.h"

#include <cstring>

namespace bitdistill {
namespace {

CacheLayout layout_of(Cache form, size_t head_dim) {
  const size_t width = form == Cache::i8 ? 1 : form == Cache::f16 ? 2 : 4;
  CacheLayout layout;
  layout.key_bytes = form == Cache::i8 ? round_up(head_dim, 4) : head_dim * width;
  layout.value_bytes = round_up(head_dim, kKeyBlock) * width;
  layout.values_at = kChunkKeys * layout.key_bytes;
  layout.scales_at = layout.values_at + kChunkKeys * layout.value_bytes;
  layout.bytes_of_chunk = layout.scales_at + (form == Cache::i8 ? 2 * kChunkKeys * sizeof(float) : 0);
  return layout;
}

}  // namespace

KvCache::KvCache(const Config& config, size_t context, Cache form, size_t layers)
    : layers_(layers),
      heads_(config.num_key_value_heads),
      head_dim_(config.head_dim),
      form_(form),
      layout_(layout_of(form, head_dim_)),
      per_head_(ceil_div(context, kChunkKeys) * layout_.bytes_of_chunk),
      pages_(layers_ * heads_ * per_head_, false) {}

void KvCache::show(size_t layer, size_t head, Attend& args) const {
  args.form = form_;
  args.layout = layout_;
  args.cache = place(layer, head);
}

void KvCache::store(const KernelTable& room, size_t layer, size_t head, size_t position, const float* key,
                    const float* value, uint16_t* scratch) {
  uint8_t* chunk = place(layer, head) + position / kChunkKeys * layout_.bytes_of_chunk;
  const size_t within = position % kChunkKeys, lane = within % kKeyBlock;
  uint8_t* keys = chunk + (within - lane) * layout_.key_bytes;
  uint8_t* values = chunk + layout_.values_at + within * layout_.value_bytes;
  const auto transpose = [&](auto* block, const auto* from) {
    for (size_t e = 0; e < head_dim_; ++e) block[e * kKeyBlock + lane] = from[e];
  };
  switch (form_) {
    case Cache::f32:
      transpose(reinterpret_cast<float*>(keys), key);
      std::memcpy(values, value, head_dim_ * sizeof(float));
      break;
    case Cache::f16:
      room.narrow_f16(key, head_dim_, scratch);
      transpose(reinterpret_cast<uint16_t*>(keys), scratch);
      room.narrow_f16(value, head_dim_, reinterpret_cast<uint16_t*>(values));
      break;
    case Cache::i8: {
      auto* codes = reinterpret_cast<int8_t*>(scratch);
      auto* scale = reinterpret_cast<float*>(chunk + layout_.scales_at) + within;
      int32_t sum;
      scale[0] = room.quantize(key, head_dim_, head_dim_, layout_.key_bytes, Rounding::divide, codes, &sum);
      for (size_t e = 0; e < layout_.key_bytes; e += 4) std::memcpy(keys + e * kKeyBlock + 4 * lane, codes + e, 4);
      scale[kChunkKeys] = room.quantize(value, head_dim_, head_dim_, head_dim_, Rounding::divide, codes, &sum);
      values -= within % 4 * (layout_.value_bytes - 1);  // its place in its quad's first feature
      for (size_t e = 0; e < head_dim_; ++e) values[4 * e] = static_cast<uint8_t>(codes[e]);
    }
  }
}

uint64_t KvCache::bytes(size_t positions) const {
  return uint64_t{layers_} * heads_ * positions * (layout_.bytes_of_chunk / kChunkKeys);
}

}  // namespace bitdistill
