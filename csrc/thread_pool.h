// Threads that run one function side by side, in phases divided by barriers.
//
// A decode step has about five phases a layer and lasts milliseconds: waking threads by a condition variable for each
// phase would cost as much as the work. Between phases a thread spins for some microseconds and then sleeps, so that a busy
// machine gets its core back (pure spinning collapses when anything else runs).
#pragma once

#include <atomic>
#include <cstddef>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

namespace bitdistill {

class ThreadPool;

// What a function run by the pool sees: who it is, and the barrier.
class Worker {
 public:
  Worker(ThreadPool& pool, size_t index) : pool_(pool), index_(index) {}
  size_t index() const { return index_; }
  size_t count() const;
  // Every worker has arrived; what they wrote before is visible after. All must call it equally often.
  void barrier();

 private:
  ThreadPool& pool_;
  size_t index_;
};

struct Range {
  size_t begin, end;
};
// This worker's share of n items, in multiples of `unit`.
Range share(const Worker& worker, size_t n, size_t unit = 1);

class ThreadPool {
 public:
  // threads 0: one for each CPU this process may use.
  explicit ThreadPool(size_t threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  size_t size() const { return size_; }

  // Runs work(worker) on every thread, the caller's included, and returns when all are done. `work` must not throw.
  // The caller is pinned to a CPU meanwhile, and gets its own set back.
  void run(const std::function<void(Worker&)>& work);

 private:
  friend class Worker;
  void loop(size_t index);
  void barrier();
  void wait_while(const std::atomic<uint32_t>& value, uint32_t old);

  size_t size_;
  std::vector<int> cpus_;  // empty: no pinning
  unsigned spins_;
  std::vector<std::thread> threads_;
  std::mutex one_at_a_time_;
  const std::function<void(Worker&)>* work_ = nullptr;
  bool stopping_ = false;
  alignas(64) std::atomic<uint32_t> start_{0};
  alignas(64) std::atomic<uint32_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

// CPUs that this process may use.
size_t usable_cpus();

}  // namespace bitdistill
