// Room `avx2`: two bits a weight, maddubs on unsigned weights and signed codes.
//
// Sums of pairs stay in int16 lanes for kFlush groups and are then widened: the lanes never saturate, whatever the
// codes.
#include "avx2.h"

namespace {

using bitdistill::KernelTable;

// One maddubs adds two products of c <= 2 and |code| <= 128 to a lane, and a group makes four of them.
constexpr size_t kFlush = 16;
static_assert(kFlush * 4 * 2 * 2 * 128 <= 32768, "-128 codes may reach -32768, which an int16 lane holds");
static_assert(kFlush * 4 * 2 * 2 * 127 <= 32767, "positive codes are at most 127");

constexpr size_t kTile = 4;

// dot[t][half * 16 + 0..16) for the rows of one half of a row block, kTokens tokens.
template <size_t kTokens>
inline void half_block(const uint8_t* weights, size_t groups, const int8_t* code, const int32_t* code_sum,
                       int32_t* dot) {
  const __m256i three = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
  __m256i total[kTokens][2];
  for (size_t t = 0; t < kTokens; ++t) total[t][0] = total[t][1] = _mm256_set1_epi32(-code_sum[t]);
  for (size_t start = 0; start < groups; start += kFlush) {
    const size_t end = groups - start < kFlush ? groups : start + kFlush;
    __m256i part[kTokens][2];
    for (size_t t = 0; t < kTokens; ++t) part[t][0] = part[t][1] = _mm256_setzero_si256();
    for (size_t g = start; g < end; ++g) {
      __m256i first = load(weights + g * kGroupBytes), second = load(weights + g * kGroupBytes + 32);
      for (size_t p = 0; p < 4; ++p) {
        const __m256i a = _mm256_and_si256(first, three), b = _mm256_and_si256(second, three);
        first = _mm256_srli_epi16(first, 2);
        second = _mm256_srli_epi16(second, 2);
        for (size_t t = 0; t < kTokens; ++t) {
          const __m256i x = broadcast(code + ((g * 4 + p) * kTokens + t) * 4);
          part[t][0] = _mm256_add_epi16(part[t][0], _mm256_maddubs_epi16(a, x));
          part[t][1] = _mm256_add_epi16(part[t][1], _mm256_maddubs_epi16(b, x));
        }
      }
    }
    for (size_t t = 0; t < kTokens; ++t) {
      for (size_t h = 0; h < 2; ++h) {
        total[t][h] = _mm256_add_epi32(total[t][h], _mm256_madd_epi16(part[t][h], ones));
      }
    }
  }
  for (size_t t = 0; t < kTokens; ++t) {
    for (size_t h = 0; h < 2; ++h) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(dot + t * kRowBlock + 8 * h), total[t][h]);
    }
  }
}

template <size_t kTokens>
inline void row_block(const uint8_t* weights, size_t groups, const int8_t* code, const int32_t* code_sum,
                      int32_t* dot) {
  half_block<kTokens>(weights, groups, code, code_sum, dot);
  half_block<kTokens>(weights + kGroupBytes / 2, groups, code, code_sum, dot + kRowBlock / 2);
}

// All four registers of a group at once: one sequential stream.
void gemv(const uint8_t* weights, size_t row_blocks, size_t stride, size_t groups, const int8_t* code, int32_t code_sum,
          int32_t* dot) {
  const __m256i three = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
  for (size_t b = 0; b < row_blocks; ++b) {
    const uint8_t* w = weights + b * stride;
    __m256i total[4];
    for (__m256i& t : total) t = _mm256_set1_epi32(-code_sum);
    for (size_t start = 0; start < groups; start += kFlush) {
      const size_t end = groups - start < kFlush ? groups : start + kFlush;
      __m256i part[4];
      for (__m256i& p : part) p = _mm256_setzero_si256();
      for (size_t g = start; g < end; ++g, w += kGroupBytes) {
        const int8_t* x = code + g * kFieldGroup;
        const __m256i x0 = broadcast(x), x1 = broadcast(x + 4), x2 = broadcast(x + 8), x3 = broadcast(x + 12);
        for (size_t q = 0; q < 4; ++q) {
          const __m256i v = load(w + 32 * q);
          const __m256i low =
              _mm256_add_epi16(_mm256_maddubs_epi16(_mm256_and_si256(v, three), x0),
                               _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(v, 2), three), x1));
          const __m256i high =
              _mm256_add_epi16(_mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(v, 4), three), x2),
                               _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(v, 6), three), x3));
          part[q] = _mm256_add_epi16(part[q], _mm256_add_epi16(low, high));
        }
      }
      for (size_t q = 0; q < 4; ++q) total[q] = _mm256_add_epi32(total[q], _mm256_madd_epi16(part[q], ones));
    }
    for (size_t q = 0; q < 4; ++q) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(dot + b * kRowBlock + 8 * q), total[q]);
    }
  }
}

void gemm(const uint8_t* weights, size_t groups, const int8_t* code, size_t tokens, const int32_t* code_sum,
          int32_t* dot) {
  switch (tokens) {
    case 1:
      return row_block<1>(weights, groups, code, code_sum, dot);
    case 2:
      return row_block<2>(weights, groups, code, code_sum, dot);
    case 3:
      return row_block<3>(weights, groups, code, code_sum, dot);
    default:
      return row_block<4>(weights, groups, code, code_sum, dot);
  }
}

// |w| * (x with w's sign): an int16 lane adds two products of at most 128 * 127.
static_assert(2 * 128 * 127 <= 32767, "weights down to -128 and codes within 127 never saturate maddubs");

