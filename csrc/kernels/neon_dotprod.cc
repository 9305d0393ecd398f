// Room `neon_dotprod`: two bits a weight, sdot of AArch64 CPUs with the dot product extension (Armv8.2).
//
// Weights c = 0..2 and codes are both signed bytes, so every product is exact; the sum of the codes is taken off again.
// sdot can take four codes out of a register of sixteen: codes need no broadcast.
#include <arm_neon.h>

#include "attention.h"
#include "hadamard.h"
#include "repack.h"

namespace {

using bitdistill::KernelTable;
using bitdistill::kGroupBytes;
using bitdistill::kMaxTile;

struct Neon {
  using Reg = float32x4_t;
  static constexpr size_t kWidth = 4;
  static Reg set(float x) { return vdupq_n_f32(x); }
  // As bytes: a shared file's floats may lie anywhere.
  static Reg load(const float* p) { return vreinterpretq_f32_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(p))); }
  static void store(float* p, Reg x) { vst1q_f32(p, x); }
  static Reg add(Reg a, Reg b) { return vaddq_f32(a, b); }
  static Reg sub(Reg a, Reg b) { return vsubq_f32(a, b); }
  static Reg mul(Reg a, Reg b) { return vmulq_f32(a, b); }
  static Reg div(Reg a, Reg b) { return vdivq_f32(a, b); }
  static Reg max(Reg a, Reg b) { return vmaxnmq_f32(a, b); }  // a NaN loses, as a NaN in `a` does in the other rooms
  static Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f32(c, a, b); }
  static Reg abs(Reg a) { return vabsq_f32(a); }
  static Reg round(Reg a) { return vrndnq_f32(a); }
  template <size_t kLanes>
  static Reg exchange(Reg a) {
    if constexpr (kLanes == 1) return vrev64q_f32(a);
    return vextq_f32(a, a, 2);
  }
  static Reg pow2(Reg n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
  }
  static Reg load_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(four_halves(p)), 16)); }
  static Reg load_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(four_halves(p))); }
  static void store_f16(uint16_t* p, Reg x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
  static void store_i8(int8_t* p, Reg x) {
    const int16x4_t half = vqmovn_s32(vcvtq_s32_f32(x));
    const uint32_t four = vget_lane_u32(vreinterpret_u32_s8(vqmovn_s16(vcombine_s16(half, half))), 0);
    __builtin_memcpy(p, &four, 4);
  }
  static float sum(Reg a) { return vaddvq_f32(a); }
  static float highest(Reg a) { return vmaxnmvq_f32(a); }

  static constexpr size_t kScoreSums = 16, kMixSums = 16;
  static constexpr int32_t kCodeOffset = 0;
  using Ints = int32x4_t;
  static Ints ints(int32_t value) { return vdupq_n_s32(value); }
  static Ints bits(const uint8_t* p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
  static Ints load_codes(const uint8_t* p) { return bits(p); }
  template <int kShift, uint8_t kMask>
  static Ints field(Ints a) {
    uint8x16_t bytes = vreinterpretq_u8_s32(a);
    if constexpr (kShift < 0) bytes = vshlq_n_u8(bytes, -kShift);
    if constexpr (kShift > 0) bytes = vshrq_n_u8(bytes, kShift);
    return vreinterpretq_s32_u8(vandq_u8(bytes, vdupq_n_u8(kMask)));
  }
  static Ints join(Ints a, Ints b) { return vorrq_s32(a, b); }
  static Ints four(const int8_t* p) {
    int32_t quad;
    __builtin_memcpy(&quad, p, 4);
    return vdupq_n_s32(quad);
  }
  static Ints dot(Ints acc, Ints cached, Ints codes) {
    return vdotq_s32(acc, vreinterpretq_s8_s32(cached), vreinterpretq_s8_s32(codes));
  }
  static Reg to_float(Ints a) { return vcvtq_f32_s32(a); }

 private:
  static uint16x4_t four_halves(const uint16_t* p) {
    return vreinterpret_u16_u8(vld1_u8(reinterpret_cast<const uint8_t*>(p)));
  }
};

template <>
inline float32x4_t from_int<Neon>(const int32_t* p) {
  return vcvtq_f32_s32(vld1q_s32(p));
}

// Four codes in every lane.
inline int8x16_t broadcast(const int8_t* four) {
  int32_t dword;
  __builtin_memcpy(&dword, four, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(dword));
}

inline int8x16_t as_signed(uint8x16_t x) { return vreinterpretq_s8_u8(x); }

// Weights 0..2 of field p.
template <int p>
inline int8x16_t field(uint8x16_t bytes) {
  if constexpr (p == 0) return as_signed(vandq_u8(bytes, vdupq_n_u8(3)));
  if constexpr (p == 1 || p == 2) return as_signed(vandq_u8(vshrq_n_u8(bytes, 2 * p), vdupq_n_u8(3)));
  if constexpr (p == 3) return as_signed(vshrq_n_u8(bytes, 6));
}

constexpr size_t kQuads = kRowBlock / 4;  // registers of a group, four rows each

// Fields 1 and 2 are multiplied where they stand, two and four bits too high, in sums of their own: a shift less each.
static_assert(bitdistill::kMaxFeatures / kFieldGroup * 4 * 32 * 128 <= INT32_MAX, "a gemv accumulator holds its sum");

void gemv(const uint8_t* weights, size_t row_blocks, size_t stride, size_t groups, const int8_t* code, int32_t code_sum,
          int32_t* dot) {
  const uint8x16_t first = vdupq_n_u8(3), second = vdupq_n_u8(3 << 2), third = vdupq_n_u8(3 << 4);
  for (size_t b = 0; b < row_blocks; ++b) {
    const uint8_t* w = weights + b * stride;
    int32x4_t one[kQuads], four[kQuads], sixteen[kQuads];
    for (size_t q = 0; q < kQuads; ++q) {
      one[q] = vdupq_n_s32(-code_sum);
      four[q] = sixteen[q] = vdupq_n_s32(0);
    }
    for (size_t g = 0; g < groups; ++g, w += kGroupBytes) {
      const int8x16_t x = vld1q_s8(code + g * kFieldGroup);
#pragma GCC unroll 8
      for (size_t q = 0; q < kQuads; ++q) {
        const uint8x16_t v = vld1q_u8(w + 16 * q);
        one[q] = vdotq_laneq_s32(one[q], as_signed(vandq_u8(v, first)), x, 0);
        four[q] = vdotq_laneq_s32(four[q], as_signed(vandq_u8(v, second)), x, 1);
        sixteen[q] = vdotq_laneq_s32(sixteen[q], as_signed(vandq_u8(v, third)), x, 2);
        one[q] = vdotq_laneq_s32(one[q], as_signed(vshrq_n_u8(v, 6)), x, 3);
      }
    }
    for (size_t q = 0; q < kQuads; ++q) {
      const int32x4_t rest = vaddq_s32(vshrq_n_s32(four[q], 2), vshrq_n_s32(sixteen[q], 4));
      vst1q_s32(dot + b * kRowBlock + 4 * q, vaddq_s32(one[q], rest));
    }
  }
}

// Four features of eight rows for all tokens of a tile.
template <size_t kTokens>
inline void step(int8x16_t low, int8x16_t high, const int8_t* code, int32x4_t (&sum)[kTokens][2]) {
  constexpr size_t kWhole = kTokens / 4 * 4;
#pragma GCC unroll 3
  for (size_t t = 0; t < kWhole; t += 4) {
    const int8x16_t x = vld1q_s8(code + 4 * t);
    sum[t][0] = vdotq_laneq_s32(sum[t][0], low, x, 0);
    sum[t][1] = vdotq_laneq_s32(sum[t][1], high, x, 0);
    sum[t + 1][0] = vdotq_laneq_s32(sum[t + 1][0], low, x, 1);
    sum[t + 1][1] = vdotq_laneq_s32(sum[t + 1][1], high, x, 1);
    sum[t + 2][0] = vdotq_laneq_s32(sum[t + 2][0], low, x, 2);
    sum[t + 2][1] = vdotq_laneq_s32(sum[t + 2][1], high, x, 2);
    sum[t + 3][0] = vdotq_laneq_s32(sum[t + 3][0], low, x, 3);
    sum[t + 3][1] = vdotq_laneq_s32(sum[t + 3][1], high, x, 3);
  }
#pragma GCC unroll 3
  for (size_t t = kWhole; t < kTokens; ++t) {
    const int8x16_t x = broadcast(code + 4 * t);
    sum[t][0] = vdotq_s32(sum[t][0], low, x);
    sum[t][1] = vdotq_s32(sum[t][1], high, x);
  }
}

// Eight rows by twelve tokens fill 24 registers; the rows of a block come in four passes over the same codes.
template <size_t kTokens>
void row_block(const uint8_t* weights, size_t groups, const int8_t* code, const int32_t* code_sum, int32_t* dot) {
  for (size_t part = 0; part < 4; ++part, weights += kGroupBytes / 4, dot += kRowBlock / 4) {
    int32x4_t sum[kTokens][2];
    for (size_t t = 0; t < kTokens; ++t) sum[t][0] = sum[t][1] = vdupq_n_s32(-code_sum[t]);
    const int8_t* x = code;
    for (size_t g = 0; g < groups; ++g, x += kFieldGroup * kTokens) {
      const uint8x16_t low = vld1q_u8(weights + g * kGroupBytes), high = vld1q_u8(weights + g * kGroupBytes + 16);
      step<kTokens>(field<0>(low), field<0>(high), x, sum);
      step<kTokens>(field<1>(low), field<1>(high), x + 4 * kTokens, sum);
      step<kTokens>(field<2>(low), field<2>(high), x + 8 * kTokens, sum);
      step<kTokens>(field<3>(low), field<3>(high), x + 12 * kTokens, sum);
    }
    for (size_t t = 0; t < kTokens; ++t) {
      vst1q_s32(dot + t * kRowBlock, sum[t][0]);
      vst1q_s32(dot + t * kRowBlock + 4, sum[t][1]);
    }
  }
}

using Tile = void(const uint8_t*, size_t, const int8_t*, const int32_t*, int32_t*);
constexpr Tile* kTiles[kMaxTile] = {row_block<1>, row_block<2>,  row_block<3>,  row_block<4>,
                                    row_block<5>, row_block<6>,  row_block<7>,  row_block<8>,
                                    row_block<9>, row_block<10>, row_block<11>, row_block<12>};

void gemm(const uint8_t* weights, size_t groups, const int8_t* code, size_t tokens, const int32_t* code_sum,
          int32_t* dot) {
  kTiles[tokens - 1](weights, groups, code, code_sum, dot);
}

void dot_i8(const int8_t* weights, size_t rows, size_t k, const int8_t* high, const int8_t* low, int32_t* high_dot,
            int32_t* low_dot) {
  for (size_t r = 0; r < rows; ++r) {
    const int8_t* w = weights + r * k;
    int32x4_t h[2] = {vdupq_n_s32(0), vdupq_n_s32(0)}, l[2] = {h[0], h[0]};
    const auto add = [&](size_t i, size_t to) __attribute__((always_inline)) {
      const int8x16_t v = vld1q_s8(w + i);
      h[to] = vdotq_s32(h[to], v, vld1q_s8(high + i));
      l[to] = vdotq_s32(l[to], v, vld1q_s8(low + i));
    };
    size_t i = 0;
    for (; i + 32 <= k; i += 32) {
      add(i, 0);
      add(i + 16, 1);
    }
    for (; i + 16 <= k; i += 16) add(i, 0);
    high_dot[r] = vaddvq_s32(vaddq_s32(h[0], h[1]));
    low_dot[r] = vaddvq_s32(vaddq_s32(l[0], l[1]));
    for (; i < k; ++i) {
      high_dot[r] += w[i] * high[i];
      low_dot[r] += w[i] * low[i];
    }
  }
}

// Sixteen features of a block's rows: two runs of 128 bytes, low nibbles the first four of each run's eight features.
void dot_i4_block(const uint8_t* weights, const uint16_t* scale, size_t groups, const SplitState& x, float* out) {
  const uint8x16_t nibble = vdupq_n_u8(15);
  float32x4_t acc[kQuads];
  for (float32x4_t& a : acc) a = vdupq_n_f32(0);
  for (size_t g = 0; g < groups; ++g, scale += kInt4Rows) {
    int32x4_t h[kQuads], l[kQuads];
    for (size_t q = 0; q < kQuads; ++q) {
      h[q] = vdupq_n_s32(0);
      l[q] = vdupq_n_s32(x.offset[g]);
    }
    for (size_t i = 0; i < kInt4Group; i += 16, weights += 8 * kInt4Rows) {
      const int8x16_t high = vld1q_s8(x.high + g * kInt4Group + i), low = vld1q_s8(x.low + g * kInt4Group + i);
#pragma GCC unroll 8
      for (size_t q = 0; q < kQuads; ++q) {
        const uint8x16_t a = vld1q_u8(weights + 16 * q), b = vld1q_u8(weights + 4 * kInt4Rows + 16 * q);
        const int8x16_t a0 = as_signed(vandq_u8(a, nibble)), a1 = as_signed(vshrq_n_u8(a, 4));
        const int8x16_t b0 = as_signed(vandq_u8(b, nibble)), b1 = as_signed(vshrq_n_u8(b, 4));
        h[q] = vdotq_laneq_s32(vdotq_laneq_s32(h[q], a0, high, 0), a1, high, 1);
        l[q] = vdotq_laneq_s32(vdotq_laneq_s32(l[q], a0, low, 0), a1, low, 1);
        h[q] = vdotq_laneq_s32(vdotq_laneq_s32(h[q], b0, high, 2), b1, high, 3);
        l[q] = vdotq_laneq_s32(vdotq_laneq_s32(l[q], b0, low, 2), b1, low, 3);
      }
    }
    for (size_t q = 0; q < kQuads; ++q) {
      const float32x4_t dot = vcvtq_f32_s32(vmlaq_n_s32(l[q], h[q], 254));
      acc[q] = vfmaq_f32(acc[q], Neon::load_bf16(scale + 4 * q), dot);
    }
  }
  for (size_t q = 0; q < kQuads; ++q) vst1q_f32(out + 4 * q, acc[q]);
}

void dot_i4(const uint8_t* weights, const uint16_t* scale, size_t blocks, size_t groups, const SplitState* states,
            size_t tokens, float* out, size_t out_stride) {
  for (size_t b = 0; b < blocks; ++b) {
    for (size_t t = 0; t < tokens; ++t) {
      dot_i4_block(weights + b * groups * 32 * kInt4Rows, scale + b * groups * kInt4Rows, groups, states[t],
                   out + t * out_stride + b * kInt4Rows);
    }
  }
}

uint64_t probe_int8(uint64_t steps) {
  const uint64_t rounds = steps / 4 + 1;
  uint64_t left = rounds;
  // Sixteen independent accumulators: more than latency times throughput of any CPU with the instruction.
  asm volatile(
      "1:\n"
      "sdot v0.4s, v16.16b, v16.16b\n sdot v1.4s, v16.16b, v16.16b\n"
      "sdot v2.4s, v16.16b, v16.16b\n sdot v3.4s, v16.16b, v16.16b\n"
      "sdot v4.4s, v16.16b, v16.16b\n sdot v5.4s, v16.16b, v16.16b\n"
      "sdot v6.4s, v16.16b, v16.16b\n sdot v7.4s, v16.16b, v16.16b\n"
      "sdot v8.4s, v16.16b, v16.16b\n sdot v9.4s, v16.16b, v16.16b\n"
      "sdot v10.4s, v16.16b, v16.16b\n sdot v11.4s, v16.16b, v16.16b\n"
      "sdot v12.4s, v16.16b, v16.16b\n sdot v13.4s, v16.16b, v16.16b\n"
      "sdot v14.4s, v16.16b, v16.16b\n sdot v15.4s, v16.16b, v16.16b\n"
      "subs %[left], %[left], #1\n b.ne 1b\n"
      : [left] "+r"(left)
      :
      : "cc", "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12", "v13", "v14", "v15");
  return rounds * 16 * 16;
}

uint64_t probe_read(const uint8_t* data, size_t bytes) {
  uint64x2_t sum[4] = {vdupq_n_u64(0), vdupq_n_u64(0), vdupq_n_u64(0), vdupq_n_u64(0)};
  for (size_t i = 0; i < bytes; i += 64) {
    for (size_t j = 0; j < 4; ++j) sum[j] = vaddq_u64(sum[j], vreinterpretq_u64_u8(vld1q_u8(data + i + 16 * j)));
  }
  return vaddvq_u64(vaddq_u64(vaddq_u64(sum[0], sum[1]), vaddq_u64(sum[2], sum[3])));
}

constexpr KernelTable kTable = {
    .name = "neon_dotprod",
    .features = bitdistill::kDotprod,
    .only_by_name = false,
    .group = kFieldGroup,
    .tile = kMaxTile,
    .repack = repack,
    .gemv = gemv,
    .gemm = gemm,
    .gemm_int4 = nullptr,
    .dequantize = dequantize<Neon>,
    .rms_norm = rms_norm<Neon>,
    .quantize = quantize<Neon>,
    .quantize_int4 = quantize_int4<Neon>,
    .hadamard = hadamard<Neon>,
    .gate = gate<Neon>,
    .attend = attend<Neon, 4, 2>,
    .widen = widen<Neon>,
    .narrow_f16 = narrow_f16<Neon>,
    .dense = dense<Neon>,
    .dot_i8 = dot_i8,
    .dot_i4 = dot_i4,
    .probe_int8 = probe_int8,
    .probe_read = probe_read,
};

}  // namespace

const bitdistill::KernelTable* bitdistill::kernels_neon_dotprod() { return &kTable; }
