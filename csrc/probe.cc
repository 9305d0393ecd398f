#include "probe.h"

#include <atomic>
#include <chrono>
#include <cmath>
#include <stdexcept>

#include "memory.h"

namespace bitdistill {
namespace {

using Clock = std::chrono::steady_clock;

// Several times any last-level cache share of a thread.
constexpr size_t kStreamBytes = size_t{256} << 20;
constexpr size_t kReadBytes = size_t{4} << 20;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

void require_seconds(double seconds) {
  if (!(seconds > 0 && seconds <= 60)) throw std::invalid_argument("seconds is not in (0, 60]");
}

}  // namespace

double probe_bandwidth(const KernelTable& room, size_t threads, double seconds) {
  require_seconds(seconds);
  ThreadPool pool(threads);
  const Pages pages(kStreamBytes * pool.size(), true);
  std::vector<double> rates(pool.size());
  std::atomic<uint64_t> keep{0};
  pool.run([&](Worker& worker) {
    uint8_t* mine = pages.data() + worker.index() * kStreamBytes;
    for (size_t i = 0; i < kStreamBytes; i += 4096) mine[i] = static_cast<uint8_t>(i >> 12);
    worker.barrier();
    const auto start = Clock::now();
    uint64_t sum = 0;
    double read = 0;
    for (size_t at = 0; seconds_since(start) < seconds; at = (at + kReadBytes) % kStreamBytes) {
      sum += room.probe_read(mine + at, kReadBytes);
      read += static_cast<double>(kReadBytes);
    }
    rates[worker.index()] = read / seconds_since(start) / 1e9;
    keep += sum;
  });
  double total = 0;
  for (const double rate : rates) total += rate;
  return total;
}

double probe_int8(const KernelTable& room, size_t threads, double seconds) {
  require_seconds(seconds);
  ThreadPool pool(threads);
  std::vector<double> rates(pool.size());
  pool.run([&](Worker& worker) {
    worker.barrier();
    const auto start = Clock::now();
    uint64_t done = 0;
    while (seconds_since(start) < seconds) done += room.probe_int8(1 << 16);
    rates[worker.index()] = static_cast<double>(done) / seconds_since(start) / 1e9;
  });
  double total = 0;
  for (const double rate : rates) total += rate;
  return total;
}

}  // namespace bitdistill