void dot_i8(const int8_t* weights, size_t rows, size_t k, const int8_t* high, const int8_t* low, int32_t* high_dot,
            int32_t* low_dot) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (size_t r = 0; r < rows; ++r) {
    const int8_t* w = weights + r * k;
    __m256i h = _mm256_setzero_si256(), l = h;
    size_t i = 0;
    for (; i + 32 <= k; i += 32) {
      const __m256i v = load(w + i), magnitude = _mm256_abs_epi8(v);
      h = _mm256_add_epi32(
          h, _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(load(high + i), v)), ones));
      l = _mm256_add_epi32(
          l, _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(load(low + i), v)), ones));
    }
    int32_t h_rest = 0, l_rest = 0;
    for (; i < k; ++i) {
      h_rest += w[i] * high[i];
      l_rest += w[i] * low[i];
    }
    high_dot[r] = sum_lanes(h) + h_rest;
    low_dot[r] = sum_lanes(l) + l_rest;
  }
}

// Dot products of eight rows' nibbles, four each, with four codes, as pairs in int16 lanes.
inline __m256i four_i4(__m256i nibbles, const int8_t* codes) {
  int32_t four;
  __builtin_memcpy(&four, codes, 4);
  return _mm256_maddubs_epi16(nibbles, _mm256_set1_epi32(four));
}
static_assert(8 * 2 * 15 * 127 <= 32767, "an int16 lane adds eight pairs of products before it is widened");

void dot_i4_block(const uint8_t* weights, const uint16_t* scale, size_t groups, const SplitState& x, float* out) {
  const __m256i nibble = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1), factor = _mm256_set1_epi16(254);
  constexpr size_t kParts = kInt4Rows / Avx2::kWidth;
  __m256 acc[kParts] = {};
  for (size_t g = 0; g < groups; ++g, weights += 32 * kInt4Rows, scale += kInt4Rows) {
    __m256i sum[kParts];
    for (__m256i& one : sum) one = _mm256_set1_epi32(x.offset[g]);
    for (size_t i = 0; i < kInt4Group; i += 32) {  // as many as an int16 lane can add up
      __m256i h[kParts] = {}, l[kParts] = {};
      for (size_t j = i; j < i + 32; j += 8) {
        const int8_t* high = x.high + g * kInt4Group + j;
        const int8_t* low = x.low + g * kInt4Group + j;
        for (size_t part = 0; part < kParts; ++part) {
          const __m256i bytes = load(weights + (j / 8 * kParts + part) * 32);
          const __m256i first = _mm256_and_si256(bytes, nibble);
          const __m256i second = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
          h[part] = _mm256_add_epi16(h[part], _mm256_add_epi16(four_i4(first, high), four_i4(second, high + 4)));
          l[part] = _mm256_add_epi16(l[part], _mm256_add_epi16(four_i4(first, low), four_i4(second, low + 4)));
        }
      }
      for (size_t part = 0; part < kParts; ++part) {
        sum[part] = _mm256_add_epi32(sum[part], _mm256_madd_epi16(h[part], factor));
        sum[part] = _mm256_add_epi32(sum[part], _mm256_madd_epi16(l[part], one));
      }
    }
    for (size_t part = 0; part < kParts; ++part) {
      const __m256 scales = Avx2::load_bf16(scale + part * Avx2::kWidth);
      acc[part] = _mm256_fmadd_ps(scales, _mm256_cvtepi32_ps(sum[part]), acc[part]);
    }
  }
  for (size_t part = 0; part < kParts; ++part) Avx2::store(out + part * Avx2::kWidth, acc[part]);
}

uint64_t probe_int8(uint64_t steps) {
  const uint64_t rounds = steps / 16 + 1;
  uint64_t left = rounds;
  // 32 pairs a step, in eight independent sums: maddubs, widening left out, is this room's widest dot product.
  asm volatile(
      "vpxor %%ymm8, %%ymm8, %%ymm8\n"
      "1:\n"
      ".rept 4\n"
      "vpmaddubsw %%ymm8, %%ymm8, %%ymm9\n vpaddw %%ymm9, %%ymm0, %%ymm0\n"
      "vpmaddubsw %%ymm8, %%ymm8, %%ymm10\n vpaddw %%ymm10, %%ymm1, %%ymm1\n"
      "vpmaddubsw %%ymm8, %%ymm8, %%ymm11\n vpaddw %%ymm11, %%ymm2, %%ymm2\n"
      "vpmaddubsw %%ymm8, %%ymm8, %%ymm12\n vpaddw %%ymm12, %%ymm3, %%ymm3\n"
      "vpmaddubsw %%ymm8, %%ymm8, %%ymm13\n vpaddw %%ymm13, %%ymm4, %%ymm4\n"
      "vpmaddubsw %%ymm8, %%ymm8, %%ymm14\n vpaddw %%ymm14, %%ymm5, %%ymm5\n"
      "vpmaddubsw %%ymm8, %%ymm8, %%ymm15\n vpaddw %%ymm15, %%ymm6, %%ymm6\n"
      "vpmaddubsw %%ymm8, %%ymm8, %%ymm9\n vpaddw %%ymm9, %%ymm7, %%ymm7\n"
      ".endr\n"
      "dec %[left]\n jnz 1b\n"
      : [left] "+r"(left)
      :
      : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",
        "xmm13", "xmm14", "xmm15");
  return rounds * 32 * 32;
}

constexpr KernelTable kTable = {
    .name = "avx2",
    .features = bitdistill::kAvx2 | bitdistill::kFma | bitdistill::kF16c,
    .only_by_name = false,
    .group = kFieldGroup,
    .tile = kTile,
    .repack = repack,
    .gemv = gemv,
    .gemm = gemm,
    .gemm_int4 = nullptr,
    BD_AVX2_FLOAT_KERNELS(Avx2),
};

}  // namespace

const bitdistill::KernelTable* bitdistill::kernels_avx2() { return &kTable; }
