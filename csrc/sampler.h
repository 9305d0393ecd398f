// The choice of the next token.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

namespace bitdistill {

class Sampler {
 public:
  // temperature 0: greedy. Throws std::invalid_argument naming the value.
  Sampler(double temperature, int64_t top_k, double top_p, uint64_t seed);

  // Throws std::invalid_argument when no logit is finite.
  int32_t sample(const float* logits, size_t count);
  bool is_greedy() const { return temperature_ == 0; }

 private:
  double uniform();  // in [0, 1)

  double temperature_, top_p_;
  size_t top_k_;
  uint64_t state_;
  std::mutex mutex_;
  std::vector<std::pair<float, int32_t>> candidates_;
};

// The lowest index of the highest finite value, or -1.
int32_t highest(const float* logits, size_t count);

}  // namespace bitdistill
