#include "kv_cache.h"

#include <cstring>

#include "low_bits.h"

namespace bitdistill {
namespace {

CacheLayout layout_of(Cache form, size_t head_dim) {
  // Codes of a key lie in quads, of which 2 (four bits) or 8 (three bits) share their bytes.
  const size_t together = form == Cache::i3 ? 32 : form == Cache::i4 ? 8 : form == Cache::i8 ? 4 : 1;
  CacheLayout layout;
  layout.key_bytes = round_up(head_dim, together) * cache_bits(form) / 8;
  layout.value_bytes = round_up(head_dim, kKeyBlock) * cache_bits(form) / 8;
  layout.values_at = kChunkKeys * layout.key_bytes;
  layout.scales_at = layout.values_at + kChunkKeys * layout.value_bytes;
  layout.bytes_of_chunk = layout.scales_at + (has_codes(form) ? 2 * kChunkKeys * sizeof(float) : 0);
  return layout;
}

// One byte of each of four codes.
uint32_t quad_at(const uint8_t* codes, size_t quad) {
  uint32_t word;
  std::memcpy(&word, codes + 4 * quad, 4);
  return word;
}

// Codes of a key, zero-padded to whole runs, into its lane: runs are `run` bytes apart, as CacheLayout has them.
void put_key(Cache form, const uint8_t* codes, size_t n, uint8_t* lane, size_t run) {
  for (size_t quad = 0; 4 * quad < n;) {
    uint32_t words[3] = {};
    size_t used = 1;
    if (form == Cache::i4) {
      words[0] = quad_at(codes, quad) | quad_at(codes, quad + 1) << 4;
      quad += 2;
    } else {
      used = 3;
      for (size_t q = 0; q < 8; ++q) {
        const uint32_t word = quad_at(codes, quad + q);
        words[q / 4] |= (word & 0x03030303) << 2 * (q % 4);
        words[2] |= (word >> 2 & 0x01010101) << q;
      }
      quad += 8;
    }
    for (size_t i = 0; i < used; ++i, lane += run) std::memcpy(lane, &words[i], 4);
  }
}

void set_bits(uint8_t& byte, size_t shift, unsigned mask, unsigned value) {
  byte = static_cast<uint8_t>((byte & ~(mask << shift)) | value << shift);
}

// Codes of the value of key `within` of a chunk: it has a place in the byte run of every feature.
void put_value(Cache form, const uint8_t* codes, size_t n, uint8_t* values, size_t run, size_t within) {
  const size_t quad = within / 4;
  if (form == Cache::i4) {
    uint8_t* at = values + quad / 2 * run + within % 4;
    for (size_t e = 0; e < n; ++e) set_bits(at[4 * e], quad % 2 * 4, 15, codes[e]);
    return;
  }
  uint8_t* runs = values + quad / 8 * 3 * run + within % 4;
  uint8_t *low = runs + quad % 8 / 4 * run, *high = runs + 2 * run;
  for (size_t e = 0; e < n; ++e) {
    set_bits(low[4 * e], quad % 4 * 2, 3, codes[e] & 3u);
    set_bits(high[4 * e], quad % 8, 1, codes[e] >> 2);
  }
}

}  // namespace

KvCache::KvCache(const Config& config, size_t context, Cache form, size_t layers)
    : layers_(layers),
      heads_(config.num_key_value_heads),
      head_dim_(config.head_dim),
      padded_dim_(config.padded_head_dim()),
      form_(form),
      layout_(layout_of(form, head_dim_)),
      start_at_(ceil_div(context, kChunkKeys) * layout_.bytes_of_chunk),
      per_head_(start_at_ + (is_low_bit(form) ? 2 * padded_dim_ * sizeof(float) : 0)),
      pages_(layers_ * heads_ * per_head_, false) {}

void KvCache::show(size_t layer, size_t head, Attend& args) const {
  args.form = form_;
  args.layout = layout_;
  args.cache = place(layer, head);
  if (is_low_bit(form_)) args.start = reinterpret_cast<const float*>(args.cache + start_at_);
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
    case Cache::i4:
    case Cache::i3:
      store_low_bits(place(layer, head), position, key, value, reinterpret_cast<uint8_t*>(scratch));
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

void KvCache::store_low_bits(uint8_t* place, size_t position, const float* key, const float* value, uint8_t* codes) {
  const size_t bits = cache_bits(form_), within = position % kChunkKeys, lane = within % kKeyBlock;
  uint8_t* chunk = place + position / kChunkKeys * layout_.bytes_of_chunk;
  auto* scale = reinterpret_cast<float*>(chunk + layout_.scales_at) + within;
  auto* start = reinterpret_cast<float*>(place + start_at_);
  const auto zero = static_cast<uint8_t>(1 << (bits - 1));
  // Returns the step of a row whose codes are stored.
  const auto quantize = [&](const float* x, float* at_start) {
    const LowBits low(x, head_dim_, position == 0 ? 8 : bits);
    for (size_t e = 0; e < head_dim_; ++e) {
      if (position == 0) {
        at_start[e] = low.value(x[e]);
        codes[e] = zero;
      } else {
        codes[e] = static_cast<uint8_t>(zero + low.code(x[e]));
      }
    }
    for (size_t e = head_dim_; e < round_up(head_dim_, 32); ++e) codes[e] = zero;
    return low.step();
  };
  scale[0] = quantize(key, start);
  put_key(form_, codes, layout_.key_bytes * 8 / bits, chunk + (within - lane) * layout_.key_bytes + 4 * lane,
          4 * kKeyBlock);
  scale[kChunkKeys] = quantize(value, start + padded_dim_);
  put_value(form_, codes, head_dim_, chunk + layout_.values_at, 4 * padded_dim_, within);
}

uint64_t KvCache::bytes(size_t positions) const {
  const uint64_t of_start = positions > 0 ? per_head_ - start_at_ : 0;
  return uint64_t{layers_} * heads_ * (positions * (layout_.bytes_of_chunk / kChunkKeys) + of_start);
}

}  // namespace bitdistill
