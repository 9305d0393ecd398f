// Geometry and arithmetic of a decoder, under the names of config.json.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kernel_table.h"

namespace bitdistill {

// Rotary positions: head_dim / 2 frequencies after any scaling; `scale` multiplies cos and sin.
struct Rope {
  std::vector<float> inv_freq;
  float scale = 1;
};

// What sets a layer's attention apart from its neighbours'.
struct LayerAttention {
  static constexpr size_t kNoRope = SIZE_MAX;
  size_t window = 0;  // the last tokens that a token sees, itself included; 0: all
  size_t rope = 0;    // index into Config::ropes, or kNoRope
};

// Bits of a number in a cache.
constexpr size_t cache_bits(Cache form) {
  switch (form) {
    case Cache::i3:
      return 3;
    case Cache::i4:
      return 4;
    case Cache::i8:
      return 8;
    case Cache::f16:
      return 16;
    default:
      return 32;
  }
}
constexpr bool is_low_bit(Cache form) { return cache_bits(form) < 8; }
constexpr bool has_codes(Cache form) { return cache_bits(form) <= 8; }

struct Config {
  size_t vocab_size = 0;
  size_t hidden_size = 0;
  size_t intermediate_size = 0;
  size_t num_hidden_layers = 0;
  size_t num_attention_heads = 0;
  size_t num_key_value_heads = 0;
  size_t head_dim = 0;
  size_t max_context = 0;
  float rms_norm_eps = 0;
  Activation hidden_act = Activation::silu;
  std::vector<Rope> ropes;
  std::vector<LayerAttention> attention;  // one for each layer
  float attention_scale = 1;              // of the products of queries and keys
  float embedding_scale = 1;              // of embedding rows
  bool tie_word_embeddings = false;
  size_t block_size = 0;  // input features per weight scale; 0: scales are per tensor or per row
  Rounding activation_rounding = Rounding::divide;
  size_t activation_bits = 8;                          // of ternary linears: absmax INT8, or absmean INT4
  size_t hadamard_o_proj = 0, hadamard_down_proj = 0;  // block of the transform of their inputs; 0: none
  // Of queries after rotation, and of keys and values as attention sees them; 16: not quantised. Position 0 keeps keys
  // and values of eight bits.
  size_t query_bits = 16, kv_bits = 16;

  size_t query_size() const { return num_attention_heads * head_dim; }
  size_t key_size() const { return num_key_value_heads * head_dim; }
  size_t queries_per_key() const { return num_attention_heads / num_key_value_heads; }
  size_t padded_head_dim() const { return (head_dim + 15) / 16 * 16; }
};

// Throws std::invalid_argument naming the field. Bounds every product the engine forms.
void validate(const Config& config);

}  // namespace bitdistill
