// Attention of a few query rows against one KV head's cache, with running maximum and sum (arXiv 1805.02867,
// 2205.14135): memory is bounded by kScoreKeys scores a row, whatever the length of the text.
//
// Keys lie transposed in blocks of 16, so that a vector holds the scores of neighbouring keys and no dot product ends
// in a horizontal sum. Included by a room after float_ops.h.
#pragma once

#include "float_ops.h"

namespace {

template <Cache kForm>
constexpr size_t kCacheBytes = kForm == Cache::i8    ? 1
                               : kForm == Cache::f16 ? 2
                                                     : 4;

template <class V, Cache kForm>
inline typename V::Reg load_cached(const uint8_t* p, size_t i) {
  if constexpr (kForm == Cache::i8) return V::load_i8(reinterpret_cast<const int8_t*>(p) + i);
  if constexpr (kForm == Cache::f16) return V::load_f16(reinterpret_cast<const uint16_t*>(p) + i);
  if constexpr (kForm == Cache::f32) return V::load(reinterpret_cast<const float*>(p) + i);
}

// scores[r][0..16) of kRows rows and one block of keys.
template <class V, Cache kForm, size_t kRows>
inline void score_block(const float* query, size_t query_stride, const uint8_t* block, size_t head_dim, float* scores) {
  constexpr size_t kVectors = kKeyBlock / V::kWidth;
  typename V::Reg acc[kRows][kVectors];
  for (size_t r = 0; r < kRows; ++r) {
    for (size_t v = 0; v < kVectors; ++v) acc[r][v] = V::set(0);
  }
  for (size_t e = 0; e < head_dim; ++e) {
    typename V::Reg keys[kVectors];
    for (size_t v = 0; v < kVectors; ++v) keys[v] = load_cached<V, kForm>(block, e * kKeyBlock + v * V::kWidth);
    for (size_t r = 0; r < kRows; ++r) {
      const auto q = V::set(query[r * query_stride + e]);
      for (size_t v = 0; v < kVectors; ++v) acc[r][v] = V::fma(q, keys[v], acc[r][v]);
    }
  }
  for (size_t r = 0; r < kRows; ++r) {
    for (size_t v = 0; v < kVectors; ++v) V::store(scores + r * kScoreKeys + v * V::kWidth, acc[r][v]);
  }
}

// out[r][0..kVectors * width) += sum over keys of weight[r][key] * value[key]
template <class V, Cache kForm, size_t kRows, size_t kVectors>
inline void mix_values(const float* weights, const uint8_t* values, size_t count, size_t padded_dim, size_t column,
                       float* out) {
  typename V::Reg acc[kRows][kVectors];
  for (size_t r = 0; r < kRows; ++r) {
    for (size_t v = 0; v < kVectors; ++v) acc[r][v] = V::load(out + r * padded_dim + column + v * V::kWidth);
  }
  for (size_t key = 0; key < count; ++key) {
    typename V::Reg value[kVectors];
    for (size_t v = 0; v < kVectors; ++v) {
      value[v] = load_cached<V, kForm>(values, key * padded_dim + column + v * V::kWidth);
    }
    for (size_t r = 0; r < kRows; ++r) {
      const auto w = V::set(weights[r * kScoreKeys + key]);
      for (size_t v = 0; v < kVectors; ++v) acc[r][v] = V::fma(w, value[v], acc[r][v]);
    }
  }
  for (size_t r = 0; r < kRows; ++r) {
    for (size_t v = 0; v < kVectors; ++v) V::store(out + r * padded_dim + column + v * V::kWidth, acc[r][v]);
  }
}

// Scores -> weights of one row over this chunk of keys, of which it sees [first, first + seen); rescales what the row
// has so far.
template <class V>
inline void soften(float* chunk, size_t first, size_t seen, size_t count, float* out, size_t padded_dim, float* highest,
                   float* total) {
  if (seen == 0) {
    for (size_t i = 0; i < count; ++i) chunk[i] = 0;
    return;
  }
  float* scores = chunk + first;
  float peak = *highest;
  auto peaks = V::set(peak);
  each<V>(seen, [&]<class W>(size_t i) {
    if constexpr (W::kWidth == V::kWidth) {
      peaks = W::max(W::load(scores + i), peaks);
    } else {
      peak = Scalar::max(scores[i], peak);
    }
  });
  peak = Scalar::max(peak, V::highest(peaks));
  const float shrink = exp<Scalar>(*highest - peak);
  auto totals = V::set(0);
  float sum = 0;
  each<V>(seen, [&]<class W>(size_t i) {
    const auto weight = exp<W>(W::sub(W::load(scores + i), W::set(peak)));
    W::store(scores + i, weight);
    if constexpr (W::kWidth == V::kWidth) {
      totals = W::add(totals, weight);
    } else {
      sum += weight;
    }
  });
  for (size_t i = 0; i < first; ++i) chunk[i] = 0;
  for (size_t i = first + seen; i < count; ++i) chunk[i] = 0;
  *total = *total * shrink + sum + V::sum(totals);
  *highest = peak;
  if (shrink != 1.0f) {
    each<V>(padded_dim, [&]<class W>(size_t i) { W::store(out + i, W::mul(W::load(out + i), W::set(shrink))); });
  }
}

// What is stored as codes is scaled after its products: the scores of keys, the weights of values.
template <class V, size_t kRows>
inline void scale_rows(float* rows, const float* scale, size_t count) {
  for (size_t r = 0; r < kRows; ++r) {
    float* row = rows + r * kScoreKeys;
    each<V>(count, [&]<class W>(size_t i) { W::store(row + i, W::mul(W::load(row + i), W::load(scale + i))); });
  }
}

template <class V, Cache kForm, size_t kRows>
inline void attend_rows(const Attend* a, size_t row, size_t start, size_t count, float* highest, float* total) {
  constexpr size_t kSize = kCacheBytes<kForm>;
  const auto* keys = static_cast<const uint8_t*>(a->keys) + start * a->head_dim * kSize;
  const auto* values = static_cast<const uint8_t*>(a->values) + start * a->padded_dim * kSize;
  float* scores = a->scores;
  float* out = a->out + row * a->padded_dim;
  for (size_t key = 0; key < count; key += kKeyBlock) {
    score_block<V, kForm, kRows>(a->query + row * a->padded_dim, a->padded_dim, keys + key * a->head_dim * kSize,
                                 a->head_dim, scores + key);
  }
  if constexpr (kForm == Cache::i8) scale_rows<V, kRows>(scores, a->key_scale + start, count);
  for (size_t r = 0; r < kRows; ++r) {
    const auto within = [&](size_t key) { return key <= start ? 0 : key - start < count ? key - start : count; };
    const size_t first = within(a->first[row + r]), end = within(a->visible[row + r]);
    soften<V>(scores + r * kScoreKeys, first, end - first, count, out + r * a->padded_dim, a->padded_dim,
              highest + row + r, total + row + r);
  }
  if constexpr (kForm == Cache::i8) scale_rows<V, kRows>(scores, a->value_scale + start, count);
  // padded_dim is a multiple of 16, and so of one vector; of two where a vector holds eight or fewer.
  constexpr size_t kPair = V::kWidth < kKeyBlock ? 2 : 1;
  for (size_t column = 0; column < a->padded_dim; column += kPair * V::kWidth) {
    mix_values<V, kForm, kRows, kPair>(scores, values, count, a->padded_dim, column, out);
  }
}

template <class V, Cache kForm, size_t kRows>
void attend_typed(const Attend* a) {
  float highest[kAttendRows], total[kAttendRows];
  for (size_t r = 0; r < a->rows; ++r) {
    highest[r] = -1e30f;
    total[r] = 0;
  }
  for (size_t i = 0; i < a->rows * a->padded_dim; ++i) a->out[i] = 0;
  const size_t last = a->visible[a->rows - 1];
  // Chunks of keys end at multiples of kScoreKeys wherever the first begins: the sums of a row then do not depend on
  // the rows beside it.
  size_t count;
  for (size_t start = a->first[0] / kKeyBlock * kKeyBlock; start < last; start += count) {
    const size_t end = start / kScoreKeys * kScoreKeys + kScoreKeys;
    count = (last < end ? last : end) - start;
    size_t row = 0;
    for (; row + kRows <= a->rows; row += kRows) attend_rows<V, kForm, kRows>(a, row, start, count, highest, total);
    for (; row + 2 <= a->rows; row += 2) attend_rows<V, kForm, 2>(a, row, start, count, highest, total);
    for (; row < a->rows; ++row) attend_rows<V, kForm, 1>(a, row, start, count, highest, total);
  }
  for (size_t r = 0; r < a->rows; ++r) {
    float* out = a->out + r * a->padded_dim;
    const float inverse = 1.0f / total[r];
    each<V>(a->padded_dim, [&]<class W>(size_t i) { W::store(out + i, W::mul(W::load(out + i), W::set(inverse))); });
  }
}

// kRows: query rows that share each load of a key, bounded by the room's registers.
template <class V, size_t kRows>
void attend(const Attend* a) {
  switch (a->form) {
    case Cache::i8:
      return attend_typed<V, Cache::i8, kRows>(a);
    case Cache::f16:
      return attend_typed<V, Cache::f16, kRows>(a);
    default:
      return attend_typed<V, Cache::f32, kRows>(a);
  }
}

}  // namespace
