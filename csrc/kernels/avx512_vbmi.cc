// Room `avx512_vbmi`: 1.6 bits a weight, in the file's order, decoded in registers.
//
// A byte v = c0 + 3 c1 + 9 c2 + 27 c3 + 81 c4 splits into r = v mod 81 = min(v, v - 81, v - 162) as unsigned bytes and
// t = v - r = 81 c4. A 128-entry table turns r into four two-bit fields. A gemv multiplies t and the masked fields as
// they are, each in an accumulator of its own, and divides at the end: by 4, 16 and 64, and by 81 modulo 2^32.
#include "avx512.h"

namespace {

using bitdistill::KernelTable;

struct alignas(64) Table128 {
  uint8_t at[128];
};

constexpr Table128 fields_of_remainders() {
  Table128 table{};
  for (unsigned i = 0; i < 128; ++i) {
    unsigned rest = i % 81, fields = 0;
    for (unsigned p = 0; p < 4; ++p, rest /= 3) fields |= rest % 3 << 2 * p;
    table.at[i] = static_cast<uint8_t>(fields);
  }
  return table;
}

constexpr uint32_t inverse_modulo_2_32(uint32_t odd) {
  uint32_t x = odd;
  for (int i = 0; i < 5; ++i) x *= 2 - odd * x;  // Newton: each step doubles the correct bits
  return x;
}

constexpr Table128 kFields = fields_of_remainders();
constexpr Bytes64 k81 = fill(81), k162 = fill(162);
constexpr uint32_t kInverse81 = inverse_modulo_2_32(81);
static_assert(81u * kInverse81 == 1u);
// A lane's largest sum: four features a group, weight field at most 128 (c = 2 in bits 6-7), |code| <= 128.
static_assert(bitdistill::kMaxFeatures / kFileGroup * 4 * 128 * 128 <= INT32_MAX, "a gemv accumulator holds its sum");

void gemv(const uint8_t* weights, size_t row_blocks, size_t stride, size_t groups, const int8_t* code, int32_t code_sum,
          int32_t* dot) {
  const __m512i inverse81 = _mm512_set1_epi32(static_cast<int32_t>(kInverse81));
  const __m512i sum = _mm512_set1_epi32(code_sum);
  for (size_t b = 0; b < row_blocks; ++b) {
    const uint8_t* w = weights + b * stride;
    const int8_t* x = code;
    size_t left = groups;
    // Accumulators: zmm0-4 rows 0-15, zmm5-9 rows 16-31; field p in the p-th, t in the last.
    register __m512i a0 asm("zmm0");
    register __m512i a1 asm("zmm1");
    register __m512i a2 asm("zmm2");
    register __m512i a3 asm("zmm3");
    register __m512i a4 asm("zmm4");
    register __m512i b0 asm("zmm5");
    register __m512i b1 asm("zmm6");
    register __m512i b2 asm("zmm7");
    register __m512i b3 asm("zmm8");
    register __m512i b4 asm("zmm9");
    asm volatile(
        "vpxord %%zmm0, %%zmm0, %%zmm0\n vpxord %%zmm1, %%zmm1, %%zmm1\n vpxord %%zmm2, %%zmm2, %%zmm2\n"
        "vpxord %%zmm3, %%zmm3, %%zmm3\n vpxord %%zmm4, %%zmm4, %%zmm4\n vpxord %%zmm5, %%zmm5, %%zmm5\n"
        "vpxord %%zmm6, %%zmm6, %%zmm6\n vpxord %%zmm7, %%zmm7, %%zmm7\n vpxord %%zmm8, %%zmm8, %%zmm8\n"
        "vpxord %%zmm9, %%zmm9, %%zmm9\n"
        "vmovdqa64 %[c81], %%zmm28\n vmovdqa64 %[c162], %%zmm29\n"
        "vmovdqa64 (%[fields]), %%zmm30\n vmovdqa64 64(%[fields]), %%zmm31\n"
        "vmovdqa64 %[three], %%zmm24\n vpsllw $2, %%zmm24, %%zmm25\n"
        "vpsllw $4, %%zmm24, %%zmm26\n vpsllw $6, %%zmm24, %%zmm27\n"
        ".p2align 5\n"
        "1:\n"
        "vmovdqu64 (%[w]), %%zmm15\n"
        "vmovdqu64 64(%[w]), %%zmm16\n"
        "vpsubb %%zmm28, %%zmm15, %%zmm17\n"
        "vpsubb %%zmm28, %%zmm16, %%zmm18\n"
        "vpsubb %%zmm29, %%zmm15, %%zmm19\n"
        "vpsubb %%zmm29, %%zmm16, %%zmm20\n"
        "vpminub %%zmm15, %%zmm17, %%zmm17\n"
        "vpminub %%zmm16, %%zmm18, %%zmm18\n"
        "vpminub %%zmm17, %%zmm19, %%zmm17\n"
        "vpminub %%zmm18, %%zmm20, %%zmm18\n"
        "vpbroadcastd 16(%[x]), %%zmm14\n"
        "vpsubb %%zmm17, %%zmm15, %%zmm15\n"
        "vpsubb %%zmm18, %%zmm16, %%zmm16\n"
        "vpermi2b %%zmm31, %%zmm30, %%zmm17\n"
        "vpermi2b %%zmm31, %%zmm30, %%zmm18\n"
        "vpdpbusd %%zmm14, %%zmm15, %%zmm4\n"
        "vpdpbusd %%zmm14, %%zmm16, %%zmm9\n"
        "vpbroadcastd (%[x]), %%zmm10\n"
        "vpandd %%zmm24, %%zmm17, %%zmm19\n"
        "vpandd %%zmm24, %%zmm18, %%zmm20\n"
        "vpdpbusd %%zmm10, %%zmm19, %%zmm0\n"
        "vpdpbusd %%zmm10, %%zmm20, %%zmm5\n"
        "vpbroadcastd 4(%[x]), %%zmm11\n"
        "vpandd %%zmm25, %%zmm17, %%zmm21\n"
        "vpandd %%zmm25, %%zmm18, %%zmm22\n"
        "vpdpbusd %%zmm11, %%zmm21, %%zmm1\n"
        "vpdpbusd %%zmm11, %%zmm22, %%zmm6\n"
        "vpbroadcastd 8(%[x]), %%zmm12\n"
        "vpandd %%zmm26, %%zmm17, %%zmm19\n"
        "vpandd %%zmm26, %%zmm18, %%zmm20\n"
        "vpdpbusd %%zmm12, %%zmm19, %%zmm2\n"
        "vpdpbusd %%zmm12, %%zmm20, %%zmm7\n"
        "vpbroadcastd 12(%[x]), %%zmm13\n"
        "vpandd %%zmm27, %%zmm17, %%zmm21\n"
        "vpandd %%zmm27, %%zmm18, %%zmm22\n"
        "vpdpbusd %%zmm13, %%zmm21, %%zmm3\n"
        "vpdpbusd %%zmm13, %%zmm22, %%zmm8\n"
        "add $128, %[w]\n"
        "add $20, %[x]\n"
        "dec %[left]\n"
        "jnz 1b\n"
        : [w] "+r"(w), [x] "+r"(x), [left] "+r"(left), "=v"(a0), "=v"(a1), "=v"(a2), "=v"(a3), "=v"(a4), "=v"(b0),
          "=v"(b1), "=v"(b2), "=v"(b3), "=v"(b4)
        : [fields] "r"(kFields.at), [c81] "m"(k81), [c162] "m"(k162), [three] "m"(kThree)
        : "cc", "memory", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19",
          "xmm20", "xmm21", "xmm22", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31");
    const auto combine = [&](__m512i f0, __m512i f1, __m512i f2, __m512i f3, __m512i t) {
      return _mm512_add_epi32(sum_of_fields(f0, f1, f2, f3), _mm512_sub_epi32(_mm512_mullo_epi32(t, inverse81), sum));
    };
    const __m512i first = combine(a0, a1, a2, a3, a4), second = combine(b0, b1, b2, b3, b4);
    _mm512_storeu_si512(dot + b * kRowBlock, first);
    _mm512_storeu_si512(dot + b * kRowBlock + 16, second);
  }
}

// r of the two lines into zmm24-25, t / 81 into zmm26-27 (81 >> 6 = 1, 162 >> 6 = 2), then the fields of r into
// zmm24-25 after the step on t.
// clang-format off: one instruction a line
#define BD_DECODE                                 \
  "vmovdqu64 (%[w]), %%zmm26\n"                   \
  "vmovdqu64 64(%[w]), %%zmm27\n"                 \
  "vpsubb %[c81], %%zmm26, %%zmm24\n"             \
  "vpsubb %[c81], %%zmm27, %%zmm25\n"             \
  "vpsubb %[c162], %%zmm26, %%zmm28\n"            \
  "vpsubb %[c162], %%zmm27, %%zmm29\n"            \
  "vpminub %%zmm26, %%zmm24, %%zmm24\n"           \
  "vpminub %%zmm27, %%zmm25, %%zmm25\n"           \
  "vpminub %%zmm28, %%zmm24, %%zmm24\n"           \
  "vpminub %%zmm29, %%zmm25, %%zmm25\n"           \
  "vpsubb %%zmm24, %%zmm26, %%zmm26\n"            \
  "vpsubb %%zmm25, %%zmm27, %%zmm27\n"            \
  "vmovdqa64 (%[fields]), %%zmm28\n"              \
  "vpsrlw $6, %%zmm26, %%zmm26\n"                 \
  "vpsrlw $6, %%zmm27, %%zmm27\n"                 \
  "vpermi2b 64(%[fields]), %%zmm28, %%zmm24\n"    \
  "vpermi2b 64(%[fields]), %%zmm28, %%zmm25\n"    \
  "vpandd %[three], %%zmm26, %%zmm26\n"           \
  "vpandd %[three], %%zmm27, %%zmm27\n"

// Codes of a group lie by trit position, and t is the last: it is used first, from where it lies.
#define BD_TILE(tokens)                                                                                          \
  asm volatile(BD_ZERO_##tokens ".p2align 5\n"                                                                   \
               "1:\n" BD_DECODE "add $16*" #tokens ", %[x]\n" BD_STEP(tokens) "sub $20*" #tokens ", %[x]\n"      \
               BD_FIELD_0 BD_STEP(tokens) BD_FIELD(2) BD_STEP(tokens) BD_FIELD(4) BD_STEP(tokens) BD_FIELD(6)    \
               BD_STEP(tokens) "add $4*" #tokens ", %[x]\n"                                                      \
               "add $128, %[w]\n dec %[left]\n jnz 1b\n" BD_STORE_##tokens                                       \
               : [w] "+r"(weights), [x] "+r"(code), [left] "+r"(groups)                                          \
               : [sum] "r"(code_sum), [dot] "r"(dot), [fields] "r"(kFields.at), [c81] "m"(k81), [c162] "m"(k162), \
                 [three] "m"(kThree)                                                                             \
               : BD_ALL_ZMM);                                                                                    \
  break
// clang-format on

void gemm(const uint8_t* weights, size_t groups, const int8_t* code, size_t tokens, const int32_t* code_sum,
          int32_t* dot) {
  BD_EACH_TILE(BD_TILE)
}

}  // namespace

#include "lookup.h"

namespace {

constexpr KernelTable kTable = {
    .name = "avx512_vbmi",
    .features = bitdistill::kAvx2 | bitdistill::kFma | bitdistill::kF16c | bitdistill::kAvx512f |
                bitdistill::kAvx512bw | bitdistill::kAvx512vl | bitdistill::kAvx512dq | bitdistill::kAvx512vnni |
                bitdistill::kAvx512vbmi,
    .only_by_name = false,
    .group = kFileGroup,
    .tile = kMaxTile,
    .repack = nullptr,
    .gemv = gemv,
    .gemm = gemm,
    .gemm_int4 = gemm_int4,
    BD_AVX512_FLOAT_KERNELS,
};

}  // namespace

const bitdistill::KernelTable* bitdistill::kernels_avx512_vbmi() { return &kTable; }
