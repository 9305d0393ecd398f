// The floating-point kernels, once for every room: templates over a vector type V, with width-one `Scalar` for the
// tails and for the scalar room. Included by a room after its vector type; everything here is local to the room.
//
// V has: Reg, kWidth, set, load, store, add, sub, mul, div, max, fma (a * b + c), abs, round (to nearest, ties to
// even), pow2 (2^n for integral n in [-126, 127]), load_bf16, load_f16, store_f16, store_i8 (of integral
// values in int8's range), sum, highest. Loads and stores need no alignment. Rooms are compiled with -ffp-contract=off:
// what is fused is said, so that a tail rounds as the vectors do.
#pragma once

#include "../kernel_table.h"

namespace {

using bitdistill::Activation;
using bitdistill::Attend;
using bitdistill::Cache;
using bitdistill::CacheLayout;
using bitdistill::Dequantize;
using bitdistill::Float;
using bitdistill::kAttendRows;
using bitdistill::kChunkKeys;
using bitdistill::kInt4Group;
using bitdistill::kInt4Rows;
using bitdistill::kKeyBlock;
using bitdistill::kRowBlock;
using bitdistill::Rounding;
using bitdistill::SplitState;

inline float bits_to_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

inline float f16_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = (half >> 10) & 31, mantissa = half & 1023;
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24
    const float x = static_cast<float>(mantissa) * 0x1p-24f;
    return bits_to_float(float_to_bits(x) | sign);
  }
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | mantissa << 13);
  return bits_to_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline uint16_t float_to_f16(float x) {
  const uint32_t sign = (float_to_bits(x) >> 16) & 0x8000;
  const uint32_t magnitude = float_to_bits(x) & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 65536 or more
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves mantissa * 2^-24, rounded to even
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000));
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
}

constexpr float kHalfMax = 65504.0f;

struct Scalar {
  using Reg = float;
  static constexpr size_t kWidth = 1;
  static Reg set(float x) { return x; }
  static Reg load(const float* p) {
    float x;
    __builtin_memcpy(&x, p, 4);  // a shared file's floats may lie anywhere
    return x;
  }
  static void store(float* p, Reg x) { *p = x; }
  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg sub(Reg a, Reg b) { return a - b; }
  static Reg mul(Reg a, Reg b) { return a * b; }
  static Reg div(Reg a, Reg b) { return a / b; }
  static Reg max(Reg a, Reg b) { return a > b ? a : b; }
  static Reg fma(Reg a, Reg b, Reg c) { return __builtin_fmaf(a, b, c); }
  static Reg abs(Reg a) { return __builtin_fabsf(a); }
  static Reg round(Reg a) { return __builtin_rintf(a); }
  static Reg pow2(Reg n) { return bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23); }
  static Reg load_bf16(const uint16_t* p) {
    uint16_t half;
    __builtin_memcpy(&half, p, 2);
    return bits_to_float(static_cast<uint32_t>(half) << 16);
  }
  static Reg load_f16(const uint16_t* p) { return f16_to_float(*p); }
  static void store_f16(uint16_t* p, Reg x) { *p = float_to_f16(x); }
  static void store_i8(int8_t* p, Reg x) {
    *p = static_cast<int8_t>(x > -128.0f ? (x < 127.0f ? x : 127.0f) : -128.0f);
  }
  static float sum(Reg a) { return a; }
  static float highest(Reg a) { return a; }

  static constexpr size_t kScoreSums = 4, kMixSums = 4;
  static constexpr int32_t kCodeOffset = 0;
  struct Ints {
    int32_t sum;
    int8_t codes[4];
  };
  static Ints ints(int32_t value) { return {value, {}}; }
  static Ints load_codes(const uint8_t* p) {
    Ints quad{};
    __builtin_memcpy(quad.codes, p, 4);
    return quad;
  }
  static Ints four(const int8_t* p) { return load_codes(reinterpret_cast<const uint8_t*>(p)); }
  static Ints bits(const uint8_t* p) { return load_codes(p); }
  template <int kShift, uint8_t kMask>
  static Ints field(Ints a) {
    for (int8_t& byte : a.codes) {
      const unsigned wide = static_cast<uint8_t>(byte);
      byte = static_cast<int8_t>((kShift < 0 ? wide << -kShift : wide >> kShift) & kMask);
    }
    return a;
  }
  static Ints join(Ints a, Ints b) {
    for (size_t i = 0; i < 4; ++i) a.codes[i] |= b.codes[i];
    return a;
  }
  static Ints dot(Ints acc, Ints cached, Ints codes) {
    for (size_t i = 0; i < 4; ++i) acc.sum += cached.codes[i] * codes.codes[i];
    return acc;
  }
  static Reg to_float(Ints a) { return static_cast<float>(a.sum); }
};

