// Queries, keys and values of few bits (BitNet v2, section 3.3): absmax of the numbers of one token and head.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstddef>

namespace bitdistill {

//     step = max|x| / top,  code = round(x / step),  x ~= code * step,  top = 2^(bits - 1) - 1
// Codes are signed here, within top; stored ones have 2^(bits - 1) added. An all-zero row, or one with an infinity, has
// a step of 1; a NaN counts for nothing in the peak and has the code -top.
class LowBits {
 public:
  LowBits(const float* x, size_t n, size_t bits) : top_(static_cast<float>((1 << (bits - 1)) - 1)) {
    float peak = 0;
    for (size_t i = 0; i < n; ++i) peak = std::fabs(x[i]) > peak ? std::fabs(x[i]) : peak;
    step_ = peak > 0 && peak <= FLT_MAX ? peak / top_ : 1;
    if (!(step_ > 0)) step_ = 1;  // the peak is the least number there is, or nearly
  }
  float step() const { return step_; }
  int code(float x) const { return static_cast<int>(rounded(x)); }
  float value(float x) const { return rounded(x) * step_; }

 private:
  float rounded(float x) const {
    constexpr float kRound = 0x1.8p23f;  // what is left of a sum with it is the nearest whole number, ties to even
    const float ratio = x / step_;
    const float within = ratio > -top_ ? (ratio < top_ ? ratio : top_) : -top_;  // NaN too
    return within + kRound - kRound;
  }
  float top_, step_;
};

}  // namespace bitdistill
