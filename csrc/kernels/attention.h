// Attention of a few query rows against one KV head's cache, with running maximum and sum (arXiv 1805.02867,
// 2205.14135): memory is bounded by kChunkKeys scores a row, whatever the length of the text.
//
// Keys lie transposed in blocks of 16, so that a vector holds the scores of neighbouring keys and no dot product ends
// in a horizontal sum. Included by a room before its vector type. Of V it needs besides what cached_codes.h does:
// kScoreSums and kMixSums, how many accumulators cover an addition's latency and how many the registers hold.
#pragma once

#include "cached_codes.h"

namespace {

template <class V, Cache kForm>
inline typename V::Reg load_cached(const uint8_t* p, size_t i) {
  if constexpr (kForm == Cache::f16) return V::load_f16(reinterpret_cast<const uint16_t*>(p) + i);
  if constexpr (kForm == Cache::f32) return V::load(reinterpret_cast<const float*>(p) + i);
}

// scores[r][0..16 kBlocks) of kRows rows and kBlocks blocks of keys.
template <class V, Cache kForm, size_t kRows, size_t kBlocks>
inline void score_blocks(const float* query, size_t query_stride, const uint8_t* keys, size_t head_dim, float* scores) {
  constexpr size_t kVectors = kBlocks * kKeyBlock / V::kWidth, kEach = kKeyBlock / V::kWidth;
  typename V::Reg acc[kRows][kVectors];
#pragma GCC unroll 8
  for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) acc[r][v] = V::set(0);
  }
  for (size_t e = 0; e < head_dim; ++e) {
    typename V::Reg key[kVectors];
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) {
      key[v] = load_cached<V, kForm>(keys, (v / kEach * head_dim + e) * kKeyBlock + v % kEach * V::kWidth);
    }
#pragma GCC unroll 8
    for (size_t r = 0; r < kRows; ++r) {
      const auto q = V::set(query[r * query_stride + e]);
#pragma GCC unroll 8
      for (size_t v = 0; v < kVectors; ++v) acc[r][v] = V::fma(q, key[v], acc[r][v]);
    }
  }
  for (size_t r = 0; r < kRows; ++r) {
    for (size_t v = 0; v < kVectors; ++v) V::store(scores + r * kChunkKeys + v * V::kWidth, acc[r][v]);
  }
}

// out[r][0..kVectors * width) += sum over keys of weight[r][key] * value[key]
template <class V, Cache kForm, size_t kRows, size_t kVectors>
inline void mix_values(const float* weights, const uint8_t* values, size_t count, size_t padded_dim, size_t column,
                       float* out) {
  typename V::Reg acc[kRows][kVectors];
#pragma GCC unroll 8
  for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) acc[r][v] = V::load(out + r * padded_dim + column + v * V::kWidth);
  }
  for (size_t key = 0; key < count; ++key) {
    typename V::Reg value[kVectors];
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) {
      value[v] = load_cached<V, kForm>(values, key * padded_dim + column + v * V::kWidth);
    }
