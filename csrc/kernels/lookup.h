// Products of ternary weights with 4-bit codes by look-up, for avx512_vbmi.cc, whose decoding of bytes it shares.
//
// Four trits are one of 81 sums of four codes: a table of 128 bytes for four features of a token, which vpermi2b looks
// up for 64 rows at once, 256 multiply-adds an instruction where vpdpbusd has 64. Entries are sums + 32, 0..64, so
// three fit a byte before they are widened. A group of the file's order has five tables: trits 0-3 of features j, 4 +
// j, 8 + j, 12 + j for j = 0..3, which a byte's remainder by 81 numbers, and the last trits of features 16-19.
#pragma once

#include "avx512.h"

namespace {

constexpr size_t kChunkGroups = 12;           // of the tables of two tokens, which stay in the first-level cache
constexpr size_t kTables = 5 * kChunkGroups;  // a multiple of kAdded
constexpr size_t kAdded = 3;                  // entries that a byte adds
constexpr size_t kLookupTile = 2;             // tokens
constexpr size_t kTableBytes = 128;
constexpr size_t kPairsTogether = 4;  // pairs of row blocks whose numbers lie together
constexpr size_t kNumberBytes = bitdistill::kLookupBlocks / 2 * kTables * 64;
static_assert(kNumberBytes + kLookupTile * kTables * kTableBytes == bitdistill::kLookupScratch);
static_assert(kTables % kAdded == 0 && kAdded * 64 <= 255 && kTables * 64 <= 65535);
static_assert(bitdistill::kLookupBlocks % (2 * kPairsTogether) == 0);

struct alignas(64) Pattern {
  uint8_t at[64];
};

// Where a table has the sum of trits c0 + 3 c1 + 9 c2 + 27 c3: as the packing of 16-bit sums leaves them.
constexpr Table128 places_in_tables() {
  Table128 table{};
  for (unsigned i = 0; i < 128; ++i) {
    const unsigned rest = i % 81 % 27, last = i % 81 / 27;
    table.at[i] = static_cast<uint8_t>(last / 2 * 64 + rest / 8 * 16 + last % 2 * 8 + rest % 8);
  }
  return table;
}

// Bytes of feature j of 32 rows, each twice.
constexpr Pattern rows_of_feature(unsigned j) {
  Pattern pattern{};
  for (unsigned i = 0; i < 64; ++i) pattern.at[i] = static_cast<uint8_t>(i / 2 * 4 + j);
  return pattern;
}

// Trits `first` and `second` (3: none) of the 27 numbers of three trits, side by side.
constexpr Pattern trit_pairs(unsigned first, unsigned second) {
  constexpr unsigned kPowers[] = {1, 3, 9};
  Pattern pattern{};
  for (unsigned i = 0; i < 32; ++i) {
    pattern.at[2 * i] = static_cast<uint8_t>(i % 27 / kPowers[first] % 3);
    pattern.at[2 * i + 1] = second == 3 ? 0 : static_cast<uint8_t>(i % 27 / kPowers[second] % 3);
  }
  return pattern;
}

constexpr Table128 kPlaces = places_in_tables();
constexpr Pattern kRowsOf[4] = {rows_of_feature(0), rows_of_feature(1), rows_of_feature(2), rows_of_feature(3)};
constexpr Pattern kFirstTrits = trit_pairs(0, 1), kThirdTrit = trit_pairs(2, 3);

inline __m512i bytes_at(const void* p) { return _mm512_loadu_si512(p); }

// The five numbers of every group and row of two row blocks, rows of the first in even bytes, of the second in odd
// ones.
inline void number_trits(const uint8_t* first, const uint8_t* second, size_t groups, uint8_t* out) {
  constexpr size_t kStep = kPairsTogether * 64;
  const __m512i places = bytes_at(kPlaces.at), more_places = bytes_at(kPlaces.at + 64);
  const __m512i powers = _mm512_set1_epi32(1 | 3 << 8 | 9 << 16 | 27 << 24);
  const __mmask64 odd = 0xaaaaaaaaaaaaaaaau;
  for (size_t g = 0; g < groups; ++g, out += 5 * kStep) {
    __m512i rest[4], last[4];
    for (size_t i = 0; i < 4; ++i) {
      const __m512i v = bytes_at((i < 2 ? first : second) + g * kGroupBytes + i % 2 * 64);
      const __m512i less = _mm512_min_epu8(_mm512_sub_epi8(v, bytes_at(k81.at)), _mm512_sub_epi8(v, bytes_at(k162.at)));
      rest[i] = _mm512_min_epu8(v, less);
      const __m512i trits = _mm512_srli_epi16(_mm512_sub_epi8(v, rest[i]), 6);  // 81 and 162 -> 1 and 2
      last[i] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_and_si512(trits, bytes_at(kThree.at)), powers);
    }
    for (size_t j = 0; j < 4; ++j) {
      const __m512i rows = bytes_at(kRowsOf[j].at);
      const __m512i numbers = _mm512_mask_blend_epi8(odd, _mm512_permutex2var_epi8(rest[0], rows, rest[1]),
                                                     _mm512_permutex2var_epi8(rest[2], rows, rest[3]));
      _mm512_storeu_si512(out + j * kStep, _mm512_permutex2var_epi8(places, numbers, more_places));
    }
    const __m256i low = _mm512_cvtepi32_epi16(_mm512_or_si512(last[0], _mm512_slli_epi32(last[2], 8)));
    const __m256i high = _mm512_cvtepi32_epi16(_mm512_or_si512(last[1], _mm512_slli_epi32(last[3], 8)));
    const __m512i numbers = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    _mm512_storeu_si512(out + 4 * kStep, _mm512_permutex2var_epi8(places, numbers, more_places));
  }
}

