// Where the time of forward passes goes. The first worker looks at the clock when a phase of the decoder is done, after
// the barrier that ends it where there is one: what the others are still at counts as well.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>

namespace bitdistill {

enum class Phase { embed, norm, qkv, attention, o_proj, gate_up, down_proj, head };
constexpr std::array kPhaseNames = {"embed", "norm", "qkv", "attention", "o_proj", "gate_up", "down_proj", "head"};

class Profile {
 public:
  void begin() { last_ = Clock::now(); }
  void end(Phase phase) {
    const Clock::time_point now = Clock::now();
    seconds_[static_cast<size_t>(phase)] += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }
  const std::array<double, kPhaseNames.size()>& seconds() const { return seconds_; }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point last_;
  std::array<double, kPhaseNames.size()> seconds_{};
};

}  // namespace bitdistill