// Runs f.operator()<V>(i) over whole vectors of [0, n), then f.operator()<Scalar>(i) over the rest.
template <class V, class Body>
inline void each(size_t n, Body&& body) {
  size_t i = 0;
  for (; i + V::kWidth <= n; i += V::kWidth) body.template operator()<V>(i);
  for (; i < n; ++i) body.template operator()<Scalar>(i);
}

// --- RMSNorm and quantisation ---

template <class V>
void rms_norm(const float* x, const float* gain, float eps, size_t n, float* out) {
  if (gain == nullptr) {
    if (out != x) each<V>(n, [&]<class W>(size_t i) { W::store(out + i, W::load(x + i)); });
    return;
  }
  // Four sums: one would wait for the latency of an addition at each step.
  typename V::Reg part[4] = {V::set(0), V::set(0), V::set(0), V::set(0)};
  size_t i = 0;
  for (; i + 4 * V::kWidth <= n; i += 4 * V::kWidth) {
    for (size_t j = 0; j < 4; ++j) {
      const auto v = V::load(x + i + j * V::kWidth);
      part[j] = V::fma(v, v, part[j]);
    }
  }
  float squares = V::sum(V::add(V::add(part[0], part[1]), V::add(part[2], part[3])));
  for (; i < n; ++i) squares += x[i] * x[i];
  const float inverse = 1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + eps);
  each<V>(n, [&]<class W>(size_t k) {
    W::store(out + k, W::mul(W::load(gain + k), W::mul(W::load(x + k), W::set(inverse))));
  });
}

// The floor of max|x| and of mean|x|: as in training, an all-zero row gives zero codes.
constexpr float kMaxFloor = 1e-5f;

// The code of every x, as code.operator()<W>(x) rounds it, to its segment; and the sums of segments.
template <class V, class Code>
inline void write_codes(const float* x, size_t n, size_t segment, size_t padded, int8_t* code, int32_t* sums,
                        Code&& code_of) {
  for (size_t start = 0, s = 0; start < n; start += segment, ++s, code += padded) {
    const size_t count = n - start < segment ? n - start : segment;
    const float* in = x + start;
    // Codes are integers below 2^7, and a lane adds fewer than 2^17 of them: exact in floats.
    auto totals = V::set(0);
    float total = 0;
    each<V>(count, [&]<class W>(size_t i) {
      const auto rounded = code_of.template operator()<W>(W::load(in + i));
      W::store_i8(code + i, rounded);
      if constexpr (W::kWidth == V::kWidth) {
        totals = W::add(totals, rounded);
      } else {
        total += rounded;
      }
    });
    for (size_t i = count; i < padded; ++i) code[i] = 0;
    total += V::sum(totals);
    sums[s] = total > -1e9f && total < 1e9f ? static_cast<int32_t>(total) : 0;  // NaN in, zero out
  }
}

template <class V>
float quantize(const float* x, size_t n, size_t segment, size_t padded, Rounding rounding, int8_t* code,
               int32_t* sums) {
  auto peaks = V::set(0);
  float peak = 0;
  each<V>(n, [&]<class W>(size_t i) {
    if constexpr (W::kWidth == V::kWidth) {
      peaks = W::max(W::abs(W::load(x + i)), peaks);
    } else {
      peak = Scalar::max(Scalar::abs(x[i]), peak);
    }
  });
  peak = Scalar::max(Scalar::max(V::highest(peaks), peak), kMaxFloor);
  const float scale = peak / 127.0f, inverse = 127.0f / peak;
  write_codes<V>(x, n, segment, padded, code, sums, [&]<class W>(typename W::Reg v) {
    return W::round(rounding == Rounding::divide ? W::div(v, W::set(scale)) : W::mul(v, W::set(inverse)));
  });
  return scale;
}