// One table, of four codes.
inline void write_table(const int8_t* codes, int32_t sum, uint8_t* out) {
  int16_t words[2];
  __builtin_memcpy(words, codes, 4);
  const __m512i x = _mm512_set1_epi16(words[0]), y = _mm512_set1_epi16(words[1]);
  const __m512i base = _mm512_set1_epi16(static_cast<int16_t>(32 - sum));
  const __m512i two = _mm512_add_epi16(_mm512_maddubs_epi16(bytes_at(kFirstTrits.at), x), base);
  const __m512i none = _mm512_add_epi16(two, _mm512_maddubs_epi16(bytes_at(kThirdTrit.at), y));
  const __m512i fourth = _mm512_set1_epi16(codes[3]);
  const __m512i once = _mm512_add_epi16(none, fourth), twice = _mm512_add_epi16(once, fourth);
  _mm512_storeu_si512(out, _mm512_packus_epi16(none, once));
  _mm512_storeu_si512(out + 64, _mm512_packus_epi16(twice, twice));
}

// The tables of a token's groups, kLookupTile tables apart.
inline void write_tables(const int8_t* code, size_t groups, uint8_t* out) {
  constexpr size_t kStep = kLookupTile * kTableBytes;
  const __m128i transpose = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m128i one = _mm_set1_epi8(1);
  for (size_t g = 0; g < groups; ++g, code += kFileGroup, out += 5 * kStep) {
    alignas(16) int8_t quads[16];
    alignas(16) int32_t sums[4];
    const __m128i turned = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(code)), transpose);
    _mm_store_si128(reinterpret_cast<__m128i*>(quads), turned);
    _mm_store_si128(reinterpret_cast<__m128i*>(sums), _mm_dpbusd_epi32(_mm_setzero_si128(), one, turned));
    for (size_t j = 0; j < 4; ++j) write_table(quads + 4 * j, sums[j], out + j * kStep);
    write_table(code + 16, code[16] + code[17] + code[18] + code[19], out + 4 * kStep);
  }
}

// Sums over tables of one pair of row blocks and one token, in words: the even bytes' plus 256 times the odd bytes',
// and the odd bytes'.
struct alignas(64) Sums {
  __m512i all, odd;
};

// dot[r] (+)= for the 64 rows of a pair.
inline void write_sums(const Sums& sums, size_t count, bool is_first, int32_t* dot) {
  const __m512i even = _mm512_sub_epi16(sums.all, _mm512_slli_epi16(sums.odd, 8));
  const __m512i excess = _mm512_set1_epi32(static_cast<int32_t>(32 * count));
  for (size_t part = 0; part < 4; ++part, dot += 16) {
    const __m512i words = part < 2 ? even : sums.odd;
    const __m256i half = part % 2 == 0 ? _mm512_castsi512_si256(words) : _mm512_extracti64x4_epi64(words, 1);
    const __m512i part_sums = _mm512_sub_epi32(_mm512_cvtepu16_epi32(half), excess);
    _mm512_storeu_si512(dot, is_first ? part_sums : _mm512_add_epi32(_mm512_loadu_si512(dot), part_sums));
  }
}

