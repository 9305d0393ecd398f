// Products of float rows with a cache of int8, four-bit or three-bit codes, for attention.h. Of V it needs besides what
// float_ops.h does: Ints (int32 lanes, kWidth of them, or as many quads of codes), ints (a value in every lane), bits
// (a quad for each lane, as it lies), load_codes (the same offset by kCodeOffset), field (each byte shifted right, left
// where negative, and masked), join (of two fields), four (one quad for all lanes), dot (adds a quad's products to each
// lane; the first codes offset by kCodeOffset, or from 0 to 15), to_float.
#pragma once

#include "float_ops.h"

namespace {

// Products with a cache of codes. Queries and softmax weights are split in two int8 codes each, x ~= (254 high + low) *
// scale, so that products with the cache are sums of int8 products: exact, and four to a lane. An error of x is at most
// scale / 2 = peak / 64516.

struct SplitRow {
  const int8_t *high, *low;
  float scale;
  int32_t high_excess, low_excess;  // what the offset of the cached codes adds to a product
};

// How the quads of a form lie (kernel_table.h): kTogether of them share kRuns runs of bytes. get<q> is the q-th of
// those at `runs`, `run` bytes apart, with kOffset added to its codes.
template <class V, Cache kForm>
struct Quads {
  static constexpr size_t kTogether = 1, kRuns = 1;
  static constexpr int32_t kOffset = V::kCodeOffset;
  template <size_t kQuad>
  static typename V::Ints get(const uint8_t* runs, size_t) {
    return V::load_codes(runs);
  }
};

template <class V>
struct Quads<V, Cache::i4> {
  static constexpr size_t kTogether = 2, kRuns = 1;
  static constexpr int32_t kOffset = 8;
  template <size_t kQuad>
  static typename V::Ints get(const uint8_t* runs, size_t) {
    return V::template field<4 * kQuad, 15>(V::bits(runs));
  }
};

template <class V>
struct Quads<V, Cache::i3> {
  static constexpr size_t kTogether = 8, kRuns = 3;
  static constexpr int32_t kOffset = 4;
  template <size_t kQuad>
  static typename V::Ints get(const uint8_t* runs, size_t run) {
    const auto low = V::template field<2 * (kQuad % 4), 3>(V::bits(runs + kQuad / 4 * run));
    return V::join(low, V::template field<static_cast<int>(kQuad) - 2, 4>(V::bits(runs + 2 * run)));
  }
};

// body.operator()<i>() for i = 0 .. kCount - 1.
template <size_t kCount, size_t kFirst = 0, class Body>
inline __attribute__((always_inline)) void unrolled(Body&& body) {
  if constexpr (kFirst < kCount) {
    body.template operator()<kFirst>();
    unrolled<kCount, kFirst + 1>(body);
  }
}

// x[n] -> codes, zero up to `padded`, for products with codes that kOffset was added to.
template <class V, int32_t kOffset>
inline SplitRow split_row(const float* x, size_t n, size_t padded, int8_t* high, int8_t* low) {
  auto peaks = V::set(0);
  float peak = 0;
  each<V>(n, [&]<class W>(size_t i) {
    if constexpr (W::kWidth == V::kWidth) {
      peaks = W::max(W::abs(W::load(x + i)), peaks);
    } else {
      peak = Scalar::max(Scalar::abs(x[i]), peak);
    }
  });
  peak = Scalar::max(V::highest(peaks), peak);
  if (!(peak > 1e-30f && peak < 1e30f)) peak = 1;  // so small that codes are zero; or not finite
  const float step = peak / 127, scale = step / 254;
  auto high_sum = V::set(0), low_sum = V::set(0);
  float high_rest = 0, low_rest = 0;
  each<V>(n, [&]<class W>(size_t i) {
    const auto value = W::load(x + i);
    const auto h = W::round(W::mul(value, W::set(1 / step)));
    const auto l = W::round(W::mul(W::fma(h, W::set(-step), value), W::set(1 / scale)));
    W::store_i8(high + i, h);
    W::store_i8(low + i, l);
    if constexpr (W::kWidth == V::kWidth) {
      high_sum = W::add(high_sum, h);
      low_sum = W::add(low_sum, l);
    } else {
      high_rest += h;
      low_rest += l;
    }
  });
  for (size_t i = n; i < padded; ++i) high[i] = low[i] = 0;
  const auto excess = [](float sum) {
    return sum > -1e6f && sum < 1e6f ? kOffset * static_cast<int32_t>(sum) : 0;  // NaN in, anything out
  };
  return {high, low, scale, excess(V::sum(high_sum) + high_rest), excess(V::sum(low_sum) + low_rest)};
}

// Strips of cached codes, kStrips registers wide, against kRows rows: sums[r][strip] = 254 high + low as floats.
// A quad is four features, or four keys; runs of quads are `run` bytes apart, strips `strip_stride`.
template <class V, Cache kForm, size_t kRows, size_t kStrips>
inline void dot_codes(const SplitRow* rows, const uint8_t* codes, size_t quads, size_t run, size_t strip_stride,
                      typename V::Reg (&sums)[kRows][kStrips]) {
  using Form = Quads<V, kForm>;
  typename V::Ints high[kRows][kStrips], low[kRows][kStrips];
#pragma GCC unroll 8
  for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (size_t s = 0; s < kStrips; ++s) {
      high[r][s] = V::ints(-rows[r].high_excess);
      low[r][s] = V::ints(-rows[r].low_excess);
    }
  }
  for (size_t first = 0; first < quads; first += Form::kTogether, codes += Form::kRuns * run) {
    unrolled<Form::kTogether>([&]<size_t kQuad>() __attribute__((always_inline)) {
      const size_t q = first + kQuad;
      if (kQuad > 0 && q >= quads) return;
      typename V::Ints cached[kStrips];
#pragma GCC unroll 8
      for (size_t s = 0; s < kStrips; ++s) cached[s] = Form::template get<kQuad>(codes + s * strip_stride, run);
#pragma GCC unroll 8
      for (size_t r = 0; r < kRows; ++r) {
        const auto h = V::four(rows[r].high + 4 * q), l = V::four(rows[r].low + 4 * q);
#pragma GCC unroll 8
        for (size_t s = 0; s < kStrips; ++s) {
          high[r][s] = V::dot(high[r][s], cached[s], h);
          low[r][s] = V::dot(low[r][s], cached[s], l);
        }
      }
    });
  }
#pragma GCC unroll 8
  for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (size_t s = 0; s < kStrips; ++s) {
      sums[r][s] = V::fma(V::to_float(high[r][s]), V::set(254), V::to_float(low[r][s]));
    }
  }
}