// Magnitudes are added in 64 sums whatever the width of V: every room has the same scale, and so the same codes.
template <class V>
float quantize_int4(const float* x, size_t n, size_t segment, size_t padded, int8_t* code, int32_t* sums) {
  constexpr size_t kSums = 64, kParts = kSums / V::kWidth;
  typename V::Reg part[kParts];
  for (auto& one : part) one = V::set(0);
  size_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (size_t p = 0; p < kParts; ++p) part[p] = V::add(part[p], V::abs(V::load(x + i + p * V::kWidth)));
  }
  float magnitude[kSums];
  for (size_t p = 0; p < kParts; ++p) V::store(magnitude + p * V::kWidth, part[p]);
  for (size_t j = 0; i < n; ++i, ++j) magnitude[j] += Scalar::abs(x[i]);
  for (size_t half = kSums / 2; half > 0; half /= 2)
    for (size_t j = 0; j < half; ++j) magnitude[j] += magnitude[j + half];
  const float scale = Scalar::max(magnitude[0] / static_cast<float>(n), kMaxFloor) / 2.6457513f;  // sqrt(7)
  write_codes<V>(x, n, segment, padded, code, sums, [&]<class W>(typename W::Reg v) {
    const auto least = W::max(W::round(W::div(v, W::set(scale))), W::set(-8));  // NaN too
    return W::sub(W::set(0), W::max(W::sub(W::set(0), least), W::set(-7)));
  });
  return scale;
}

// --- dequantisation of dot products ---

template <class V>
inline typename V::Reg from_int(const int32_t* p);

template <class V>
void dequantize(const Dequantize* a) {
  for (size_t t = 0; t < a->tokens; ++t) {
    const int32_t* dot = a->dot + t * kRowBlock;
    float* out = a->out + t * a->out_stride;
    const float act_scale = a->act_scale[t];
    each<V>(a->rows, [&]<class W>(size_t r) {
      const auto weight_scale = a->scale_per_row ? W::load(a->scale + r) : W::set(*a->scale);
      auto y = W::mul(from_int<W>(dot + r), W::mul(W::set(act_scale), weight_scale));
      if (a->bias != nullptr) y = W::add(y, W::load(a->bias + r));
      if (a->accumulate) y = W::add(W::load(out + r), y);
      W::store(out + r, y);
    });
  }
}

template <>
inline float from_int<Scalar>(const int32_t* p) {
  return static_cast<float>(*p);
}

// --- exp, gates ---

// e^x to about 2 units in the last place (Cephes expf); x clamped to [-87.3, 88].
template <class V>
inline typename V::Reg exp(typename V::Reg x) {
  x = V::max(x, V::set(-87.3f));
  x = V::sub(V::set(0), V::max(V::sub(V::set(0), x), V::set(-88.0f)));
  const auto n = V::round(V::mul(x, V::set(1.44269504f)));
  auto r = V::fma(n, V::set(-0.693359375f), x);
  r = V::fma(n, V::set(2.12194440e-4f), r);
  auto p = V::set(1.9875691500e-4f);
  p = V::fma(p, r, V::set(1.3981999507e-3f));
  p = V::fma(p, r, V::set(8.3334519073e-3f));
  p = V::fma(p, r, V::set(4.1665795894e-2f));
  p = V::fma(p, r, V::set(1.6666665459e-1f));
  p = V::fma(p, r, V::set(5.0000001201e-1f));
  p = V::fma(p, V::mul(r, r), V::add(r, V::set(1)));
  return V::mul(p, V::pow2(n));
}

template <class V>
void gate(const float* gate, const float* up, size_t n, Activation activation, float* out) {
  each<V>(n, [&]<class W>(size_t i) {
    const auto g = W::load(gate + i);
    typename W::Reg y;
    if (activation == Activation::silu) {
      y = W::div(g, W::add(W::set(1), exp<W>(W::sub(W::set(0), g))));
    } else if (activation == Activation::gelu_tanh) {
      // g / 2 (1 + tanh(z)) = g / (1 + e^(-2z)), z = sqrt(2 / pi) (g + 0.044715 g^3)
      const auto cubic = W::mul(g, W::fma(W::mul(g, g), W::set(0.044715f), W::set(1)));
      y = W::div(g, W::add(W::set(1), exp<W>(W::mul(cubic, W::set(-1.5957691216f)))));
    } else {
      const auto positive = W::max(g, W::set(0));
      y = W::mul(positive, positive);
    }
    W::store(out + i, W::mul(y, W::load(up + i)));
  });
}

// --- half-width floats ---

template <class V>
inline typename V::Reg load_as(const void* p, Float type, size_t i) {
  switch (type) {
    case Float::bf16:
      return V::load_bf16(static_cast<const uint16_t*>(p) + i);
    case Float::f16:
      return V::load_f16(static_cast<const uint16_t*>(p) + i);
    default:
      return V::load(static_cast<const float*>(p) + i);
  }
}