// One pair and one token over `count` tables, a multiple of kAdded.
inline Sums look_up(const uint8_t* numbers, const uint8_t* tables, size_t count) {
  Sums sums{_mm512_setzero_si512(), _mm512_setzero_si512()};
  for (size_t k = 0; k < count; k += kAdded) {
    __m512i sum = _mm512_setzero_si512();
    for (size_t i = k; i < k + kAdded; ++i) {
      const uint8_t* table = tables + i * kLookupTile * kTableBytes;
      const __m512i number = bytes_at(numbers + i * kPairsTogether * 64);
      sum = _mm512_add_epi8(sum, _mm512_permutex2var_epi8(bytes_at(table), number, bytes_at(table + 64)));
    }
    sums.all = _mm512_add_epi16(sums.all, sum);
    sums.odd = _mm512_add_epi16(sums.odd, _mm512_srli_epi16(sum, 8));
  }
  return sums;
}

// clang-format off: one instruction a line
// Pair p against both tokens' tables in zmm24-25 and zmm26-27: the first of the entries that zmm(a) and zmm(b) add, or
// another by way of zmm(x) and zmm(y).
#define BD_FIRST(p, a, b)                        \
  "vmovdqu64 64*" #p "(%[n]), %%zmm" #a "\n"     \
  "vmovdqa64 %%zmm" #a ", %%zmm" #b "\n"         \
  "vpermi2b %%zmm25, %%zmm24, %%zmm" #a "\n"     \
  "vpermi2b %%zmm27, %%zmm26, %%zmm" #b "\n"
#define BD_NEXT(p, a, b, x, y)                   \
  "vmovdqu64 64*" #p "(%[n]), %%zmm" #x "\n"     \
  "vmovdqa64 %%zmm" #x ", %%zmm" #y "\n"         \
  "vpermi2b %%zmm25, %%zmm24, %%zmm" #x "\n"     \
  "vpermi2b %%zmm27, %%zmm26, %%zmm" #y "\n"     \
  "vpaddb %%zmm" #x ", %%zmm" #a ", %%zmm" #a "\n" \
  "vpaddb %%zmm" #y ", %%zmm" #b ", %%zmm" #b "\n"
#define BD_TABLES                                \
  "vmovdqu64 (%[t]), %%zmm24\n"                  \
  "vmovdqu64 64(%[t]), %%zmm25\n"                \
  "vmovdqu64 128(%[t]), %%zmm26\n"               \
  "vmovdqu64 192(%[t]), %%zmm27\n"
#define BD_STEP_ON "add $256, %[n]\n add $256, %[t]\n"
#define BD_NEXT_PAIRS                            \
  BD_TABLES                                      \
  BD_NEXT(0, 16, 17, 28, 29) BD_NEXT(1, 18, 19, 30, 31) BD_NEXT(2, 20, 21, 28, 29) BD_NEXT(3, 22, 23, 30, 31) \
  BD_STEP_ON
#define BD_WIDEN(sum, all, odd)                  \
  "vpaddw %%zmm" #sum ", %%zmm" #all ", %%zmm" #all "\n" \
  "vpsrlw $8, %%zmm" #sum ", %%zmm" #sum "\n"    \
  "vpaddw %%zmm" #sum ", %%zmm" #odd ", %%zmm" #odd "\n"
#define BD_KEEP(at, all, odd)                    \
  "vmovdqu64 %%zmm" #all ", 128*" #at "(%[s])\n" \
  "vmovdqu64 %%zmm" #odd ", 128*" #at "+64(%[s])\n"
// clang-format on

