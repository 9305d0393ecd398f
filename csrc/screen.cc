#include "screen.h"

#include <cmath>
#include <limits>
#include <stdexcept>

namespace bitdistill {
namespace {

constexpr size_t kRowsDealt = 512;
constexpr double kRoundedUp = 1.000001;  // covers the rounding of norms and bounds themselves

float up(double value) { return static_cast<float>(value * kRoundedUp); }

double norm(const float* x, size_t n) {
  double squares = 0;
  for (size_t i = 0; i < n; ++i) squares += double{x[i]} * x[i];
  return std::sqrt(squares);
}

}  // namespace

Screen::Screen(const KernelTable& room, const DenseMatrix& head, ThreadPool& pool)
    : room_(room),
      head_(head),
      codes_(head.rows * head.columns),
      scale_(head.rows),
      norm_(head.rows),
      error_norm_(head.rows) {
  if (head.form != Form::f32 && head.form != Form::bf16) {
    throw std::invalid_argument("screening scores in full what an int8 copy leaves open; this head is int8 or int4");
  }
  const size_t columns = head.columns;
  pool.run([&](Worker& worker) {
    std::vector<float> row(columns);
    worker.deal(head.rows, kRowsDealt, [&](Range part) {
      for (size_t i = part.begin; i < part.end; ++i) {
        table_row(room, head, i, row.data());
        norm_[i] = up(norm(row.data(), columns));
        int8_t* codes = codes_.data() + i * columns;
        int32_t sum;
        scale_[i] = room.quantize(row.data(), columns, columns, columns, Rounding::divide, codes, &sum);
        double squares = 0;
        for (size_t k = 0; k < columns; ++k) {
          const double error = row[k] - double{scale_[i]} * codes[k];
          squares += error * error;
        }
        error_norm_[i] = up(std::sqrt(squares));
      }
    });
  });
}

int32_t Screen::best(const float* x, Pass& pass, Worker& worker) const {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const size_t columns = head_.columns, rows = head_.rows;
  worker.barrier();
  // Each worker splits the state for itself: it costs less than a barrier.
  const SplitCodes split(x, columns, round_up(columns, kInt4Group));
  const double high = split.high_scale, low = split.low_scale, x_norm = norm(x, columns);
  double split_squares = 0, rest_squares = 0;
  for (size_t k = 0; k < columns; ++k) {
    const double value = high * split.high[k] + low * split.low[k];
    split_squares += value * value;
    rest_squares += (x[k] - value) * (x[k] - value);
  }
  const double n = static_cast<double>(columns + 64) * 0x1p-24, gamma = n / (1 - n);
  const double per_error = std::sqrt(split_squares) * kRoundedUp;
  const double per_norm = (std::sqrt(rest_squares) + gamma * x_norm) * kRoundedUp;

  Pass::Share& mine = pass.shares[worker.index()];
  mine = {-kInfinity, -std::numeric_limits<float>::infinity(), -1, 0};
  worker.deal(rows, kRowsDealt, [&](Range part) {
    int32_t high_dot[kRowsDealt], low_dot[kRowsDealt];
    room_.dot_i8(codes_.data() + part.begin * columns, part.end - part.begin, columns, split.high.data(),
                 split.low.data(), high_dot, low_dot);
    for (size_t i = part.begin; i < part.end; ++i) {
      const double score = scale_[i] * (high * high_dot[i - part.begin] + low * low_dot[i - part.begin]);
      const double error = error_norm_[i] * per_error + norm_[i] * per_norm;
      pass.ceiling[i] = std::nextafter(static_cast<float>(score + error), std::numeric_limits<float>::infinity());
      mine.floor = std::max(mine.floor, score - error);
    }
  });
  worker.barrier();
  double floor = -kInfinity;
  for (const Pass::Share& share : pass.shares) floor = std::max(floor, share.floor);
  const Range part = worker.share(rows, kRowsDealt);
  for (size_t i = part.begin; i < part.end; ++i) {
    if (pass.ceiling[i] < floor) continue;
    float logit;
    room_.dense(head_.data + i * head_.row_bytes(), head_.float_type(), 1, columns, x, columns, 1, &logit, 1);
    ++mine.rescored;
    if (!std::isfinite(logit) || logit <= mine.best) continue;
    mine.best = logit;
    mine.token = static_cast<int32_t>(i);
  }
  worker.barrier();
  const Pass::Share* best = &pass.shares[0];
  for (const Pass::Share& share : pass.shares) {
    if (share.token >= 0 && (best->token < 0 || share.best > best->best)) best = &share;  // shares are in order of rows
  }
  const int32_t token = std::isfinite(x_norm) && std::isfinite(floor) ? best->token : -1;
  if (worker.index() == 0) {
    ++pass.tokens;
    for (const Pass::Share& share : pass.shares) pass.rescored += share.rescored;
  }
  worker.barrier();
  return token;
}

}  // namespace bitdistill
