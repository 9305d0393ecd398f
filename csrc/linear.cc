#include "linear.h"

#include <cassert>
#include <cstring>

namespace bitdistill {
namespace {

// Weights of a panel stay in the second-level cache while every tile of tokens passes over them.
constexpr size_t kPanelBytes = size_t{256} << 10;

void ternary_block(const KernelTable& room, const Linear& linear, const Input& input, size_t row_block,
                   size_t row_blocks, size_t first, size_t tokens, float* out, size_t out_stride, bool accumulate) {
  const TernaryMatrix& m = linear.ternary;
  alignas(kAlignment) int32_t dot[std::max(kMaxTile, kGemvBlocks) * kRowBlock];
  const size_t row = row_block * kRowBlock;
  const size_t segment_bytes = m.groups * kGroupBytes;
  for (size_t s = 0; s < m.segments; ++s) {
    const uint8_t* weights = m.data + row_block * m.stride() + s * segment_bytes;
    const int32_t* sums = input.sums + s * input.tokens + first;
    if (input.tokens == 1) {
      room.gemv(weights, row_blocks, m.stride(), m.groups, input.code + s * input.shape.padded, *sums, dot);
    } else {
      const int8_t* tile = input.packed + first * input.shape.stride() + s * input.shape.padded * tokens;
      room.gemm(weights, m.groups, tile, tokens, sums, dot);
    }
    const Dequantize args{
        .dot = dot,
        .tokens = tokens,
        .rows = std::min(row_blocks * kRowBlock, m.rows - row),
        .act_scale = input.scale + first,
        .scale = m.scales_of(s, row_block),
        .scale_per_row = m.scale_per_row,
        .bias = s == 0 && linear.bias != nullptr ? linear.bias + row : nullptr,
        .out = out,
        .out_stride = out_stride,
        .accumulate = accumulate || s != 0,
    };
    room.dequantize(&args);
  }
}

void dense_block(const KernelTable& room, const Linear& linear, const Input& input, size_t row_block, size_t row_blocks,
                 size_t first, size_t tokens, float* out, size_t out_stride, bool accumulate) {
  const DenseMatrix& m = linear.dense;
  alignas(kAlignment) float part[std::max(kMaxTile, kGemvBlocks) * kRowBlock];
  const size_t row = row_block * kRowBlock, rows = std::min(row_blocks * kRowBlock, m.rows - row);
  room.dense(m.data + row * m.row_bytes(), m.float_type(), rows, m.columns, input.floats + first * input.columns,
             input.columns, tokens, part, rows);
  for (size_t t = 0; t < tokens; ++t) {
    float* to = out + t * out_stride;
    for (size_t r = 0; r < rows; ++r) {
      float y = part[t * rows + r];
      if (linear.bias != nullptr) y += linear.bias[row + r];
      to[r] = accumulate ? to[r] + y : y;
    }
  }
}

// Calls body(row_block, row_blocks, first, tokens): blocks of rows in panels, and within a panel all tiles of tokens.
template <class Body>
void each_block(Range blocks, size_t block_bytes, const Input& input, Body&& body) {
  if (input.tokens == 1) {
    for (size_t b = blocks.begin; b < blocks.end; b += kGemvBlocks) {
      body(b, std::min(kGemvBlocks, blocks.end - b), size_t{0}, size_t{1});
    }
    return;
  }
  const size_t panel = std::max<size_t>(1, kPanelBytes / block_bytes);
  for (size_t start = blocks.begin; start < blocks.end; start += panel) {
    const size_t end = std::min(blocks.end, start + panel);
    for (size_t first = 0; first < input.tokens; first += input.tile) {
      const size_t tokens = std::min(input.tile, input.tokens - first);
      for (size_t b = start; b < end; ++b) body(b, size_t{1}, first, tokens);
    }
  }
}

// Calls body(row_block, row_blocks, first, tokens, dot, dot_stride) with products of many rows and tokens at a time.
template <class Body>
void each_looked_up(const KernelTable& room, const TernaryMatrix& m, const Input& input, Piece piece, Body&& body) {
  const size_t code_stride = input.shape.stride();
  for (size_t b = piece.blocks.begin; b < piece.blocks.end; b += kLookupBlocks) {
    const size_t count = std::min(kLookupBlocks, piece.blocks.end - b), width = round_up(count, 2) * kRowBlock;
    for (size_t first = piece.tokens.begin; first < piece.tokens.end; first += kLookupTokens) {
      const size_t tokens = std::min(kLookupTokens, piece.tokens.end - first);
      int32_t* dot = input.lookup->dot.data();
      room.gemm_int4(m.data + b * m.stride(), count, m.stride(), m.groups, input.code + first * code_stride,
                     code_stride, tokens, input.lookup->scratch.data(), dot, width);
      body(b, count, first, tokens, dot, width);
    }
  }
}

// Products of one row block and token as floats.
void dequantize_row(const KernelTable& room, const Linear& linear, const Input& input, size_t row_block, size_t token,
                    const int32_t* dot, float* out, bool accumulate) {
  const TernaryMatrix& m = linear.ternary;
  const size_t row = row_block * kRowBlock;
  const Dequantize args{
      .dot = dot,
      .tokens = 1,
      .rows = std::min(kRowBlock, m.rows - row),
      .act_scale = input.scale + token,
      .scale = m.scales_of(0, row_block),
      .scale_per_row = m.scale_per_row,
      .bias = linear.bias != nullptr ? linear.bias + row : nullptr,
      .out = out,
      .out_stride = 0,
      .accumulate = accumulate,
  };
  room.dequantize(&args);
}

size_t block_bytes(const Linear& linear) {
  return linear.is_ternary ? linear.ternary.stride() : kRowBlock * linear.dense.row_bytes();
}

}  // namespace

CodeShape code_shape(size_t columns, size_t block_size, size_t group) {
  const size_t segment = block_size == 0 ? columns : std::min(block_size, columns);
  return {segment, round_up(segment, group), ceil_div(columns, segment)};
}

void quantize_token(const KernelTable& room, const Config& config, const float* x, size_t t, const Input& input) {
  const CodeShape& shape = input.shape;
  int8_t* code = input.code + t * shape.stride();
  const auto quantize = [&](int32_t* sums) {
    input.scale[t] =
        config.activation_bits == 4
            ? room.quantize_int4(x, input.columns, shape.segment, shape.padded, code, sums)
            : room.quantize(x, input.columns, shape.segment, shape.padded, config.activation_rounding, code, sums);
  };
  if (input.tokens == 1 || shape.segments == 1) {
    quantize(input.sums + t);
    return;
  }
  // Sums of one segment lie together for all tokens; a row delivers its segments one after the other.
  constexpr size_t kAtOnce = 64;
  int32_t sums[kMaxFeatures / kAtOnce];
  if (shape.segments <= std::size(sums)) {
    quantize(sums);
    for (size_t s = 0; s < shape.segments; ++s) input.sums[s * input.tokens + t] = sums[s];
    return;
  }
  std::vector<int32_t> many(shape.segments);  // blocks of a few features: not worth a fast path
  quantize(many.data());
  for (size_t s = 0; s < shape.segments; ++s) input.sums[s * input.tokens + t] = many[s];
}

void pack_tile(size_t first, const Input& input) {
  const size_t tokens = std::min(input.tile, input.tokens - first), stride = input.shape.stride();
  int8_t* out = input.packed + first * stride;
  for (size_t t = 0; t < tokens; ++t) {
    const int8_t* in = input.code + (first + t) * stride;
    for (size_t quad = 0; quad < stride / 4; ++quad) std::memcpy(out + (quad * tokens + t) * 4, in + quad * 4, 4);
  }
}

void linear_block(const KernelTable& room, const Linear& linear, const Input& input, size_t row_block,
                  size_t row_blocks, size_t first, size_t tokens, float* out, size_t out_stride, bool accumulate) {
  const auto block = linear.is_ternary ? ternary_block : dense_block;
  block(room, linear, input, row_block, row_blocks, first, tokens, out, out_stride, accumulate);
}

bool is_looked_up(const KernelTable& room, const Linear& linear, const Input& input) {
  return room.gemm_int4 != nullptr && input.lookup != nullptr && input.tokens >= kLeastLookedUp && linear.is_ternary &&
         linear.ternary.segments == 1;
}

void linear_rows(const KernelTable& room, const Linear& linear, const Input& input, Piece piece, float* out,
                 size_t out_stride, bool accumulate) {
  if (is_looked_up(room, linear, input)) {
    each_looked_up(room, linear.ternary, input, piece,
                   [&](size_t b, size_t count, size_t first, size_t tokens, const int32_t* dot, size_t dot_stride) {
                     for (size_t t = 0; t < tokens; ++t) {
                       for (size_t i = 0; i < count; ++i) {
                         dequantize_row(room, linear, input, b + i, first + t, dot + t * dot_stride + i * kRowBlock,
                                        out + (first + t) * out_stride + (b + i) * kRowBlock, accumulate);
                       }
                     }
                   });
    return;
  }
  assert(piece.tokens.begin == 0 && piece.tokens.end == input.tokens);
  each_block(piece.blocks, block_bytes(linear), input, [&](size_t b, size_t count, size_t first, size_t tokens) {
    linear_block(room, linear, input, b, count, first, tokens, out + first * out_stride + b * kRowBlock, out_stride,
                 accumulate);
  });
}

void gated_rows(const KernelTable& room, Activation activation, const Linear& gate, const Input& gate_input,
                const Linear& up, const Input& up_input, Piece piece, float* out, size_t out_stride) {
  if (is_looked_up(room, gate, gate_input) || is_looked_up(room, up, up_input)) {
    // Codes that are looked up were not packed into tiles: each of the two goes its own way, one after the other.
    linear_rows(room, gate, gate_input, piece, out, out_stride, false);
    const auto apply = [&](const float* ups, size_t b, size_t rows, size_t t) {
      float* to = out + t * out_stride + b * kRowBlock;
      room.gate(to, ups, std::min(rows, gate.rows() - b * kRowBlock), activation, to);
    };
    if (is_looked_up(room, up, up_input)) {
      each_looked_up(room, up.ternary, up_input, piece,
                     [&](size_t b, size_t count, size_t first, size_t tokens, const int32_t* dot, size_t dot_stride) {
                       for (size_t t = 0; t < tokens; ++t) {
                         for (size_t i = 0; i < count; ++i) {
                           alignas(kAlignment) float row[kRowBlock];
                           dequantize_row(room, up, up_input, b + i, first + t, dot + t * dot_stride + i * kRowBlock,
                                          row, false);
                           apply(row, b + i, kRowBlock, first + t);
                         }
                       }
                     });
      return;
    }
    assert(piece.tokens.begin == 0 && piece.tokens.end == up_input.tokens);
    alignas(kAlignment) float ups[std::max(kMaxTile, kGemvBlocks) * kRowBlock];
    each_block(piece.blocks, block_bytes(up), up_input, [&](size_t b, size_t count, size_t first, size_t tokens) {
      const size_t width = count * kRowBlock;
      linear_block(room, up, up_input, b, count, first, tokens, ups, width, false);
      for (size_t t = 0; t < tokens; ++t) apply(ups + t * width, b, width, first + t);
    });
    return;
  }
  alignas(kAlignment) float gates[std::max(kMaxTile, kGemvBlocks) * kRowBlock];
  alignas(kAlignment) float ups[std::max(kMaxTile, kGemvBlocks) * kRowBlock];
  const size_t bytes = block_bytes(gate) + block_bytes(up);
  each_block(piece.blocks, bytes, gate_input, [&](size_t b, size_t count, size_t first, size_t tokens) {
    const size_t width = count * kRowBlock, rows = std::min(width, gate.rows() - b * kRowBlock);
    linear_block(room, gate, gate_input, b, count, first, tokens, gates, width, false);
    linear_block(room, up, up_input, b, count, first, tokens, ups, width, false);
    for (size_t t = 0; t < tokens; ++t) {
      room.gate(gates + t * width, ups + t * width, rows, activation, out + (first + t) * out_stride + b * kRowBlock);
    }
  });
}

}  // namespace bitdistill
