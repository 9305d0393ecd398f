// The Hadamard transform of BitNet v2 (arXiv 2504.18415, section 2.2) of consecutive blocks, in place. Included by a
// room after its vector type, of which it needs besides: exchange<h>, lanes i and i ^ h swapped.
//
// Butterflies (a, b) -> (a + b, a - b) of elements i and i + h, for h = 1, 2, 4, ..., and one multiplication by
// 1 / sqrt(block) in the end: every element is a tree of single additions, so all rooms have the same bits.
#pragma once

#include "float_ops.h"

namespace {

constexpr size_t kMostLanes = 16;

struct alignas(64) Signs {
  float at[kMostLanes];
};

// What the elements of lanes with bit `half` are multiplied by before they are added to their partners.
constexpr Signs signs_of(size_t half) {
  Signs signs{};
  for (size_t i = 0; i < kMostLanes; ++i) signs.at[i] = (i & half) != 0 ? -1.0f : 1.0f;
  return signs;
}

// The butterflies within one register. A product with 1 or -1 is exact: the fused sum rounds as an addition does.
template <class V, size_t kHalf = 1>
inline typename V::Reg butterflies_within(typename V::Reg x, size_t block) {
  if constexpr (kHalf < V::kWidth) {
    static constexpr Signs kSigns = signs_of(kHalf);
    if (kHalf < block) x = V::fma(x, V::load(kSigns.at), V::template exchange<kHalf>(x));
    return butterflies_within<V, 2 * kHalf>(x, block);
  } else {
    return x;
  }
}

// The levels from `half`, at least V's width, to the whole block; two at a time, which halves the traffic.
template <class V>
inline void butterflies_from(float* x, size_t n, size_t half, size_t block) {
  for (; 4 * half <= block; half *= 4) {
    for (size_t start = 0; start < n; start += 4 * half) {
      for (float* p = x + start; p < x + start + half; p += V::kWidth) {
        const auto a = V::load(p), b = V::load(p + half), c = V::load(p + 2 * half), d = V::load(p + 3 * half);
        const auto sum = V::add(a, b), difference = V::sub(a, b);
        const auto other_sum = V::add(c, d), other_difference = V::sub(c, d);
        V::store(p, V::add(sum, other_sum));
        V::store(p + half, V::add(difference, other_difference));
        V::store(p + 2 * half, V::sub(sum, other_sum));
        V::store(p + 3 * half, V::sub(difference, other_difference));
      }
    }
  }
  if (2 * half > block) return;
  for (size_t start = 0; start < n; start += 2 * half) {
    for (float* p = x + start; p < x + start + half; p += V::kWidth) {
      const auto a = V::load(p), b = V::load(p + half);
      V::store(p, V::add(a, b));
      V::store(p + half, V::sub(a, b));
    }
  }
}

template <class V>
void hadamard(float* x, size_t n, size_t block) {
  const size_t whole = n / V::kWidth * V::kWidth;  // all of it, unless blocks are narrower than a register
  if constexpr (V::kWidth > 1) {
    for (size_t i = 0; i < whole; i += V::kWidth) V::store(x + i, butterflies_within<V>(V::load(x + i), block));
    butterflies_from<Scalar>(x + whole, n - whole, 1, block);
  }
  butterflies_from<V>(x, whole, V::kWidth, block);
  const auto factor = static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(block)));
  each<V>(n, [&]<class W>(size_t i) { W::store(x + i, W::mul(W::load(x + i), W::set(factor))); });
}

}  // namespace
