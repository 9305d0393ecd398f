// Keys and values of one sequence.
//
// Per layer and KV head: chunks as CacheLayout has them, in fp16, fp32, or codes of 8, 4 or 3 bits (absmax of each key
// and each value); and beside codes of 4 or 3 bits position 0, at eight bits. Room for the whole context is reserved;
// pages come when written, so memory follows the text (small pages: one huge page in each of layers x heads regions
// would be more than short texts need).
#pragma once

#include "config.h"
#include "memory.h"

namespace bitdistill {

class KvCache {
 public:
  // `layers` below the model's: they take turns, and a layer finds what was last stored.
  KvCache(const Config& config, size_t context, Cache form, size_t layers);
  KvCache(const Config& config, size_t context, Cache form)
      : KvCache(config, context, form, config.num_hidden_layers) {}

  // Points an attend call at one head of one layer.
  void show(size_t layer, size_t head, Attend& args) const;

  // Stores one position's key and value of one head; `scratch` holds padded_head_dim halves.
  void store(const KernelTable& room, size_t layer, size_t head, size_t position, const float* key, const float* value,
             uint16_t* scratch);

  // Whether positions side by side share bytes, so that no two threads may store positions of one head.
  bool shares_bytes() const { return is_low_bit(form_); }

  size_t bits() const { return cache_bits(form_); }

  // Bytes of the first `positions` positions.
  uint64_t bytes(size_t positions) const;

 private:
  uint8_t* place(size_t layer, size_t head) const {
    return pages_.data() + (layer % layers_ * heads_ + head) * per_head_;
  }

  // `codes`: scratch, head_dim rounded up to 32.
  void store_low_bits(uint8_t* place, size_t position, const float* key, const float* value, uint8_t* codes);

  size_t layers_, heads_, head_dim_, padded_dim_;
  Cache form_;
  CacheLayout layout_;
  size_t start_at_, per_head_;  // bytes
  Pages pages_;
};

}  // namespace bitdistill
