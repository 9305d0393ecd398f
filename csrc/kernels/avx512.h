// What both AVX-512 rooms share: the vector type of the float kernels, int8 dot products, probes, and the assembly of
// the tiles. Included by avx512_vnni.cc and avx512_vbmi.cc only.
//
// The integer loops are assembly because gcc 12 spends 6.6 cycles on a 64-byte line where the port limit is 4 (two bits
// a weight), and 16-20 against 8.4 (1.6 bits): it spills accumulators and moves them around the destructive vpdpbusd.
#pragma once

#include <immintrin.h>

#include "attention.h"
#include "hadamard.h"

namespace {

using bitdistill::kFileGroup;
using bitdistill::kGroupBytes;
using bitdistill::kMaxTile;

struct Avx512 {
  using Reg = __m512;
  static constexpr size_t kWidth = 16;
  static Reg set(float x) { return _mm512_set1_ps(x); }
  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Reg x) { _mm512_storeu_ps(p, x); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg abs(Reg a) { return _mm512_abs_ps(a); }
  static Reg round(Reg a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  template <size_t kLanes>
  static Reg exchange(Reg a) {
    if constexpr (kLanes >= 4) return _mm512_shuffle_f32x4(a, a, kLanes == 4 ? 0xb1 : 0x4e);
    return _mm512_permute_ps(a, kLanes == 1 ? 0xb1 : 0x4e);
  }
  static Reg pow2(Reg n) { return _mm512_scalef_ps(_mm512_set1_ps(1), n); }
  static Reg load_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static Reg load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store_f16(uint16_t* p, Reg x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store_i8(int8_t* p, Reg x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
  }
  static float sum(Reg a) { return _mm512_reduce_add_ps(a); }
  static float highest(Reg a) { return _mm512_reduce_max_ps(a); }

  static constexpr size_t kScoreSums = 8, kMixSums = 16;
  static constexpr int32_t kCodeOffset = 128;  // vpdpbusd wants one side unsigned
  using Ints = __m512i;
  static Ints ints(int32_t value) { return _mm512_set1_epi32(value); }
  static Ints bits(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static Ints load_codes(const uint8_t* p) {
    return _mm512_xor_si512(bits(p), _mm512_set1_epi8(static_cast<char>(0x80)));
  }
  template <int kShift, uint8_t kMask>
  static Ints field(Ints a) {
    const Ints shifted = kShift < 0 ? _mm512_slli_epi32(a, -kShift) : _mm512_srli_epi32(a, kShift);
    return _mm512_and_si512(shifted, _mm512_set1_epi8(kMask));
  }
  static Ints join(Ints a, Ints b) { return _mm512_or_si512(a, b); }
  static Ints four(const int8_t* p) {
    int32_t quad;
    __builtin_memcpy(&quad, p, 4);
    return _mm512_set1_epi32(quad);
  }
  static Ints dot(Ints acc, Ints cached, Ints codes) { return _mm512_dpbusd_epi32(acc, cached, codes); }
  static Reg to_float(Ints a) { return _mm512_cvtepi32_ps(a); }
};

template <>
inline __m512 from_int<Avx512>(const int32_t* p) {
  return _mm512_cvtepi32_ps(_mm512_loadu_si512(p));
}

// vpdpbusd multiplies unsigned by signed: weights are offset by 128, and 128 * sum(x) is taken off again.
void dot_i8(const int8_t* weights, size_t rows, size_t k, const int8_t* high, const int8_t* low, int32_t* high_dot,
            int32_t* low_dot) {
  const __m512i offset = _mm512_set1_epi8(static_cast<char>(0x80));
  const __m512i zero = _mm512_setzero_si512();
  const size_t whole = k / 64 * 64;
  const __mmask64 tail = (__mmask64{1} << (k - whole)) - 1;
  __m512i high_sum = zero, low_sum = zero;
  for (size_t i = 0; i < k; i += 64) {
    const __mmask64 mask = i < whole ? ~__mmask64{0} : tail;
    high_sum = _mm512_dpbusd_epi32(high_sum, offset, _mm512_maskz_loadu_epi8(mask, high + i));
    low_sum = _mm512_dpbusd_epi32(low_sum, offset, _mm512_maskz_loadu_epi8(mask, low + i));
  }
  const int32_t high_excess = _mm512_reduce_add_epi32(high_sum), low_excess = _mm512_reduce_add_epi32(low_sum);
  // One row at a time: two rows side by side are two streams a few lines apart, which prefetchers do not follow.
  for (size_t r = 0; r < rows; ++r) {
    const int8_t* w = weights + r * k;
    __m512i acc[4] = {zero, zero, zero, zero};
    const auto step = [&](size_t i, __mmask64 mask, __m512i& h, __m512i& l) __attribute__((always_inline)) {
      const __m512i a = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, w + i), offset);
      h = _mm512_dpbusd_epi32(h, a, _mm512_maskz_loadu_epi8(mask, high + i));
      l = _mm512_dpbusd_epi32(l, a, _mm512_maskz_loadu_epi8(mask, low + i));
    };
    constexpr __mmask64 kAll = ~__mmask64{0};
    size_t i = 0;
    for (; i + 128 <= whole; i += 128) {
      step(i, kAll, acc[0], acc[1]);
      step(i + 64, kAll, acc[2], acc[3]);
    }
    if (i < whole) step(i, kAll, acc[0], acc[1]);
    if (whole < k) step(whole, tail, acc[0], acc[1]);
    high_dot[r] = _mm512_reduce_add_epi32(_mm512_add_epi32(acc[0], acc[2])) - high_excess;
    low_dot[r] = _mm512_reduce_add_epi32(_mm512_add_epi32(acc[1], acc[3])) - low_excess;
  }
}

// One block for kTokens tokens, which share the unpacking. Lanes are rows: 128 bytes hold eight features of the rows of
// both halves, low nibbles the first four; each broadcast of four codes meets both halves.
template <size_t kTokens>
void dot_i4_block(const uint8_t* weights, const uint16_t* scale, size_t groups, const SplitState* states, float* out,
                  size_t out_stride) {
  // One token has a sum for each nibble: a single one would wait for the latency of a dot product at each step.
  constexpr size_t kSums = kTokens == 1 ? 2 : 1;
  const __m512i nibble = _mm512_set1_epi8(15), factor = _mm512_set1_epi32(254);
  const auto four = [](const int8_t* codes) __attribute__((always_inline)) {
    int32_t bits;
    __builtin_memcpy(&bits, codes, 4);
    return _mm512_set1_epi32(bits);
  };
  __m512 acc[kTokens][2];
  const int8_t *high[kTokens], *low[kTokens];
  for (size_t t = 0; t < kTokens; ++t) {
    acc[t][0] = acc[t][1] = _mm512_setzero_ps();
    high[t] = states[t].high;
    low[t] = states[t].low;
  }
  for (size_t g = 0; g < groups; ++g, weights += 32 * kInt4Rows, scale += kInt4Rows) {
    __m512i h[kTokens][2][kSums], l[kTokens][2][kSums];
    for (size_t t = 0; t < kTokens; ++t) {
      for (size_t half = 0; half < 2; ++half) {
        for (size_t s = 0; s < kSums; ++s) h[t][half][s] = l[t][half][s] = _mm512_setzero_si512();
        l[t][half][0] = _mm512_set1_epi32(states[t].offset[g]);
      }
    }
#pragma GCC unroll 8
    for (size_t i = 0; i < kInt4Group; i += 8) {
      const __m512i a = _mm512_loadu_si512(weights + 16 * i), b = _mm512_loadu_si512(weights + 16 * i + 64);
      const __m512i bytes[2][2] = {
          {_mm512_and_si512(a, nibble), _mm512_and_si512(b, nibble)},
          {_mm512_and_si512(_mm512_srli_epi16(a, 4), nibble), _mm512_and_si512(_mm512_srli_epi16(b, 4), nibble)}};
#pragma GCC unroll 4
      for (size_t t = 0; t < kTokens; ++t) {
#pragma GCC unroll 2
        for (size_t n = 0; n < 2; ++n) {
          const size_t k = g * kInt4Group + i + 4 * n, s = n % kSums;
          const __m512i x = four(high[t] + k), y = four(low[t] + k);
          h[t][0][s] = _mm512_dpbusd_epi32(h[t][0][s], bytes[n][0], x);
          h[t][1][s] = _mm512_dpbusd_epi32(h[t][1][s], bytes[n][1], x);
          l[t][0][s] = _mm512_dpbusd_epi32(l[t][0][s], bytes[n][0], y);
          l[t][1][s] = _mm512_dpbusd_epi32(l[t][1][s], bytes[n][1], y);
        }
      }
    }
    for (size_t half = 0; half < 2; ++half) {
      const __m512 scales = Avx512::load_bf16(scale + 16 * half);
      for (size_t t = 0; t < kTokens; ++t) {
        __m512i high_dot = h[t][half][0], low_dot = l[t][half][0];
        if constexpr (kSums == 2) {
          high_dot = _mm512_add_epi32(high_dot, h[t][half][1]);
          low_dot = _mm512_add_epi32(low_dot, l[t][half][1]);
        }
        const __m512i dot = _mm512_add_epi32(_mm512_mullo_epi32(high_dot, factor), low_dot);
        acc[t][half] = _mm512_fmadd_ps(scales, _mm512_cvtepi32_ps(dot), acc[t][half]);
      }
    }
  }
  for (size_t t = 0; t < kTokens; ++t) {
    _mm512_storeu_ps(out + t * out_stride, acc[t][0]);
    _mm512_storeu_ps(out + t * out_stride + 16, acc[t][1]);
  }
}

void dot_i4(const uint8_t* weights, const uint16_t* scale, size_t blocks, size_t groups, const SplitState* states,
            size_t tokens, float* out, size_t out_stride) {
  for (size_t b = 0; b < blocks; ++b, out += kInt4Rows) {
    size_t t = 0;
    for (; t + 4 <= tokens; t += 4) {
      dot_i4_block<4>(weights, scale, groups, states + t, out + t * out_stride, out_stride);
    }
    for (; t + 2 <= tokens; t += 2) {
      dot_i4_block<2>(weights, scale, groups, states + t, out + t * out_stride, out_stride);
    }
    for (; t < tokens; ++t) dot_i4_block<1>(weights, scale, groups, states + t, out + t * out_stride, out_stride);
    weights += groups * 32 * kInt4Rows;
    scale += groups * kInt4Rows;
  }
}

uint64_t probe_int8(uint64_t steps) {
  const uint64_t rounds = steps / 16 + 1;
  uint64_t left = rounds;
  // Sixteen independent accumulators: more than latency times throughput of any CPU with the instruction.
  asm volatile(
      "1:\n"
      "vpdpbusd %%zmm16, %%zmm16, %%zmm0\n vpdpbusd %%zmm16, %%zmm16, %%zmm1\n"
      "vpdpbusd %%zmm16, %%zmm16, %%zmm2\n vpdpbusd %%zmm16, %%zmm16, %%zmm3\n"
      "vpdpbusd %%zmm16, %%zmm16, %%zmm4\n vpdpbusd %%zmm16, %%zmm16, %%zmm5\n"
      "vpdpbusd %%zmm16, %%zmm16, %%zmm6\n vpdpbusd %%zmm16, %%zmm16, %%zmm7\n"
      "vpdpbusd %%zmm16, %%zmm16, %%zmm8\n vpdpbusd %%zmm16, %%zmm16, %%zmm9\n"
      "vpdpbusd %%zmm16, %%zmm16, %%zmm10\n vpdpbusd %%zmm16, %%zmm16, %%zmm11\n"
      "vpdpbusd %%zmm16, %%zmm16, %%zmm12\n vpdpbusd %%zmm16, %%zmm16, %%zmm13\n"
      "vpdpbusd %%zmm16, %%zmm16, %%zmm14\n vpdpbusd %%zmm16, %%zmm16, %%zmm15\n"
      "dec %[left]\n jnz 1b\n"
      : [left] "+r"(left)
      :
      : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",
        "xmm13", "xmm14", "xmm15", "xmm16");
  return rounds * 16 * 64;
}

uint64_t probe_read(const uint8_t* data, size_t bytes) {
  __m512i sum[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  for (size_t i = 0; i < bytes; i += 256) {
    for (size_t j = 0; j < 4; ++j) sum[j] = _mm512_add_epi64(sum[j], _mm512_loadu_si512(data + i + 64 * j));
  }
  return static_cast<uint64_t>(
      _mm512_reduce_add_epi64(_mm512_add_epi64(_mm512_add_epi64(sum[0], sum[1]), _mm512_add_epi64(sum[2], sum[3]))));
}

// --- tiles ---
// One row block is two registers wide (rows 0-15, 16-31). Token t accumulates in zmm(2t) and zmm(2t + 1). A step
// multiplies the weights in zmm26 and zmm27, one dword (four features) a row, by the same features of every token: four
// codes of each token, side by side at %[x]. Broadcasts alternate between zmm30 and zmm31.

// clang-format off: one instruction a line
#define BD_TOKEN(offset, broadcast, low, high)                       \
  "vpbroadcastd " #offset "(%[x]), %%zmm" #broadcast "\n"            \
  "vpdpbusd %%zmm" #broadcast ", %%zmm26, %%zmm" #low "\n"           \
  "vpdpbusd %%zmm" #broadcast ", %%zmm27, %%zmm" #high "\n"
#define BD_TOKENS_1 BD_TOKEN(0, 30, 0, 1)
#define BD_TOKENS_2 BD_TOKENS_1 BD_TOKEN(4, 31, 2, 3)
#define BD_TOKENS_3 BD_TOKENS_2 BD_TOKEN(8, 30, 4, 5)
#define BD_TOKENS_4 BD_TOKENS_3 BD_TOKEN(12, 31, 6, 7)
#define BD_TOKENS_5 BD_TOKENS_4 BD_TOKEN(16, 30, 8, 9)
#define BD_TOKENS_6 BD_TOKENS_5 BD_TOKEN(20, 31, 10, 11)
#define BD_TOKENS_7 BD_TOKENS_6 BD_TOKEN(24, 30, 12, 13)
#define BD_TOKENS_8 BD_TOKENS_7 BD_TOKEN(28, 31, 14, 15)
#define BD_TOKENS_9 BD_TOKENS_8 BD_TOKEN(32, 30, 16, 17)
#define BD_TOKENS_10 BD_TOKENS_9 BD_TOKEN(36, 31, 18, 19)
#define BD_TOKENS_11 BD_TOKENS_10 BD_TOKEN(40, 30, 20, 21)
#define BD_TOKENS_12 BD_TOKENS_11 BD_TOKEN(44, 31, 22, 23)
#define BD_STEP(tokens) BD_TOKENS_##tokens "add $4*" #tokens ", %[x]\n"

#define BD_ZERO(low, high) "vpxord %%zmm" #low ", %%zmm" #low ", %%zmm" #low "\nvpxord %%zmm" #high ", %%zmm" #high ", %%zmm" #high "\n"
#define BD_ZERO_1 BD_ZERO(0, 1)
#define BD_ZERO_2 BD_ZERO_1 BD_ZERO(2, 3)
#define BD_ZERO_3 BD_ZERO_2 BD_ZERO(4, 5)
#define BD_ZERO_4 BD_ZERO_3 BD_ZERO(6, 7)
#define BD_ZERO_5 BD_ZERO_4 BD_ZERO(8, 9)
#define BD_ZERO_6 BD_ZERO_5 BD_ZERO(10, 11)
#define BD_ZERO_7 BD_ZERO_6 BD_ZERO(12, 13)
#define BD_ZERO_8 BD_ZERO_7 BD_ZERO(14, 15)
#define BD_ZERO_9 BD_ZERO_8 BD_ZERO(16, 17)
#define BD_ZERO_10 BD_ZERO_9 BD_ZERO(18, 19)
#define BD_ZERO_11 BD_ZERO_10 BD_ZERO(20, 21)
#define BD_ZERO_12 BD_ZERO_11 BD_ZERO(22, 23)

#define BD_STORE(token, low, high)                                              \
  "vpbroadcastd 4*" #token "(%[sum]), %%zmm30\n"                                \
  "vpsubd %%zmm30, %%zmm" #low ", %%zmm" #low "\n"                              \
  "vpsubd %%zmm30, %%zmm" #high ", %%zmm" #high "\n"                            \
  "vmovdqu64 %%zmm" #low ", 128*" #token "(%[dot])\n"                           \
  "vmovdqu64 %%zmm" #high ", 128*" #token "+64(%[dot])\n"
#define BD_STORE_1 BD_STORE(0, 0, 1)
#define BD_STORE_2 BD_STORE_1 BD_STORE(1, 2, 3)
#define BD_STORE_3 BD_STORE_2 BD_STORE(2, 4, 5)
#define BD_STORE_4 BD_STORE_3 BD_STORE(3, 6, 7)
#define BD_STORE_5 BD_STORE_4 BD_STORE(4, 8, 9)
#define BD_STORE_6 BD_STORE_5 BD_STORE(5, 10, 11)
#define BD_STORE_7 BD_STORE_6 BD_STORE(6, 12, 13)
#define BD_STORE_8 BD_STORE_7 BD_STORE(7, 14, 15)
#define BD_STORE_9 BD_STORE_8 BD_STORE(8, 16, 17)
#define BD_STORE_10 BD_STORE_9 BD_STORE(9, 18, 19)
#define BD_STORE_11 BD_STORE_10 BD_STORE(10, 20, 21)
#define BD_STORE_12 BD_STORE_11 BD_STORE(11, 22, 23)

#define BD_ALL_ZMM                                                                                                   \
  "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", \
      "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23",   \
      "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31"

// Weights of trit position p from two-bit fields in zmm24 (rows 0-15) and zmm25 (rows 16-31).
#define BD_FIELD_0                        \
  "vpandd %[three], %%zmm24, %%zmm26\n"  \
  "vpandd %[three], %%zmm25, %%zmm27\n"
#define BD_FIELD(shift)                            \
  "vpsrlw $" #shift ", %%zmm24, %%zmm26\n"         \
  "vpsrlw $" #shift ", %%zmm25, %%zmm27\n"         \
  "vpandd %[three], %%zmm26, %%zmm26\n"            \
  "vpandd %[three], %%zmm27, %%zmm27\n"

// switch over the number of tokens; TILE(n) is the room's assembly for n tokens.
#define BD_EACH_TILE(TILE) \
  switch (tokens) {        \
    case 1: TILE(1);       \
    case 2: TILE(2);       \
    case 3: TILE(3);       \
    case 4: TILE(4);       \
    case 5: TILE(5);       \
    case 6: TILE(6);       \
    case 7: TILE(7);       \
    case 8: TILE(8);       \
    case 9: TILE(9);       \
    case 10: TILE(10);     \
    case 11: TILE(11);     \
    default: TILE(12);     \
  }

// clang-format on

struct alignas(64) Bytes64 {
  uint8_t at[64];
};

constexpr Bytes64 fill(uint8_t value) {
  Bytes64 bytes{};
  for (uint8_t& byte : bytes.at) byte = value;
  return bytes;
}

constexpr Bytes64 kThree = fill(3);

// Dot products from sums over masked two-bit fields: field p stands 2p bits too high.
inline __m512i sum_of_fields(__m512i f0, __m512i f1, __m512i f2, __m512i f3) {
  const __m512i low = _mm512_add_epi32(f0, _mm512_srai_epi32(f1, 2));
  const __m512i high = _mm512_add_epi32(_mm512_srai_epi32(f2, 4), _mm512_srai_epi32(f3, 6));
  return _mm512_add_epi32(low, high);
}

#define BD_AVX512_FLOAT_KERNELS                                                                                     \
  .dequantize = dequantize<Avx512>, .rms_norm = rms_norm<Avx512>, .quantize = quantize<Avx512>,                     \
  .quantize_int4 = quantize_int4<Avx512>, .hadamard = hadamard<Avx512>, .gate = gate<Avx512>,                       \
  .attend = attend<Avx512, 8, 4>, .widen = widen<Avx512>, .narrow_f16 = narrow_f16<Avx512>, .dense = dense<Avx512>, \
  .dot_i8 = dot_i8, .dot_i4 = dot_i4, .probe_int8 = probe_int8, .probe_read = probe_read

}  // namespace
