// A linear on many tokens: the input quantised once for every linear that reads it, then blocks of 32 output rows.
#pragma once

#include <algorithm>
#include <span>

#include "model.h"

namespace bitdistill {

// Tokens of a tile, as even as they come: 13 tokens are 7 + 6, not 12 + 1.
inline size_t tile_for(size_t tokens, size_t largest) { return ceil_div(tokens, ceil_div(tokens, largest)); }

// How a matrix wants its codes: segments of `segment` features, each padded to `padded`.
struct CodeShape {
  size_t segment = 0, padded = 0, segments = 0;
  size_t stride() const { return segments * padded; }
};
CodeShape code_shape(size_t columns, size_t block_size, size_t group);

// What a thread needs to look codes up: dots [kLookupTokens][kLookupBlocks * 32].
constexpr size_t kLookupTokens = 32;
struct Lookup {
  Array<uint8_t> scratch{kLookupScratch};
  Array<int32_t> dot{kLookupTokens * kLookupBlocks * kRowBlock};
};

// Inputs of a linear for `tokens` tokens: codes for ternary matrices, floats for dense ones.
struct Input {
  size_t tokens = 0, tile = 0;
  CodeShape shape;
  int8_t* code = nullptr;    // [tokens][stride]
  int8_t* packed = nullptr;  // per tile: [stride / 4][tile][4]; unused for one token
  int32_t* sums = nullptr;   // [segments][tokens]
  float* scale = nullptr;    // [tokens]
  float* floats = nullptr;   // [tokens][columns]
  // Codes of four bits, where the room looks them up: this thread's scratch; else null.
  Lookup* lookup = nullptr;
  size_t columns = 0;
};

// Codes of token t of `x` into `input`, of the model's activation_bits.
void quantize_token(const KernelTable& room, const Config& config, const float* x, size_t t, const Input& input);
// Interleaves the codes of the tile that starts at token `first`.
void pack_tile(size_t first, const Input& input);

// out[t * out_stride + r] (+)= rows [32 * row_block, 32 * (row_block + row_blocks)) for tokens [first, first + tokens).
// row_blocks is 1, or at most kGemvBlocks where there is one token.
constexpr size_t kGemvBlocks = 8;
void linear_block(const KernelTable& room, const Linear& linear, const Input& input, size_t row_block,
                  size_t row_blocks, size_t first, size_t tokens, float* out, size_t out_stride, bool accumulate);

// Fewer tokens do not pay for their tables.
constexpr size_t kLeastLookedUp = 16;
// Whether the products of a linear are looked up, which wants many row blocks at a time.
bool is_looked_up(const KernelTable& room, const Linear& linear, const Input& input);

// Row blocks [blocks.begin, blocks.end) and tokens of an output: a piece that a thread takes.
struct Piece {
  Range blocks, tokens;
};

// `out` is the place of row 0 and token 0. All tokens, unless products are looked up.
void linear_rows(const KernelTable& room, const Linear& linear, const Input& input, Piece piece, float* out,
                 size_t out_stride, bool accumulate);

// out = activation(gate(x)) * up(x); the two products never leave the cache. All tokens, unless both are looked up.
void gated_rows(const KernelTable& room, Activation activation, const Linear& gate, const Input& gate_input,
                const Linear& up, const Input& up_input, Piece piece, float* out, size_t out_stride);

}  // namespace bitdistill
