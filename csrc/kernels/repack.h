// From the file's order (five trits a byte, 20 features a group) to two bits a weight, 16 features a group:
//     byte = c0 | c1 << 2 | c2 << 4 | c3 << 6,   c[p] of feature 16 g + 4 p + j
// Included by the rooms that decode two-bit fields.
#pragma once

#include "../kernel_table.h"

namespace {

constexpr size_t kFieldGroup = 16;

struct Digits {
  uint8_t at[256][5];  // bytes above 242 are not valid; they decode to something, in bounds
};

constexpr Digits trits_of_bytes() {
  Digits digits{};
  for (unsigned byte = 0; byte < 256; ++byte) {
    unsigned rest = byte;
    for (unsigned p = 0; p < 5; ++p, rest /= 3) digits.at[byte][p] = static_cast<uint8_t>(rest % 3);
  }
  return digits;
}

constexpr Digits kDigits = trits_of_bytes();

void repack(const uint8_t* in, size_t features, uint8_t* out) {
  const size_t groups = (features + kFieldGroup - 1) / kFieldGroup;
  const size_t quads = (features + 3) / 4;  // runs of four features: one per trit position
  for (size_t i = 0; i < groups * bitdistill::kGroupBytes; ++i) out[i] = 0x55;  // c = 1 everywhere: weight 0
  for (size_t quad = 0; quad < quads; ++quad) {
    const uint8_t* from = in + quad / 5 * bitdistill::kGroupBytes;
    uint8_t* to = out + quad / 4 * bitdistill::kGroupBytes;
    const size_t position = quad % 5, shift = quad % 4 * 2;
    const auto keep = static_cast<uint8_t>(~(3u << shift));
    for (size_t i = 0; i < bitdistill::kGroupBytes; ++i) {
      to[i] = static_cast<uint8_t>((to[i] & keep) | kDigits.at[from[i]][position] << shift);
    }
  }
}

}  // namespace
