// Room `avx_vnni`: two bits a weight, the 256-bit vpdpbusd of CPUs without AVX-512.
//
// avx_vnni_evex.cc builds this file once more, as the room `avx_vnni_evex`: the same instructions in AVX-512's
// encoding, so that the tests of this code run on CPUs that have one or the other.
//
// The integer loops over weights are assembly because they need all sixteen registers: gcc 12 spills accumulators
// (64 accesses to the stack for the 48 dot products of a group and six tokens). The compiler does not see that they use
// wide registers, so they end with vzeroupper themselves.
#include "avx2.h"

// Without {vex} (braces escaped) an assembler takes AVX-512's encoding.
#if defined(BITDISTILL_EVEX)
#define BD_DOT "vpdpbusd "
#else
#define BD_DOT "%{vex%} vpdpbusd "
#endif

namespace {

using bitdistill::KernelTable;

inline __m256i dpbusd(__m256i sum, __m256i weights, __m256i codes) {
#if defined(BITDISTILL_EVEX)
  return _mm256_dpbusd_epi32(sum, weights, codes);
#else
  return _mm256_dpbusd_avx_epi32(sum, weights, codes);
#endif
}

// Avx2 whose products of cached codes are vpdpbusd's.
struct AvxVnni : Avx2 {
  static constexpr int32_t kCodeOffset = 128;
  static Ints load_codes(const uint8_t* p) {
    return _mm256_xor_si256(Avx2::load_codes(p), _mm256_set1_epi8(static_cast<char>(0x80)));
  }
  static Ints dot(Ints acc, Ints cached, Ints codes) { return dpbusd(acc, cached, codes); }
};

struct alignas(32) Bytes32 {
  uint8_t at[32];
};

constexpr Bytes32 fill(uint8_t value) {
  Bytes32 bytes{};
  for (uint8_t& byte : bytes.at) byte = value;
  return bytes;
}

constexpr Bytes32 kThree = fill(3);

// A gemv multiplies fields 1 and 3 where they stand, two bits too high, in sums of their own: two features of a group.
static_assert(bitdistill::kMaxFeatures / kFieldGroup * 2 * 4 * 8 * 128 <= INT32_MAX,
              "a gemv accumulator holds its sum");

// clang-format off: one instruction a line
// Rows 8 q to 8 q + 8 of a group. Codes of its four fields are in ymm8-11.
#define BD_QUARTER(q, low, high)                    \
  "vmovdqu 32*" #q "(%[w]), %%ymm14\n"              \
  "vpand %%ymm12, %%ymm14, %%ymm15\n"               \
  BD_DOT "%%ymm8, %%ymm15, %%ymm" #low "\n"         \
  "vpand %%ymm13, %%ymm14, %%ymm15\n"               \
  BD_DOT "%%ymm9, %%ymm15, %%ymm" #high "\n"        \
  "vpsrlw $4, %%ymm14, %%ymm14\n"                   \
  "vpand %%ymm12, %%ymm14, %%ymm15\n"               \
  BD_DOT "%%ymm10, %%ymm15, %%ymm" #low "\n"        \
  "vpand %%ymm13, %%ymm14, %%ymm14\n"               \
  BD_DOT "%%ymm11, %%ymm14, %%ymm" #high "\n"

#define BD_COMBINE(q, low, high)                    \
  "vpsrad $2, %%ymm" #high ", %%ymm" #high "\n"     \
  "vpaddd %%ymm" #high ", %%ymm" #low ", %%ymm" #low "\n" \
  "vpsubd %%ymm15, %%ymm" #low ", %%ymm" #low "\n"  \
  "vmovdqu %%ymm" #low ", 32*" #q "(%[dot])\n"

#define BD_CLEAR(low, high)                               \
  "vpxor %%ymm" #low ", %%ymm" #low ", %%ymm" #low "\n"   \
  "vpxor %%ymm" #high ", %%ymm" #high ", %%ymm" #high "\n"
// clang-format on

#define BD_ALL_YMM                                                                                                  \
  "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", \
      "xmm12", "xmm13", "xmm14", "xmm15"

void gemv(const uint8_t* weights, size_t row_blocks, size_t stride, size_t groups, const int8_t* code, int32_t code_sum,
          int32_t* dot) {
  for (size_t b = 0; b < row_blocks; ++b) {
    const uint8_t* w = weights + b * stride;
    const int8_t* x = code;
    size_t left = groups;
    asm volatile(BD_CLEAR(0, 4) BD_CLEAR(1, 5) BD_CLEAR(2, 6) BD_CLEAR(3, 7)
                 "vmovdqa %[three], %%ymm12\n vpsllw $2, %%ymm12, %%ymm13\n"
                 ".p2align 5\n"
                 "1:\n"
                 "vpbroadcastd (%[x]), %%ymm8\n vpbroadcastd 4(%[x]), %%ymm9\n"
                 "vpbroadcastd 8(%[x]), %%ymm10\n vpbroadcastd 12(%[x]), %%ymm11\n"
                 BD_QUARTER(0, 0, 4) BD_QUARTER(1, 1, 5) BD_QUARTER(2, 2, 6) BD_QUARTER(3, 3, 7)
                 "add $128, %[w]\n add $16, %[x]\n dec %[left]\n jnz 1b\n"
                 "vpbroadcastd %[sum], %%ymm15\n"
                 BD_COMBINE(0, 0, 4) BD_COMBINE(1, 1, 5) BD_COMBINE(2, 2, 6) BD_COMBINE(3, 3, 7) "vzeroupper\n"
                 : [w] "+r"(w), [x] "+r"(x), [left] "+r"(left)
                 : [dot] "r"(dot + b * kRowBlock), [sum] "m"(code_sum), [three] "m"(kThree)
                 : BD_ALL_YMM);
  }
}

// A tile is sixteen rows by up to six tokens: token t accumulates in ymm(2t) and ymm(2t + 1), the weights of a field
// are in ymm12 and ymm13, a token's codes in ymm15.
constexpr size_t kTile = 6;

// clang-format off: one instruction a line
#define BD_TOKEN(token, low, high)                                \
  "vpbroadcastd 4*" #token "(%[x]), %%ymm15\n"                    \
  BD_DOT "%%ymm15, %%ymm12, %%ymm" #low "\n"                      \
  BD_DOT "%%ymm15, %%ymm13, %%ymm" #high "\n"
#define BD_FIELD_0                                                \
  "vpand (%[w]), %%ymm14, %%ymm12\n"                              \
  "vpand 32(%[w]), %%ymm14, %%ymm13\n"
#define BD_FIELD(shift)                                           \
  "vmovdqu (%[w]), %%ymm12\n"                                     \
  "vmovdqu 32(%[w]), %%ymm13\n"                                   \
  "vpsrlw $" #shift ", %%ymm12, %%ymm12\n"                        \
  "vpsrlw $" #shift ", %%ymm13, %%ymm13\n"                        \
  "vpand %%ymm14, %%ymm12, %%ymm12\n"                             \
  "vpand %%ymm14, %%ymm13, %%ymm13\n"
#define BD_STORE(token, low, high)                                \
  "vpbroadcastd 4*" #token "(%[sum]), %%ymm15\n"                  \
  "vpsubd %%ymm15, %%ymm" #low ", %%ymm" #low "\n"                \
  "vpsubd %%ymm15, %%ymm" #high ", %%ymm" #high "\n"              \
  "vmovdqu %%ymm" #low ", 128*" #token "(%[dot])\n"               \
  "vmovdqu %%ymm" #high ", 128*" #token "+32(%[dot])\n"

#define BD_EACH_1(DO) DO(0, 0, 1)
#define BD_EACH_2(DO) BD_EACH_1(DO) DO(1, 2, 3)
#define BD_EACH_3(DO) BD_EACH_2(DO) DO(2, 4, 5)
#define BD_EACH_4(DO) BD_EACH_3(DO) DO(3, 6, 7)
#define BD_EACH_5(DO) BD_EACH_4(DO) DO(4, 8, 9)
#define BD_EACH_6(DO) BD_EACH_5(DO) DO(5, 10, 11)
#define BD_CLEAR_TOKEN(token, low, high) BD_CLEAR(low, high)
#define BD_STEP(tokens) BD_EACH_##tokens(BD_TOKEN) "add $4*" #tokens ", %[x]\n"

#define BD_TILE(tokens)                                                                                    \
  asm volatile(BD_EACH_##tokens(BD_CLEAR_TOKEN) "vmovdqa %[three], %%ymm14\n"                              \
               ".p2align 5\n"                                                                              \
               "1:\n"                                                                                      \
               BD_FIELD_0 BD_STEP(tokens) BD_FIELD(2) BD_STEP(tokens)                                      \
               BD_FIELD(4) BD_STEP(tokens) BD_FIELD(6) BD_STEP(tokens)                                     \
               "add $128, %[w]\n dec %[left]\n jnz 1b\n"                                                   \
               BD_EACH_##tokens(BD_STORE) "vzeroupper\n"                                                   \
               : [w] "+r"(weights), [x] "+r"(code), [left] "+r"(groups)                                    \
               : [sum] "r"(code_sum), [dot] "r"(dot), [three] "m"(kThree)                                  \
               : BD_ALL_YMM);                                                                              \
  break
// clang-format on

// dot[t * 32 + 0..16) for the sixteen rows whose bytes begin at `weights` in every group.
void half_block(const uint8_t* weights, size_t groups, const int8_t* code, size_t tokens, const int32_t* code_sum,
                int32_t* dot) {
  switch (tokens) {
    case 1:
      BD_TILE(1);
    case 2:
      BD_TILE(2);
    case 3:
      BD_TILE(3);
    case 4:
      BD_TILE(4);
    case 5:
      BD_TILE(5);
    default:
      BD_TILE(6);
  }
}

void gemm(const uint8_t* weights, size_t groups, const int8_t* code, size_t tokens, const int32_t* code_sum,
          int32_t* dot) {
  half_block(weights, groups, code, tokens, code_sum, dot);
  half_block(weights + kGroupBytes / 2, groups, code, tokens, code_sum, dot + kRowBlock / 2);
}

// vpdpbusd multiplies unsigned by signed: weights are offset by 128, and 128 * sum(x) is taken off again.
void dot_i8(const int8_t* weights, size_t rows, size_t k, const int8_t* high, const int8_t* low, int32_t* high_dot,
            int32_t* low_dot) {
  const __m256i offset = _mm256_set1_epi8(static_cast<char>(0x80)), zero = _mm256_setzero_si256();
  const size_t whole = k / 32 * 32;
  __m256i high_sum = zero, low_sum = zero;
  for (size_t i = 0; i < whole; i += 32) {
    high_sum = dpbusd(high_sum, offset, load(high + i));
    low_sum = dpbusd(low_sum, offset, load(low + i));
  }
  const int32_t high_excess = sum_lanes(high_sum), low_excess = sum_lanes(low_sum);
  for (size_t r = 0; r < rows; ++r) {
    const int8_t* w = weights + r * k;
    __m256i acc[4] = {zero, zero, zero, zero};
    const auto step = [&](size_t i, __m256i& h, __m256i& l) __attribute__((always_inline)) {
      const __m256i a = _mm256_xor_si256(load(w + i), offset);
      h = dpbusd(h, a, load(high + i));
      l = dpbusd(l, a, load(low + i));
    };
    size_t i = 0;
    for (; i + 64 <= whole; i += 64) {
      step(i, acc[0], acc[1]);
      step(i + 32, acc[2], acc[3]);
    }
    if (i < whole) step(i, acc[0], acc[1]);
    int32_t h_rest = 0, l_rest = 0;
    for (i = whole; i < k; ++i) {
      h_rest += w[i] * high[i];
      l_rest += w[i] * low[i];
    }
    high_dot[r] = sum_lanes(_mm256_add_epi32(acc[0], acc[2])) - high_excess + h_rest;
    low_dot[r] = sum_lanes(_mm256_add_epi32(acc[1], acc[3])) - low_excess + l_rest;
  }
}

// Lanes are rows: 128 bytes hold eight features of a block's rows, low nibbles the first four.
void dot_i4_block(const uint8_t* weights, const uint16_t* scale, size_t groups, const SplitState& x, float* out) {
  const __m256i nibble = _mm256_set1_epi8(15), factor = _mm256_set1_epi32(254);
  constexpr size_t kParts = kInt4Rows / Avx2::kWidth;
  __m256 acc[kParts] = {};
  for (size_t g = 0; g < groups; ++g, scale += kInt4Rows) {
    __m256i h[kParts] = {}, l[kParts];
    for (__m256i& sum : l) sum = _mm256_set1_epi32(x.offset[g]);
    for (size_t i = 0; i < kInt4Group; i += 8, weights += 4 * kInt4Rows) {
      // One nibble after the other: with codes of both, gcc 12 has too few registers for the sums.
      for (size_t n = 0; n < 2; ++n) {
        const size_t k = g * kInt4Group + i + 4 * n;
        const __m256i high = broadcast(x.high + k), low = broadcast(x.low + k);
        for (size_t part = 0; part < kParts; ++part) {
          const __m256i bytes = load(weights + 32 * part);
          const __m256i four = _mm256_and_si256(n == 0 ? bytes : _mm256_srli_epi16(bytes, 4), nibble);
          h[part] = dpbusd(h[part], four, high);
          l[part] = dpbusd(l[part], four, low);
        }
      }
    }
    for (size_t part = 0; part < kParts; ++part) {
      const __m256i sum = _mm256_add_epi32(_mm256_mullo_epi32(h[part], factor), l[part]);
      const __m256 scales = Avx2::load_bf16(scale + part * Avx2::kWidth);
      acc[part] = _mm256_fmadd_ps(scales, _mm256_cvtepi32_ps(sum), acc[part]);
    }
  }
  for (size_t part = 0; part < kParts; ++part) Avx2::store(out + part * Avx2::kWidth, acc[part]);
}

#define BD_PROBE(token, low, high) \
  BD_DOT "%%ymm12, %%ymm12, %%ymm" #low "\n" BD_DOT "%%ymm12, %%ymm12, %%ymm" #high "\n"

uint64_t probe_int8(uint64_t steps) {
  const uint64_t rounds = steps / 6 + 1;
  uint64_t left = rounds;
  // Twelve independent accumulators: more than latency times throughput of any CPU with the instruction.
  asm volatile("1:\n" BD_EACH_6(BD_PROBE) "dec %[left]\n jnz 1b\n vzeroupper\n" : [left] "+r"(left) : : BD_ALL_YMM);
  return rounds * 12 * 32;
}

constexpr KernelTable kTable = {
#if defined(BITDISTILL_EVEX)
    .name = "avx_vnni_evex",
    .features = bitdistill::kAvx2 | bitdistill::kFma | bitdistill::kF16c | bitdistill::kAvx512f |
                bitdistill::kAvx512vl | bitdistill::kAvx512vnni,
    .only_by_name = true,
#else
    .name = "avx_vnni",
    .features = bitdistill::kAvx2 | bitdistill::kFma | bitdistill::kF16c | bitdistill::kAvxVnni,
    .only_by_name = false,
#endif
    .group = kFieldGroup,
    .tile = kTile,
    .repack = repack,
    .gemv = gemv,
    .gemm = gemm,
    .gemm_int4 = nullptr,
    BD_AVX2_FLOAT_KERNELS(AvxVnni),
};

}  // namespace

#if defined(BITDISTILL_EVEX)
const bitdistill::KernelTable* bitdistill::kernels_avx_vnni_evex() { return &kTable; }
#else
const bitdistill::KernelTable* bitdistill::kernels_avx_vnni() { return &kTable; }
#endif