// Four pairs and two tokens: sums[2 p + t]. Assembly because gcc 12 keeps half of the sums on the stack.
inline void look_up_tile(const uint8_t* numbers, const uint8_t* tables, size_t count, Sums* sums) {
  static_assert(kPairsTogether == 4 && kLookupTile == 2 && kAdded == 3);
  size_t left = count / kAdded;
  asm volatile(BD_ZERO_8
               ".p2align 5\n"
               "1:\n" BD_TABLES BD_FIRST(0, 16, 17) BD_FIRST(1, 18, 19) BD_FIRST(2, 20, 21) BD_FIRST(3, 22, 23)
                   BD_STEP_ON BD_NEXT_PAIRS BD_NEXT_PAIRS BD_WIDEN(16, 0, 1) BD_WIDEN(17, 2, 3) BD_WIDEN(18, 4, 5)
                       BD_WIDEN(19, 6, 7) BD_WIDEN(20, 8, 9) BD_WIDEN(21, 10, 11) BD_WIDEN(22, 12, 13) BD_WIDEN(
                           23, 14, 15) "dec %[left]\n jnz 1b\n" BD_KEEP(0, 0, 1) BD_KEEP(1, 2, 3) BD_KEEP(2, 4, 5)
                           BD_KEEP(3, 6, 7) BD_KEEP(4, 8, 9) BD_KEEP(5, 10, 11) BD_KEEP(6, 12, 13) BD_KEEP(7, 14, 15)
               : [n] "+r"(numbers), [t] "+r"(tables), [left] "+r"(left)
               : [s] "r"(sums)
               : BD_ALL_ZMM);
}

// dot[t][64 p + r] (+)= for all pairs of a range and one or two tokens.
inline void look_up_rows(const uint8_t* numbers, const uint8_t* tables, size_t pairs, size_t tokens, size_t count,
                         bool is_first, int32_t* dot, size_t dot_stride) {
  constexpr size_t kTogetherBytes = kPairsTogether * kTables * 64;
  for (size_t first = 0; first < pairs; first += kPairsTogether, numbers += kTogetherBytes) {
    const size_t together = pairs - first < kPairsTogether ? pairs - first : kPairsTogether;
    Sums sums[kPairsTogether * kLookupTile];
    if (together == kPairsTogether && tokens == kLookupTile) {
      look_up_tile(numbers, tables, count, sums);
    } else {
      for (size_t i = 0; i < together * kLookupTile; ++i) {
        if (i % kLookupTile < tokens) {
          sums[i] = look_up(numbers + i / kLookupTile * 64, tables + i % kLookupTile * kTableBytes, count);
        }
      }
    }
    for (size_t i = 0; i < together * kLookupTile; ++i) {
      if (i % kLookupTile >= tokens) continue;
      write_sums(sums[i], count, is_first,
                 dot + i % kLookupTile * dot_stride + (first + i / kLookupTile) * 2 * kRowBlock);
    }
  }
}

void gemm_int4(const uint8_t* weights, size_t row_blocks, size_t stride, size_t groups, const int8_t* code,
               size_t code_stride, size_t tokens, uint8_t* scratch, int32_t* dot, size_t dot_stride) {
  uint8_t *numbers = scratch, *tables = scratch + kNumberBytes;
  const size_t pairs = (row_blocks + 1) / 2;
  for (size_t start = 0; start < groups; start += kChunkGroups) {
    const size_t count = groups - start < kChunkGroups ? groups - start : kChunkGroups;
    const size_t used = 5 * count, whole = (used + kAdded - 1) / kAdded * kAdded;
    for (size_t p = 0; p < pairs; ++p) {
      const uint8_t* first = weights + 2 * p * stride + start * kGroupBytes;
      uint8_t* out = numbers + (p / kPairsTogether * kTables * kPairsTogether + p % kPairsTogether) * 64;
      number_trits(first, 2 * p + 1 < row_blocks ? first + stride : first, count, out);
      for (size_t k = used; k < whole; ++k) {
        _mm512_storeu_si512(out + k * kPairsTogether * 64, _mm512_setzero_si512());
      }
    }
    for (size_t t = 0; t < tokens; t += kLookupTile) {
      const size_t together = tokens - t < kLookupTile ? 1 : kLookupTile;
      for (size_t i = 0; i < together; ++i) {
        uint8_t* out = tables + i * kTableBytes;
        write_tables(code + (t + i) * code_stride + start * kFileGroup, count, out);
        for (size_t k = used; k < whole; ++k) {  // a sum of nothing
          _mm512_storeu_si512(out + k * kLookupTile * kTableBytes, _mm512_set1_epi8(32));
        }
      }
      look_up_rows(numbers, tables, pairs, together, whole, start == 0, dot + t * dot_stride, dot_stride);
    }
  }
}

}  // namespace