template <class V>
void widen(const void* in, Float type, size_t n, float* out) {
  each<V>(n, [&]<class W>(size_t i) { W::store(out + i, load_as<W>(in, type, i)); });
}

// Saturates: an infinity left in the cache would turn a masked 0 * inf into NaN.
template <class V>
void narrow_f16(const float* in, size_t n, uint16_t* out) {
  each<V>(n, [&]<class W>(size_t i) {
    auto x = W::max(W::load(in + i), W::set(-kHalfMax));
    x = W::sub(W::set(0), W::max(W::sub(W::set(0), x), W::set(-kHalfMax)));
    W::store_f16(out + i, x);
  });
}

// --- dense rows: head, embedding-sized matrices, linears left in full precision ---

template <class V, Float kType, size_t kRows, size_t kTokens>
inline void dense_tile(const uint8_t* weights, size_t row_bytes, size_t k, const float* x, size_t x_stride, float* out,
                       size_t out_stride) {
  typename V::Reg acc[kRows][kTokens];
  float rest[kRows][kTokens] = {};
  for (size_t r = 0; r < kRows; ++r) {
    for (size_t t = 0; t < kTokens; ++t) acc[r][t] = V::set(0);
  }
  // Rows side by side are streams that prefetchers do not follow: the rows after these are called for as one stream.
  constexpr size_t kStepBytes = kRows * V::kWidth * (kType == Float::f32 ? 4 : 2);
  const uint8_t* next = weights + kRows * row_bytes;
  size_t i = 0;
  for (; i + V::kWidth <= k; i += V::kWidth, next += kStepBytes) {
    for (size_t b = 0; b < kStepBytes; b += 64) __builtin_prefetch(next + b, 0, 2);
    typename V::Reg in[kTokens];
    for (size_t t = 0; t < kTokens; ++t) in[t] = V::load(x + t * x_stride + i);
    for (size_t r = 0; r < kRows; ++r) {
      const auto w = load_as<V>(weights + r * row_bytes, kType, i);
      for (size_t t = 0; t < kTokens; ++t) acc[r][t] = V::fma(w, in[t], acc[r][t]);
    }
  }
  for (; i < k; ++i) {
    for (size_t r = 0; r < kRows; ++r) {
      const float w = load_as<Scalar>(weights + r * row_bytes, kType, i);
      for (size_t t = 0; t < kTokens; ++t) rest[r][t] += w * x[t * x_stride + i];
    }
  }
  for (size_t t = 0; t < kTokens; ++t) {
    for (size_t r = 0; r < kRows; ++r) out[t * out_stride + r] = V::sum(acc[r][t]) + rest[r][t];
  }
}

template <class V, Float kType>
void dense_typed(const void* weights, size_t rows, size_t k, const float* x, size_t x_stride, size_t tokens, float* out,
                 size_t out_stride) {
  const size_t row_bytes = k * (kType == Float::f32 ? 4 : 2);
  const auto* w = static_cast<const uint8_t*>(weights);
  for (size_t r = 0; r < rows; r += 4) {
    const size_t count = rows - r < 4 ? rows - r : 4;
    size_t t = 0;
    for (; count == 4 && t + 4 <= tokens; t += 4) {
      dense_tile<V, kType, 4, 4>(w + r * row_bytes, row_bytes, k, x + t * x_stride, x_stride, out + t * out_stride + r,
                                 out_stride);
    }
    for (; t < tokens; ++t) {
      const float* in = x + t * x_stride;
      float* to = out + t * out_stride + r;
      if (count == 4) {
        dense_tile<V, kType, 4, 1>(w + r * row_bytes, row_bytes, k, in, x_stride, to, out_stride);
      } else {
        for (size_t j = 0; j < count; ++j) {
          dense_tile<V, kType, 1, 1>(w + (r + j) * row_bytes, row_bytes, k, in, x_stride, to + j, out_stride);
        }
      }
    }
  }
}

template <class V>
void dense(const void* weights, Float type, size_t rows, size_t k, const float* x, size_t x_stride, size_t tokens,
           float* out, size_t out_stride) {
  if (type == Float::bf16) {
    dense_typed<V, Float::bf16>(weights, rows, k, x, x_stride, tokens, out, out_stride);
  } else {
    dense_typed<V, Float::f32>(weights, rows, k, x, x_stride, tokens, out, out_stride);
  }
}

}  // namespace
