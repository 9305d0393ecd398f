#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

namespace bitdistill {
namespace {

// A token e^30 times less likely than the best is not considered: exp over a whole vocabulary would cost more than a
// layer.
constexpr double kNegligible = 30;

std::string number(double value) {
  std::string text = std::to_string(value);
  return text;
}

}  // namespace

Sampler::Sampler(double temperature, int64_t top_k, double top_p, uint64_t seed)
    : temperature_(temperature), top_p_(top_p), top_k_(static_cast<size_t>(top_k)), state_(seed) {
  if (!std::isfinite(temperature) || temperature < 0) {
    throw std::invalid_argument("temperature = " + number(temperature) + ": use 0 (greedy) or a positive number");
  }
  if (top_k < 0) throw std::invalid_argument("top_k = " + std::to_string(top_k) + ": use 0 (off) or a positive number");
  if (!(top_p > 0 && top_p <= 1)) throw std::invalid_argument("top_p = " + number(top_p) + ": use a share in (0, 1]");
}

double Sampler::uniform() {
  state_ += 0x9e3779b97f4a7c15u;  // splitmix64
  uint64_t x = state_;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  x ^= x >> 31;
  return static_cast<double>(x >> 11) * 0x1p-53;
}

int32_t highest(const float* logits, size_t count) {
  // Sixteen running maxima become vector instructions; a NaN never replaces one.
  constexpr size_t kLanes = 16;
  float lanes[kLanes];
  for (float& lane : lanes) lane = -std::numeric_limits<float>::infinity();
  size_t whole = 0;
  for (; whole + kLanes <= count; whole += kLanes) {
    for (size_t j = 0; j < kLanes; ++j) lanes[j] = logits[whole + j] > lanes[j] ? logits[whole + j] : lanes[j];
  }
  float peak = *std::max_element(lanes, lanes + kLanes);
  for (; whole < count; ++whole) peak = logits[whole] > peak ? logits[whole] : peak;
  if (std::isfinite(peak)) return static_cast<int32_t>(std::find(logits, logits + count, peak) - logits);

  int32_t best = -1;  // nothing finite, or an infinity to pass over
  for (size_t i = 0; i < count; ++i) {
    if (std::isfinite(logits[i]) && (best < 0 || logits[i] > logits[best])) best = static_cast<int32_t>(i);
  }
  return best;
}

int32_t Sampler::sample(const float* logits, size_t count) {
  const std::lock_guard lock(mutex_);
  const int32_t best = highest(logits, count);
  if (best < 0) throw std::invalid_argument("no logit is finite: the model's weights or inputs are damaged");
  if (temperature_ == 0) return best;

  const double peak = logits[best], least = peak - kNegligible * temperature_;
  candidates_.clear();
  for (size_t i = 0; i < count; ++i) {
    if (std::isfinite(logits[i]) && logits[i] >= least) candidates_.emplace_back(logits[i], static_cast<int32_t>(i));
  }
  // Highest first, lowest id first among equals: the draw then depends on nothing but the logits.
  const auto before = [](const auto& a, const auto& b) {
    return a.first != b.first ? a.first > b.first : a.second < b.second;
  };
  if (top_k_ != 0 && top_k_ < candidates_.size()) {
    std::nth_element(candidates_.begin(), candidates_.begin() + static_cast<std::ptrdiff_t>(top_k_), candidates_.end(),
                     before);
    candidates_.resize(top_k_);
  }
  if (top_p_ < 1 || top_k_ != 0) std::sort(candidates_.begin(), candidates_.end(), before);

  const auto weight = [&](float logit) { return std::exp((logit - peak) / temperature_); };
  double total = 0;
  for (const auto& [logit, id] : candidates_) total += weight(logit);
  if (top_p_ < 1) {
    // The shortest head of the sorted list that holds at least top_p of the probability.
    double kept = 0;
    size_t n = 0;
    while (n < candidates_.size() && kept < top_p_ * total) kept += weight(candidates_[n++].first);
    candidates_.resize(std::max<size_t>(n, 1));
    total = kept;
  }
  double left = uniform() * total;
  for (const auto& [logit, id] : candidates_) {
    left -= weight(logit);
    if (left < 0) return id;
  }
  return candidates_.back().second;
}

}  // namespace bitdistill
