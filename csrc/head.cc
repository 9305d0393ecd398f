// Embedding rows and the language-model head, in fp32, bf16 or int8.
#include <cmath>

#include "decoder.h"

namespace bitdistill {

void table_row(const KernelTable& room, const DenseMatrix& table, size_t row, float* out) {
  const uint8_t* from = table.data + row * table.row_bytes();
  if (table.dtype != DType::i8) {
    room.widen(from, table.float_type(), table.columns, out);
    return;
  }
  const auto* codes = reinterpret_cast<const int8_t*>(from);
  for (size_t k = 0; k < table.columns; ++k) out[k] = static_cast<float>(codes[k]) * table.scale[row];
}

SplitCodes::SplitCodes(const float* x, size_t n) : high(n), low(n) {
  float peak = 0;
  for (size_t i = 0; i < n; ++i) peak = std::max(peak, std::fabs(x[i]));
  if (!(peak > 0) || !std::isfinite(peak)) peak = 1;
  high_scale = peak / 127;
  low_scale = high_scale / 254;  // what is left is at most half a step
  const auto code = [](float value) {
    const float within = value > -127 ? (value < 127 ? value : 127) : -127;  // NaN too
    constexpr float kRound = 0x1.8p23f;  // what is left of a sum with it is the nearest whole number
    return static_cast<int8_t>(static_cast<int32_t>(within + kRound - kRound));
  };
  for (size_t i = 0; i < n; ++i) {
    high[i] = code(x[i] / high_scale);
    low[i] = code((x[i] - static_cast<float>(high[i]) * high_scale) / low_scale);
  }
}

HeadInput::HeadInput(const DenseMatrix& head, const float* states, size_t count) : x(states), tokens(count) {
  if (head.dtype != DType::i8) return;
  for (size_t t = 0; t < count; ++t) split.emplace_back(states + t * head.columns, head.columns);
}

void head_rows(const KernelTable& room, const DenseMatrix& head, const HeadInput& input, Range rows, float* logits) {
  if (rows.begin >= rows.end) return;
  if (head.dtype != DType::i8) {
    room.dense(head.data + rows.begin * head.row_bytes(), head.float_type(), rows.end - rows.begin, head.columns,
               input.x, head.columns, input.tokens, logits + rows.begin, head.rows);
    return;
  }
  constexpr size_t kRows = 64;
  const auto* codes = reinterpret_cast<const int8_t*>(head.data);
  for (size_t row = rows.begin; row < rows.end; row += kRows) {
    const size_t count = std::min(kRows, rows.end - row);
    for (size_t t = 0; t < input.tokens; ++t) {
      const SplitCodes& split = input.split[t];
      int32_t high[kRows], low[kRows];
      room.dot_i8(codes + row * head.columns, count, head.columns, split.high.data(), split.low.data(), high, low);
      float* out = logits + t * head.rows + row;
      for (size_t r = 0; r < count; ++r) {
        out[r] = head.scale[row + r] *
                 (static_cast<float>(high[r]) * split.high_scale + static_cast<float>(low[r]) * split.low_scale);
      }
    }
  }
}

}  // namespace bitdistill
