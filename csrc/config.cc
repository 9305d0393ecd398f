#include "config.h"

#include <cmath>
#include <stdexcept>

namespace bitdistill {
namespace {

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

void require_range(const char* field, size_t value, size_t most) {
  require(value >= 1 && value <= most,
          std::string(field) + " = " + std::to_string(value) + " is not in 1.." + std::to_string(most));
}

void require_block(const char* site, size_t block, size_t features) {
  require(block == 0 || ((block & (block - 1)) == 0 && features % block == 0),
          "hadamard block " + std::to_string(block) + " of " + site + " is not a power of two that divides its " +
              std::to_string(features) + " input features");
}

}  // namespace

void validate(const Config& c) {
  require_range("vocab_size", c.vocab_size, size_t{1} << 24);
  // The int8 head sums products of 8-bit numbers over hidden_size in an int32.
  require_range("hidden_size", c.hidden_size, size_t{1} << 16);
  require_range("intermediate_size", c.intermediate_size, kMaxFeatures);
  require_range("num_hidden_layers", c.num_hidden_layers, 4096);
  require_range("num_attention_heads", c.num_attention_heads, 4096);
  require_range("num_key_value_heads", c.num_key_value_heads, c.num_attention_heads);
  require_range("head_dim", c.head_dim, 4096);
  require_range("max_context", c.max_context, size_t{1} << 24);
  require(c.query_size() <= kMaxFeatures, "num_attention_heads * head_dim is above " + std::to_string(kMaxFeatures));
  require(c.num_attention_heads % c.num_key_value_heads == 0,
          "num_attention_heads = " + std::to_string(c.num_attention_heads) +
              " is not a multiple of num_key_value_heads = " + std::to_string(c.num_key_value_heads));
  require(c.head_dim % 2 == 0, "head_dim = " + std::to_string(c.head_dim) + " is odd; rotary positions need pairs");
  for (const Rope& rope : c.ropes) {
    require(rope.inv_freq.size() == c.head_dim / 2,
            "a rope has " + std::to_string(rope.inv_freq.size()) +
                " frequencies; head_dim / 2 = " + std::to_string(c.head_dim / 2));
    for (const float f : rope.inv_freq) require(std::isfinite(f), "a rope holds a frequency that is not finite");
    require(std::isfinite(rope.scale), "the scale of a rope is not finite");
  }
  require(c.ropes.size() <= 16, "there are " + std::to_string(c.ropes.size()) + " ropes; use at most 16");
  require(c.attention.size() == c.num_hidden_layers, "layer_windows and layer_ropes must have num_hidden_layers = " +
                                                         std::to_string(c.num_hidden_layers) + " values");
  for (const LayerAttention& layer : c.attention) {
    require(
        layer.rope == LayerAttention::kNoRope || layer.rope < c.ropes.size(),
        "layer_ropes holds " + std::to_string(layer.rope) + "; there are " + std::to_string(c.ropes.size()) + " ropes");
  }
  require(std::isfinite(c.attention_scale), "attention_scale is not finite");
  require(std::isfinite(c.embedding_scale), "embedding_scale is not finite");
  require(std::isfinite(c.rms_norm_eps) && c.rms_norm_eps >= 0, "rms_norm_eps is not a finite, non-negative number");
  require(c.block_size <= kMaxFeatures,
          "block_size = " + std::to_string(c.block_size) + " is above " + std::to_string(kMaxFeatures));
  require(c.activation_bits == 8 || c.activation_bits == 4,
          "activation_bits = " + std::to_string(c.activation_bits) + ": the engine runs 8 and 4");
  require(c.query_bits == 16 || c.query_bits == 8 || c.query_bits == 4,
          "query_bits = " + std::to_string(c.query_bits) + ": the engine runs 16, 8 and 4");
  require(c.kv_bits == 16 || c.kv_bits == 8 || c.kv_bits == 4 || c.kv_bits == 3,
          "kv_bits = " + std::to_string(c.kv_bits) + ": the engine runs 16, 8, 4 and 3");
  require_block("o_proj", c.hadamard_o_proj, c.query_size());
  require_block("down_proj", c.hadamard_down_proj, c.intermediate_size);
}

}  // namespace bitdistill
