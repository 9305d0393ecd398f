// Room `avx512_vnni`: two bits a weight, for CPUs whose AVX-512 has no byte permute over a 128-entry table.
//
// A gemv multiplies the masked fields as they are, each in an accumulator of its own, and shifts the sums at the end.
#include "avx512.h"
#include "repack.h"

namespace {

using bitdistill::KernelTable;

// A lane's largest sum: four features a group, weight field at most 128 (c = 2 in bits 6-7), |code| <= 128.
static_assert(bitdistill::kMaxFeatures / kFieldGroup * 4 * 128 * 128 <= INT32_MAX, "a gemv accumulator holds its sum");

void gemv(const uint8_t* weights, size_t row_blocks, size_t stride, size_t groups, const int8_t* code, int32_t code_sum,
          int32_t* dot) {
  const __m512i sum = _mm512_set1_epi32(code_sum);
  for (size_t b = 0; b < row_blocks; ++b) {
    const uint8_t* w = weights + b * stride;
    const int8_t* x = code;
    size_t left = groups;
    // Accumulators: zmm0-3 rows 0-15, zmm4-7 rows 16-31; field p in the p-th.
    register __m512i a0 asm("zmm0");
    register __m512i a1 asm("zmm1");
    register __m512i a2 asm("zmm2");
    register __m512i a3 asm("zmm3");
    register __m512i b0 asm("zmm4");
    register __m512i b1 asm("zmm5");
    register __m512i b2 asm("zmm6");
    register __m512i b3 asm("zmm7");
    asm volatile(
        "vpxord %%zmm0, %%zmm0, %%zmm0\n vpxord %%zmm1, %%zmm1, %%zmm1\n vpxord %%zmm2, %%zmm2, %%zmm2\n"
        "vpxord %%zmm3, %%zmm3, %%zmm3\n vpxord %%zmm4, %%zmm4, %%zmm4\n vpxord %%zmm5, %%zmm5, %%zmm5\n"
        "vpxord %%zmm6, %%zmm6, %%zmm6\n vpxord %%zmm7, %%zmm7, %%zmm7\n"
        "vmovdqa64 %[three], %%zmm24\n vpsllw $2, %%zmm24, %%zmm25\n"
        "vpsllw $4, %%zmm24, %%zmm26\n vpsllw $6, %%zmm24, %%zmm27\n"
        ".p2align 5\n"
        "1:\n"
        "vmovdqu64 (%[w]), %%zmm15\n"
        "vmovdqu64 64(%[w]), %%zmm16\n"
        "vpbroadcastd (%[x]), %%zmm10\n"
        "vpandd %%zmm24, %%zmm15, %%zmm17\n"
        "vpandd %%zmm24, %%zmm16, %%zmm18\n"
        "vpdpbusd %%zmm10, %%zmm17, %%zmm0\n"
        "vpdpbusd %%zmm10, %%zmm18, %%zmm4\n"
        "vpbroadcastd 4(%[x]), %%zmm11\n"
        "vpandd %%zmm25, %%zmm15, %%zmm19\n"
        "vpandd %%zmm25, %%zmm16, %%zmm20\n"
        "vpdpbusd %%zmm11, %%zmm19, %%zmm1\n"
        "vpdpbusd %%zmm11, %%zmm20, %%zmm5\n"
        "vpbroadcastd 8(%[x]), %%zmm12\n"
        "vpandd %%zmm26, %%zmm15, %%zmm17\n"
        "vpandd %%zmm26, %%zmm16, %%zmm18\n"
        "vpdpbusd %%zmm12, %%zmm17, %%zmm2\n"
        "vpdpbusd %%zmm12, %%zmm18, %%zmm6\n"
        "vpbroadcastd 12(%[x]), %%zmm13\n"
        "vpandd %%zmm27, %%zmm15, %%zmm19\n"
        "vpandd %%zmm27, %%zmm16, %%zmm20\n"
        "vpdpbusd %%zmm13, %%zmm19, %%zmm3\n"
        "vpdpbusd %%zmm13, %%zmm20, %%zmm7\n"
        "add $128, %[w]\n"
        "add $16, %[x]\n"
        "dec %[left]\n"
        "jnz 1b\n"
        : [w] "+r"(w), [x] "+r"(x), [left] "+r"(left), "=v"(a0), "=v"(a1), "=v"(a2), "=v"(a3), "=v"(b0), "=v"(b1),
          "=v"(b2), "=v"(b3)
        : [three] "m"(kThree)
        : "cc", "memory", "xmm10", "xmm11", "xmm12", "xmm13", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20",
          "xmm24", "xmm25", "xmm26", "xmm27");
    _mm512_storeu_si512(dot + b * kRowBlock, _mm512_sub_epi32(sum_of_fields(a0, a1, a2, a3), sum));
    _mm512_storeu_si512(dot + b * kRowBlock + 16, _mm512_sub_epi32(sum_of_fields(b0, b1, b2, b3), sum));
  }
}

// clang-format off: one instruction a line
#define BD_TILE(tokens)                                                                                              \
  asm volatile(BD_ZERO_##tokens ".p2align 5\n"                                                                       \
               "1:\n"                                                                                                \
               "vmovdqu64 (%[w]), %%zmm24\n"                                                                         \
               "vmovdqu64 64(%[w]), %%zmm25\n" BD_FIELD_0 BD_STEP(tokens) BD_FIELD(2) BD_STEP(tokens) BD_FIELD(4)    \
               BD_STEP(tokens) BD_FIELD(6) BD_STEP(tokens)                                                           \
               "add $128, %[w]\n dec %[left]\n jnz 1b\n" BD_STORE_##tokens                                           \
               : [w] "+r"(weights), [x] "+r"(code), [left] "+r"(groups)                                              \
               : [sum] "r"(code_sum), [dot] "r"(dot), [three] "m"(kThree)                                            \
               : BD_ALL_ZMM);                                                                                        \
  break
// clang-format on

void gemm(const uint8_t* weights, size_t groups, const int8_t* code, size_t tokens, const int32_t* code_sum,
          int32_t* dot) {
  BD_EACH_TILE(BD_TILE)
}

constexpr KernelTable kTable = {
    .name = "avx512_vnni",
    .features = bitdistill::kAvx2 | bitdistill::kFma | bitdistill::kF16c | bitdistill::kAvx512f |
                bitdistill::kAvx512bw | bitdistill::kAvx512vl | bitdistill::kAvx512dq | bitdistill::kAvx512vnni,
    .only_by_name = false,
    .group = kFieldGroup,
    .tile = kMaxTile,
    .repack = repack,
    .gemv = gemv,
    .gemm = gemm,
    .gemm_int4 = nullptr,
    BD_AVX512_FLOAT_KERNELS,
};

}  // namespace

const bitdistill::KernelTable* bitdistill::kernels_avx512_vnni() { return &kTable; }