// scores[r][0..16 kBlocks), for keys of kBlocks blocks, `block_bytes` each, and their scales.
template <class V, Cache kForm, size_t kRows, size_t kBlocks>
inline void score_codes(const SplitRow* query, const uint8_t* keys, size_t quads, size_t block_bytes,
                        const float* scale, float* scores) {
  // The strips of a block lie side by side, and the next block follows.
  constexpr size_t kEach = kKeyBlock / V::kWidth, kStripBytes = 4 * V::kWidth;
  if constexpr (kEach > 1 && kBlocks > 1) {
    for (size_t b = 0; b < kBlocks; ++b) {
      score_codes<V, kForm, kRows, 1>(query, keys + b * block_bytes, quads, block_bytes, scale + b * kKeyBlock,
                                      scores + b * kKeyBlock);
    }
  } else {
    typename V::Reg sums[kRows][kBlocks * kEach];
    dot_codes<V, kForm>(query, keys, quads, 4 * kKeyBlock, kBlocks > 1 ? block_bytes : kStripBytes, sums);
    for (size_t r = 0; r < kRows; ++r) {
      for (size_t s = 0; s < kBlocks * kEach; ++s) {
        const auto step = V::mul(V::load(scale + s * V::kWidth), V::set(query[r].scale));
        V::store(scores + r * kChunkKeys + s * V::kWidth, V::mul(sums[r][s], step));
      }
    }
  }
}

// out[r][0..kVectors * width) += sum over keys of weight[r][key] * value[key], values in quads of keys.
template <class V, Cache kForm, size_t kRows, size_t kVectors>
inline void mix_codes(const SplitRow* weights, const uint8_t* values, size_t quads, size_t padded_dim, size_t column,
                      float* out) {
  typename V::Reg sums[kRows][kVectors];
  dot_codes<V, kForm>(weights, values + 4 * column, quads, 4 * padded_dim, 4 * V::kWidth, sums);
  for (size_t r = 0; r < kRows; ++r) {
    for (size_t v = 0; v < kVectors; ++v) {
      float* to = out + r * padded_dim + column + v * V::kWidth;
      V::store(to, V::fma(sums[r][v], V::set(weights[r].scale), V::load(to)));
    }
  }
}

}  // namespace
