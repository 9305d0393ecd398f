// Room `avx2`: two bits a weight, maddubs on unsigned weights and signed codes.
//
// Sums of pairs stay in int16 lanes for kFlush groups and are then widened: the lanes never saturate, whatever the
// codes.
#include <immintrin.h>

#include "attention.h"
#include "repack.h"

namespace {

using bitdistill::KernelTable;
using bitdistill::kGroupBytes;

struct Avx2 {
  using Reg = __m256;
  static constexpr size_t kWidth = 8;
  static Reg set(float x) { return _mm256_set1_ps(x); }
  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Reg x) { _mm256_storeu_ps(p, x); }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  static Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg abs(Reg a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static Reg round(Reg a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Reg pow2(Reg n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
  }
  static Reg load_bf16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static Reg load_f16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store_f16(uint16_t* p, Reg x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store_i8(int8_t* p, Reg x) {
    const __m256i wide = _mm256_cvtps_epi32(x);
    const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(half, half));
  }
  static float sum(Reg a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  static float highest(Reg a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }

  static constexpr size_t kScoreSums = 8, kMixSums = 8;
  static constexpr int32_t kCodeOffset = 0;
  using Ints = __m256i;
  static Ints ints(int32_t value) { return _mm256_set1_epi32(value); }
  static Ints load_codes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Ints four(const int8_t* p) {
    int32_t quad;
    __builtin_memcpy(&quad, p, 4);
    return _mm256_set1_epi32(quad);
  }
  // |cached| * (code with its sign): as in dot_i8 below, codes within 127 saturate nothing.
  static Ints dot(Ints acc, Ints cached, Ints codes) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(cached), _mm256_sign_epi8(codes, cached));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static Reg to_float(Ints a) { return _mm256_cvtepi32_ps(a); }
};

template <>
inline __m256 from_int<Avx2>(const int32_t* p) {
  return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline __m256i broadcast(const int8_t* four) {
  int32_t dword;
  __builtin_memcpy(&dword, four, 4);
  return _mm256_set1_epi32(dword);
}

inline int32_t sum_lanes(__m256i x) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  s = _mm_add_epi32(s, _mm_unpackhi_epi64(s, s));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 1)));
}

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

uint64_t probe_read(const uint8_t* data, size_t bytes) {
  __m256i sum[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
  for (size_t i = 0; i < bytes; i += 128) {
    for (size_t j = 0; j < 4; ++j) sum[j] = _mm256_add_epi64(sum[j], load(data + i + 32 * j));
  }
  uint64_t lanes[4];
  const __m256i all = _mm256_add_epi64(_mm256_add_epi64(sum[0], sum[1]), _mm256_add_epi64(sum[2], sum[3]));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), all);
  return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

constexpr KernelTable kTable = {
    .name = "avx2",
    .features = bitdistill::kAvx2 | bitdistill::kFma | bitdistill::kF16c,
    .group = kFieldGroup,
    .tile = kTile,
    .repack = repack,
    .gemv = gemv,
    .gemm = gemm,
    .dequantize = dequantize<Avx2>,
    .rms_norm = rms_norm<Avx2>,
    .quantize = quantize<Avx2>,
    .gate = gate<Avx2>,
    .attend = attend<Avx2, 4, 2>,
    .widen = widen<Avx2>,
    .narrow_f16 = narrow_f16<Avx2>,
    .dense = dense<Avx2>,
    .dot_i8 = dot_i8,
    .dot_i4 = dot_i4,
    .probe_int8 = probe_int8,
    .probe_read = probe_read,
};

}  // namespace

const bitdistill::KernelTable* bitdistill::kernels_avx2() { return &kTable; }
