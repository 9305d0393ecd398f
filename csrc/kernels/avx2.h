// What the 256-bit rooms share: the vector type of the float kernels, loads, what has no dot product. Included by
// avx2.cc and avx_vnni.cc only.
#pragma once

#include <immintrin.h>

#include "attention.h"
#include "hadamard.h"
#include "repack.h"

namespace {

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
  template <size_t kLanes>
  static Reg exchange(Reg a) {
    if constexpr (kLanes == 4) return _mm256_permute2f128_ps(a, a, 1);
    return _mm256_permute_ps(a, kLanes == 1 ? 0xb1 : 0x4e);
  }
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
  static Ints bits(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Ints load_codes(const uint8_t* p) { return bits(p); }
  template <int kShift, uint8_t kMask>
  static Ints field(Ints a) {
    const Ints shifted = kShift < 0 ? _mm256_slli_epi32(a, -kShift) : _mm256_srli_epi32(a, kShift);
    return _mm256_and_si256(shifted, _mm256_set1_epi8(kMask));
  }
  static Ints join(Ints a, Ints b) { return _mm256_or_si256(a, b); }
  static Ints four(const int8_t* p) {
    int32_t quad;
    __builtin_memcpy(&quad, p, 4);
    return _mm256_set1_epi32(quad);
  }
  // |cached| * (code with its sign): two products of codes within 127 saturate no int16 lane.
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

// One block of rows for one token; each room's own.
void dot_i4_block(const uint8_t* weights, const uint16_t* scale, size_t groups, const SplitState& x, float* out);

void dot_i4(const uint8_t* weights, const uint16_t* scale, size_t blocks, size_t groups, const SplitState* states,
            size_t tokens, float* out, size_t out_stride) {
  for (size_t b = 0; b < blocks; ++b) {
    for (size_t t = 0; t < tokens; ++t) {
      dot_i4_block(weights + b * groups * 32 * kInt4Rows, scale + b * groups * kInt4Rows, groups, states[t],
                   out + t * out_stride + b * kInt4Rows);
    }
  }
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

#define BD_AVX2_FLOAT_KERNELS(codes_of)                                                                         \
  .dequantize = dequantize<Avx2>, .rms_norm = rms_norm<Avx2>, .quantize = quantize<Avx2>,                       \
  .quantize_int4 = quantize_int4<Avx2>, .hadamard = hadamard<Avx2>, .gate = gate<Avx2>,                         \
  .attend = attend<codes_of, 4, 2>, .widen = widen<Avx2>, .narrow_f16 = narrow_f16<Avx2>, .dense = dense<Avx2>, \
  .dot_i8 = dot_i8, .dot_i4 = dot_i4, .probe_int8 = probe_int8, .probe_read = probe_read

}  // namespace