#pragma GCC unroll 8
    for (size_t r = 0; r < kRows; ++r) {
      const auto w = V::set(weights[r * kChunkKeys + key]);
#pragma GCC unroll 8
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

constexpr bool has_start_apart(Cache form) { return form == Cache::i4 || form == Cache::i3; }
constexpr bool is_codes(Cache form) { return form == Cache::i8 || has_start_apart(form); }

template <class V>
inline float dot_floats(const float* x, const float* y, size_t n) {
  auto sum = V::set(0);
  float rest = 0;
  each<V>(n, [&]<class W>(size_t i) {
    if constexpr (W::kWidth == V::kWidth) {
      sum = W::fma(W::load(x + i), W::load(y + i), sum);
    } else {
      rest += x[i] * y[i];
    }
  });
  return V::sum(sum) + rest;
}

// Blocks or vectors side by side: what rows leave of `sums` accumulators.
constexpr size_t side_by_side(size_t sums, size_t rows) { return sums > rows ? sums / rows : 1; }

// Rows [row, row + kRows) on keys [start, start + count), all of one chunk.
template <class V, Cache kForm, size_t kRows>
inline void attend_rows(const Attend* a, const SplitRow* queries, size_t row, size_t start, size_t count,
                        float* highest, float* total) {
  constexpr bool kCodes = is_codes(kForm);
  constexpr size_t kTerms = kCodes ? 2 : 1;
  const CacheLayout& layout = a->layout;
  const size_t within_chunk = start % kChunkKeys;
  const uint8_t* chunk = a->cache + start / kChunkKeys * layout.bytes_of_chunk;
  const uint8_t* keys = chunk + within_chunk * layout.key_bytes;
  const uint8_t* values = chunk + layout.values_at + within_chunk * layout.value_bytes;
  const auto* key_scale = reinterpret_cast<const float*>(chunk + layout.scales_at) + within_chunk;
  const float* value_scale = key_scale + kChunkKeys;
  float* out = a->out + row * a->padded_dim;
  const auto score = [&]<size_t kBlocks>(size_t key) {
    const uint8_t* block = keys + key * layout.key_bytes;
    if constexpr (kCodes) {
      score_codes<V, kForm, kRows, kBlocks>(queries + row, block, (a->head_dim + 3) / 4, kKeyBlock * layout.key_bytes,
                                            key_scale + key, a->scores + key);
    } else {
      score_blocks<V, kForm, kRows, kBlocks>(a->query + row * a->padded_dim, a->padded_dim, block, a->head_dim,
                                             a->scores + key);
    }
  };
  constexpr size_t kBlocks = side_by_side(V::kScoreSums, kRows * kTerms * kKeyBlock / V::kWidth);
  size_t key = 0;
  for (; key + kBlocks * kKeyBlock <= count; key += kBlocks * kKeyBlock) score.template operator()<kBlocks>(key);
  for (; key < count; key += kKeyBlock) score.template operator()<1>(key);

  const bool has_start = has_start_apart(kForm) && start == 0;
  int8_t codes[kCodes ? kRows : 1][2][kChunkKeys];
  SplitRow weights[kRows];
  for (size_t r = 0; r < kRows; ++r) {
    float* scores = a->scores + r * kChunkKeys;
    const auto seen = [&](size_t key) { return key <= start ? 0 : key - start < count ? key - start : count; };
    const size_t first = seen(a->first[row + r]), end = seen(a->visible[row + r]);
    if (has_start) scores[0] = dot_floats<V>(a->query + (row + r) * a->padded_dim, a->start, a->padded_dim);
    soften<V>(scores, first, end - first, count, out + r * a->padded_dim, a->padded_dim, highest + row + r,
              total + row + r);
    if (has_start) {
      float* sum = out + r * a->padded_dim;
      const float* value = a->start + a->padded_dim;
      each<V>(a->padded_dim, [&]<class W>(size_t i) {
        W::store(sum + i, W::fma(W::set(scores[0]), W::load(value + i), W::load(sum + i)));
      });
      scores[0] = 0;
    }
    if constexpr (kCodes) {
      // What is stored as codes is scaled after its products: the weights of values.
      each<V>(count,
              [&]<class W>(size_t i) { W::store(scores + i, W::mul(W::load(scores + i), W::load(value_scale + i))); });
      weights[r] = split_row<V, Quads<V, kForm>::kOffset>(scores, count, (count + 3) / 4 * 4, codes[r][0], codes[r][1]);
    }
  }

  const auto mix = [&]<size_t kVectors>(size_t column) {
    if constexpr (kCodes) {
      mix_codes<V, kForm, kRows, kVectors>(weights, values, (count + 3) / 4, a->padded_dim, column, out);
    } else {
      mix_values<V, kForm, kRows, kVectors>(a->scores, values, count, a->padded_dim, column, out);
    }
  };
  constexpr size_t kVectors = side_by_side(V::kMixSums, kRows * kTerms);
  size_t column = 0;
  for (; column + kVectors * V::kWidth <= a->padded_dim; column += kVectors * V::kWidth) {
    mix.template operator()<kVectors>(column);
  }
  for (; column < a->padded_dim; column += V::kWidth) mix.template operator()<1>(column);
}

template <class V, Cache kForm, size_t kRows>
void attend_typed(const Attend* a) {
  float highest[kAttendRows], total[kAttendRows];
  SplitRow queries[kAttendRows];
  for (size_t r = 0; r < a->rows; ++r) {
    highest[r] = -1e30f;
    total[r] = 0;
    if constexpr (is_codes(kForm)) {
      int8_t* codes = a->query_code + 2 * r * a->padded_dim;
      queries[r] = split_row<V, Quads<V, kForm>::kOffset>(a->query + r * a->padded_dim, a->padded_dim, a->padded_dim,
                                                          codes, codes + a->padded_dim);
    }
  }
  for (size_t i = 0; i < a->rows * a->padded_dim; ++i) a->out[i] = 0;
  const size_t last = a->visible[a->rows - 1];
  // Chunks of keys end at multiples of kChunkKeys wherever the first begins: the sums of a row then do not depend on
  // the rows beside it.
  constexpr size_t kUnit = kForm == Cache::i3 ? 32 : kKeyBlock;  // keys whose bytes belong together
  size_t count;
  for (size_t start = a->first[0] / kUnit * kUnit; start < last; start += count) {
    const size_t end = start / kChunkKeys * kChunkKeys + kChunkKeys;
    count = (last < end ? last : end) - start;
    size_t row = 0;
    const auto rows = [&]<size_t kCount>() {
      for (; row + kCount <= a->rows; row += kCount) {
        attend_rows<V, kForm, kCount>(a, queries, row, start, count, highest, total);
      }
    };
    rows.template operator()<kRows>();
    if constexpr (kRows > 4) rows.template operator()<4>();
    rows.template operator()<2>();
    rows.template operator()<1>();
  }
  for (size_t r = 0; r < a->rows; ++r) {
    float* out = a->out + r * a->padded_dim;
    const float inverse = 1.0f / total[r];
    each<V>(a->padded_dim, [&]<class W>(size_t i) { W::store(out + i, W::mul(W::load(out + i), W::set(inverse))); });
  }
}

// Query rows that share each load of a key, bounded by the room's registers: kRows, kCodeRows against codes.
template <class V, size_t kRows, size_t kCodeRows>
void attend(const Attend* a) {
  switch (a->form) {
    case Cache::i8:
      return attend_typed<V, Cache::i8, kCodeRows>(a);
    case Cache::i4:
      return attend_typed<V, Cache::i4, kCodeRows>(a);
    case Cache::i3:
      return attend_typed<V, Cache::i3, kCodeRows>(a);
    case Cache::f16:
      return attend_typed<V, Cache::f16, kRows>(a);
    default:
      return attend_typed<V, Cache::f32, kRows>(a);
  }
}

}  // namespace
