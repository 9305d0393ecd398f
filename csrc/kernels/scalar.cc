// Room `scalar`: slow and obvious, in the file's order. The oracle of the other rooms.
#include "attention.h"
#include "hadamard.h"

namespace {

using bitdistill::KernelTable;
using bitdistill::kFileGroup;
using bitdistill::kGroupBytes;

// Adds the dot products of one group of one row with 20 codes, for weights c = code + 1.
inline int32_t group_dot(const uint8_t* bytes, const int8_t* code) {
  int32_t dot = 0;
  for (size_t j = 0; j < 4; ++j) {
    unsigned byte = bytes[j];
    for (size_t p = 0; p < 5; ++p, byte /= 3) dot += static_cast<int32_t>(byte % 3) * code[4 * p + j];
  }
  return dot;
}

void gemv(const uint8_t* weights, size_t row_blocks, size_t stride, size_t groups, const int8_t* code, int32_t code_sum,
          int32_t* dot) {
  for (size_t b = 0; b < row_blocks; ++b) {
    for (size_t r = 0; r < kRowBlock; ++r) {
      const uint8_t* row = weights + b * stride + 4 * r;
      int32_t sum = -code_sum;
      for (size_t g = 0; g < groups; ++g) sum += group_dot(row + g * kGroupBytes, code + g * kFileGroup);
      dot[b * kRowBlock + r] = sum;
    }
  }
}

void gemm(const uint8_t* weights, size_t groups, const int8_t* code, size_t tokens, const int32_t* code_sum,
          int32_t* dot) {
  for (size_t t = 0; t < tokens; ++t) {
    for (size_t r = 0; r < kRowBlock; ++r) {
      int32_t sum = -code_sum[t];
      for (size_t g = 0; g < groups; ++g) {
        int8_t own[kFileGroup];
        for (size_t i = 0; i < kFileGroup; ++i) own[i] = code[((g * 5 + i / 4) * tokens + t) * 4 + i % 4];
        sum += group_dot(weights + g * kGroupBytes + 4 * r, own);
      }
      dot[t * kRowBlock + r] = sum;
    }
  }
}

void dot_i8(const int8_t* weights, size_t rows, size_t k, const int8_t* high, const int8_t* low, int32_t* high_dot,
            int32_t* low_dot) {
  for (size_t r = 0; r < rows; ++r) {
    int32_t h = 0, l = 0;
    for (size_t i = 0; i < k; ++i) {
      h += weights[r * k + i] * high[i];
      l += weights[r * k + i] * low[i];
    }
    high_dot[r] = h;
    low_dot[r] = l;
  }
}

void dot_i4(const uint8_t* weights, const uint16_t* scale, size_t blocks, size_t groups, const SplitState* states,
            size_t tokens, float* out, size_t out_stride) {
  for (size_t t = 0; t < tokens; ++t) {
    const SplitState& x = states[t];
    for (size_t row = 0; row < blocks * kInt4Rows; ++row) {
      const size_t first = row / kInt4Rows * groups, r = row % kInt4Rows;
      float sum = 0;
      for (size_t g = 0; g < groups; ++g) {
        const uint8_t* bytes = weights + (first + g) * kInt4Group / 2 * kInt4Rows + 4 * r;
        int32_t dot = x.offset[g];
        for (size_t i = 0; i < kInt4Group; ++i) {
          const int32_t nibble = bytes[i / 8 * 4 * kInt4Rows + i % 4] >> i / 4 % 2 * 4 & 15;
          dot += nibble * (254 * x.high[g * kInt4Group + i] + x.low[g * kInt4Group + i]);
        }
        sum += Scalar::load_bf16(scale + (first + g) * kInt4Rows + r) * static_cast<float>(dot);
      }
      out[t * out_stride + row] = sum;
    }
  }
}

uint64_t probe_int8(uint64_t steps) {
  volatile int32_t keep;
  int32_t sum = 0;
  for (uint64_t i = 0; i < steps; ++i) {
    for (int32_t j = 0; j < 64; ++j) sum += static_cast<int8_t>(i + j) * static_cast<int8_t>(j);
  }
  keep = sum;
  static_cast<void>(keep);
  return steps * 64;
}

uint64_t probe_read(const uint8_t* data, size_t bytes) {
  uint64_t sum[4] = {};
  for (size_t i = 0; i < bytes; i += 32) {
    for (size_t j = 0; j < 4; ++j) {
      uint64_t word;
      __builtin_memcpy(&word, data + i + 8 * j, 8);
      sum[j] += word;
    }
  }
  return sum[0] + sum[1] + sum[2] + sum[3];
}

constexpr KernelTable kTable = {
    .name = "scalar",
    .features = 0,
    .only_by_name = true,
    .group = kFileGroup,
    .tile = 4,
    .repack = nullptr,
    .gemv = gemv,
    .gemm = gemm,
    .gemm_int4 = nullptr,
    .dequantize = dequantize<Scalar>,
    .rms_norm = rms_norm<Scalar>,
    .quantize = quantize<Scalar>,
    .quantize_int4 = quantize_int4<Scalar>,
    .hadamard = hadamard<Scalar>,
    .gate = gate<Scalar>,
    .attend = attend<Scalar, 2, 2>,
    .widen = widen<Scalar>,
    .narrow_f16 = narrow_f16<Scalar>,
    .dense = dense<Scalar>,
    .dot_i8 = dot_i8,
    .dot_i4 = dot_i4,
    .probe_int8 = probe_int8,
    .probe_read = probe_read,
};

}  // namespace

const bitdistill::KernelTable* bitdistill::kernels_scalar() { return &kTable; }
