// The contract between the engine and its kernel rooms.
//
// A room is one instruction set: one translation unit, compiled with its own flags, that exports one symbol, a function
// returning its table. Everything else of a room is local, and no room includes the standard library: an inline
// function of it, compiled for AVX-512, could be the copy the linker hands to baseline code.
//
// Letters: M tokens, N output features (rows of a weight matrix), K input features. A weight matrix lies in row blocks
// of 32 rows; a row block in segments of features that share a scale (one, unless scales are per block); a segment in
// groups of 128 bytes (docs/format.md). How many features a group holds is the room's choice: 20 in the file's order
// (1.6 bits a weight), 16 where two bits a weight decode faster.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace bitdistill {

constexpr size_t kRowBlock = 32;           // rows of a row block
constexpr size_t kGroupBytes = 128;        // bytes of a group: 32 rows x 4
constexpr size_t kFileGroup = 20;          // features of a group in the file's order
constexpr size_t kMaxFeatures = 1u << 18;  // K: keeps every int32 accumulator below from overflowing
constexpr size_t kKeyBlock = 16;           // keys of a block of the key cache
constexpr size_t kChunkKeys = 256;         // keys of a chunk of the cache, whose scores are held at a time
constexpr size_t kMaxTile = 12;            // tokens of a gemm tile
constexpr size_t kLookupBlocks = 64;       // most row blocks of gemm_int4
constexpr size_t kLookupScratch = 138240;  // bytes that gemm_int4 works in
constexpr size_t kAttendRows = 16;         // query rows of one call of attend
constexpr size_t kInt4Rows = 32;           // rows of a block of an int4 table
constexpr size_t kInt4Group = 64;          // features of an int4 row that share a scale

// CPU features a room may require.
enum Feature : uint32_t {
  kAvx2 = 1u << 0,
  kFma = 1u << 1,
  kF16c = 1u << 2,
  kAvx512f = 1u << 3,
  kAvx512bw = 1u << 4,
  kAvx512vl = 1u << 5,
  kAvx512dq = 1u << 6,
  kAvx512vnni = 1u << 7,
  kAvx512vbmi = 1u << 8,
  kAvxVnni = 1u << 9,
  kDotprod = 1u << 10,
};

enum class Rounding { divide, multiply };  // x / (max / 127) or x * (127 / max)
enum class Activation { silu, relu2, gelu_tanh };
enum class Float { f32, bf16, f16 };
enum class Cache { f32, f16, i8, i4, i3 };  // how keys and values are kept

// dot products -> float: out[t * out_stride + r] (+)= dot[t * 32 + r] * (act_scale[t] * scale[r]) + bias[r]
struct Dequantize {
  const int32_t* dot;
  size_t tokens;
  size_t rows;  // of the row block, 1..32
  const float* act_scale;
  const float* scale;  // one value if scale_per_row is false
  bool scale_per_row;
  const float* bias;  // null: none
  float* out;
  size_t out_stride;
  bool accumulate;
};

// Of the cache of one KV head: chunks of kChunkKeys keys, each [keys][values][key scales][value scales], so that
// reading it is one stream. Keys lie in blocks of 16, [block][head_dim][16], values in rows of padded_dim. Codes (i8)
// lie in quads, for products of four: keys [block][ceil(head_dim / 4)][16][4], values [key / 4][padded_dim][4]; each
// key and each value has a float as scale. Codes of four and of three bits are stored with 8 and 4 added. Two quads of
// i4 share their bytes, the first in the low bits. Eight of i3 share three runs of bytes: the low two bits of quads 0-3
// (quad 0 lowest), those of quads 4-7, and the high bits of all eight (quad q in bit q).
struct CacheLayout {
  size_t key_bytes, value_bytes;                // of one key, of one value
  size_t values_at, scales_at, bytes_of_chunk;  // within a chunk
};

// One sequence's queries of one KV head against its cache. Row i sees keys [first[i], visible[i]); neither bound
// decreases from row to row.
struct Attend {
  const float* query;  // [rows][padded_dim], already scaled, zero beyond head_dim
  size_t rows;         // 1..kAttendRows
  const size_t* first;
  const size_t* visible;
  const uint8_t* cache = nullptr;  // of the head
  Cache form = Cache::f32;
  CacheLayout layout = {};
  // i4 and i3: key and value of position 0, whose codes have eight bits, as floats [2][padded_dim]; its place among the
  // codes is void.
  const float* start = nullptr;
  size_t head_dim;
  size_t padded_dim;             // head_dim rounded up to 16
  float* out;                    // [rows][padded_dim]
  float* scores;                 // scratch, kAttendRows * kChunkKeys
  int8_t* query_code = nullptr;  // codes: scratch, kAttendRows * 2 * padded_dim
};

// A token's state as two int8 codes, x ~= (254 high + low) * scale, in whole groups of kInt4Group. Codes are within
// 127: then a group's 254 H + L is a whole number that a float holds.
struct SplitState {
  const int8_t* high;
  const int8_t* low;
  const int32_t* offset;  // of group g: -8 (254 sum high + sum low), for weights that are stored with 8 added
};

