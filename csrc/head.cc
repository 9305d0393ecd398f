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

void split_codes(const float* x, size_t n, SplitCodes& out) {
  out.high.resize(n);
  out.low.resize(n);
  float peak = 0;
  for (size_t i = 0; i < n; ++i) peak = std::max(peak, std::fabs(x[i]));
  if (!(peak > 0) || !std::isfinite(peak)) peak = 1;
  out.high_scale = peak / 127;
  out.low_scale = out.high_scale / 254;  // what is left is at most half a step
  const auto code = [](float value) {
    const float rounded = std::nearbyint(value);
    return static_cast<int8_t>(rounded > -127 ? (rounded < 127 ? rounded : 127) : -127);  // NaN too
  };
  for (size_t i = 0; i < n; ++i) {
    out.high[i] = code(x[i] / out.high_scale);
    out.low[i] = code((x[i] - static_cast<float>(out.high[i]) * out.high_scale) / out.low_scale);
  }
}

void head_rows(const KernelTable& room, const DenseMatrix& head, Range rows, const float* x, size_t tokens,
               float* logits) {
  if (rows.begin >= rows.end) return;
  if (head.dtype != DType::i8) {
    room.dense(head.data + rows.begin * head.row_bytes(), head.float_type(), rows.end - rows.begin, head.columns, x,
               head.columns, tokens, logits + rows.begin, head.rows);
    return;
  }
  constexpr size_t kRows = 64;
  const auto* codes = reinterpret_cast<const int8_t*>(head.data);
  std::vector<SplitCodes> split(tokens);
  for (size_t t = 0; t < tokens; ++t) split_codes(x + t * head.columns, head.columns, split[t]);
  for (size_t row = rows.begin; row < rows.end; row += kRows) {
    const size_t count = std::min(kRows, rows.end - row);
    for (size_t t = 0; t < tokens; ++t) {
      int32_t high[kRows], low[kRows];
      room.dot_i8(codes + row * head.columns, count, head.columns, split[t].high.data(), split[t].low.data(), high, low);
      float* out = logits + t * head.rows + row;
      for (size_t r = 0; r < count; ++r) {
        out[r] = head.scale[row + r] * (static_cast<float>(high[r]) * split[t].high_scale +
                                        static_cast<float>(low[r]) * split[t].low_scale);
      }
    }
  }
}

}  // namespace bitdistill
