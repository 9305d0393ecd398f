// Embedding rows and the language-model head, in fp32, bf16, int8 or int4.
#include <cmath>
#include <cstring>

#include "decoder.h"

namespace bitdistill {

void table_row(const KernelTable& room, const DenseMatrix& table, size_t row, float* out) {
  if (table.form == Form::int8) {
    const auto* codes = reinterpret_cast<const int8_t*>(table.data) + row * table.columns;
    for (size_t k = 0; k < table.columns; ++k) out[k] = static_cast<float>(codes[k]) * table.scale[row];
    return;
  }
  if (table.form != Form::int4) {
    room.widen(table.data + row * table.row_bytes(), table.float_type(), table.columns, out);
    return;
  }
  const size_t block = row / kInt4Rows, lane = row % kInt4Rows;
  for (size_t g = 0; g < table.groups(); ++g) {
    const size_t at = block * table.groups() + g;
    float scale;
    room.widen(table.group_scale + (at * kInt4Rows + lane) * 2, Float::bf16, 1, &scale);
    const uint8_t* bytes = table.data + at * kInt4Rows * kInt4Group / 2 + 4 * lane;
    const size_t count = std::min(kInt4Group, table.columns - g * kInt4Group);
    for (size_t i = 0; i < count; ++i) {
      const int nibble = bytes[i / 8 * 64 + i % 4] >> i / 4 % 2 * 4 & 15;
      out[g * kInt4Group + i] = static_cast<float>(nibble - 8) * scale;
    }
  }
}

SplitCodes::SplitCodes(const float* x, size_t n, size_t padded) : high(padded), low(padded) {
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
  offset.resize(padded / kInt4Group);
  for (size_t g = 0; g < offset.size(); ++g) {
    for (size_t i = g * kInt4Group; i < (g + 1) * kInt4Group; ++i) offset[g] -= 8 * (254 * high[i] + low[i]);
  }
}

HeadInput::HeadInput(const DenseMatrix& head, const float* states, size_t count) : x(states), tokens(count) {
  if (head.form != Form::int8 && head.form != Form::int4) return;
  const size_t padded = round_up(head.columns, kInt4Group);
  for (size_t t = 0; t < count; ++t) split.emplace_back(states + t * head.columns, head.columns, padded);
}

void head_rows(const KernelTable& room, const DenseMatrix& head, const HeadInput& input, Range rows, float* logits) {
  if (rows.begin >= rows.end) return;
  if (head.form == Form::f32 || head.form == Form::bf16) {
    room.dense(head.data + rows.begin * head.row_bytes(), head.float_type(), rows.end - rows.begin, head.columns,
               input.x, head.columns, input.tokens, logits + rows.begin, head.rows);
    return;
  }
  constexpr size_t kRows = 64;
  static_assert(kRows % kInt4Rows == 0);
  for (size_t row = rows.begin; row < rows.end; row += kRows) {
    const size_t count = std::min(kRows, rows.end - row);
    const uint8_t* weights = head.data + row * head.row_bytes();
    for (size_t t = 0; t < input.tokens; ++t) {
      const SplitCodes& split = input.split[t];
      float* out = logits + t * head.rows + row;
      if (head.form == Form::int4) {
        const auto* scale = reinterpret_cast<const uint16_t*>(head.group_scale + row * head.scale_bytes());
        float dots[kRows];
        room.dot_i4(weights, scale, ceil_div(count, kInt4Rows), head.groups(), split.high.data(), split.low.data(),
                    split.offset.data(), dots);
        for (size_t r = 0; r < count; ++r) out[r] = dots[r] * split.low_scale;
        continue;
      }
      int32_t high[kRows], low[kRows];
      room.dot_i8(reinterpret_cast<const int8_t*>(weights), count, head.columns, split.high.data(), split.low.data(),
                  high, low);
      for (size_t r = 0; r < count; ++r) {
        out[r] = head.scale[row + r] *
                 (static_cast<float>(high[r]) * split.high_scale + static_cast<float>(low[r]) * split.low_scale);
      }
    }
  }
}

}  // namespace bitdistill