struct KernelTable {
  const char* name;
  uint32_t features;  // Feature bits without which the room must not run
  bool only_by_name;  // never chosen, only forced
  size_t group;       // features of a group in this room's order
  size_t tile;        // most tokens of a gemm tile, <= kMaxTile

  // One segment of one row block from the file's order to the room's; null where they are the same. `in` is
  // ceil(features / 20) groups, `out` ceil(features / group) groups; they do not overlap.
  void (*repack)(const uint8_t* in, size_t features, uint8_t* out);

  // dot[b * 32 + r] = sum over k of code_weight * code for `row_blocks` row blocks `stride` bytes apart.
  // code: groups * group codes, zero where padded; code_sum: their sum. Any int8 values, -128 included.
  void (*gemv)(const uint8_t* weights, size_t row_blocks, size_t stride, size_t groups, const int8_t* code,
               int32_t code_sum, int32_t* dot);

  // dot[t * 32 + r] for one row block and `tokens` (1..tile) tokens. code: [groups * group / 4][tokens][4].
  // dot is 64-byte aligned.
  void (*gemm)(const uint8_t* weights, size_t groups, const int8_t* code, size_t tokens, const int32_t* code_sum,
               int32_t* dot);

  // The same of codes -8..7 for many row blocks, 1..kLookupBlocks, whose weights lie `stride` bytes apart, and any
  // number of tokens; null where the room has nothing faster than gemm. code: [tokens][code_stride], zero where padded.
  // dot: [tokens][dot_stride], of which an even number of row blocks is written. scratch: kLookupScratch bytes.
  void (*gemm_int4)(const uint8_t* weights, size_t row_blocks, size_t stride, size_t groups, const int8_t* code,
                    size_t code_stride, size_t tokens, uint8_t* scratch, int32_t* dot, size_t dot_stride);

  void (*dequantize)(const Dequantize* args);

  // RMSNorm: out = gain * (x / sqrt(mean(x^2) + eps)); gain null: out = x. In place if out == x.
  void (*rms_norm)(const float* x, const float* gain, float eps, size_t n, float* out);

  // Absmax INT8 of x[n]. Codes go to segments of `segment` features, each padded with zeros to `padded`; sums[s] is the
  // sum of segment s. Returns the scale.
  float (*quantize)(const float* x, size_t n, size_t segment, size_t padded, Rounding rounding, int8_t* code,
                    int32_t* sums);

  // The same for absmean INT4 (BitNet v2, eq. 5): codes -8..7, x ~= code * scale, scale = mean|x| / sqrt(7).
  float (*quantize_int4)(const float* x, size_t n, size_t segment, size_t padded, int8_t* code, int32_t* sums);

  // Orthonormal Hadamard transform (natural order) of every `block` elements of x[n], in place; block is a power of two
  // that divides n.
  void (*hadamard)(float* x, size_t n, size_t block);

  // out[i] = activation(gate[i]) * up[i]
  void (*gate)(const float* gate, const float* up, size_t n, Activation activation, float* out);

  void (*attend)(const Attend* args);

  // count floats to or from half-width storage (f16, bf16) or plain copies (f32).
  void (*widen)(const void* in, Float type, size_t n, float* out);
  void (*narrow_f16)(const float* in, size_t n, uint16_t* out);

  // out[t * out_stride + r] = sum over k of weight[r * k + ...] * x[t * x_stride + ...] for f32 or bf16 weights.
  void (*dense)(const void* weights, Float type, size_t rows, size_t k, const float* x, size_t x_stride, size_t tokens,
                float* out, size_t out_stride);

  // Two exact dot products per row of int8 weights: high[r], low[r] with two int8 vectors.
  void (*dot_i8)(const int8_t* weights, size_t rows, size_t k, const int8_t* high, const int8_t* low, int32_t* high_dot,
                 int32_t* low_dot);

  // out[t * out_stride + 32 b + r] = sum over groups g of scale[b][g][r] * (254 H + L), H and L the exact dot products
  // of row r's int4 weights (nibble - 8) with high and low of token t. A block is groups * 1024 bytes, scales are bf16.
  void (*dot_i4)(const uint8_t* weights, const uint16_t* scale, size_t blocks, size_t groups, const SplitState* states,
                 size_t tokens, float* out, size_t out_stride);

  // 64 multiply-adds per accumulator and step of the widest int8 dot product, on registers; returns multiply-adds done.
  uint64_t (*probe_int8)(uint64_t steps);
  // Sum of all 64-bit words: reads memory as fast as the room can. bytes is a multiple of 256.
  uint64_t (*probe_read)(const uint8_t* data, size_t bytes);
};

const KernelTable* kernels_scalar();
const KernelTable* kernels_avx2();
const KernelTable* kernels_avx_vnni();
const KernelTable* kernels_avx_vnni_evex();
const KernelTable* kernels_avx512_vnni();
const KernelTable* kernels_avx512_vbmi();
const KernelTable* kernels_neon_dotprod();

}  // namespace bitdistill
