// Threads that run one function side by side, in phases divided by barriers.
//
// A decode step has about five phases a layer and lasts milliseconds: waking threads by a condition variable for each
// phase would cost as much as the work. Between phases a thread spins for a while and then sleeps, so that a busy
// machine gets its core back. Work is dealt in chunks: a core that is slower than the others, or lent to another
// program for a moment, does less of a phase instead of making all wait.
#pragma once

#include <algorithm>
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

struct Range {
  size_t begin, end;
};

// What a function run by the pool sees: who it is, its share of the work, and the barrier.
class Worker {
 public:
  Worker(ThreadPool& pool, size_t index) : pool_(pool), index_(index) {}
  size_t index() const { return index_; }
  size_t count() const;
  // Every worker has arrived; what they wrote before is visible after. All must call it equally often.
  void barrier();
  // This worker's share of n items, in multiples of `unit`.
  Range share(size_t n, size_t unit = 1) const { return share_of(index_, n, unit); }
  // Calls body(Range) with chunks of `unit` of n items until none is left: those of its own share in order, then what
  // others have left of theirs. Every worker calls it with the same numbers, at most once between two barriers.
  template <class Body>
  void deal(size_t n, size_t unit, Body&& body);

 private:
  Range share_of(size_t index, size_t n, size_t unit) const;

  ThreadPool& pool_;
  size_t index_;
};

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

  struct alignas(64) Taken {
    std::atomic<size_t> items{0};  // of this worker's share, since the last barrier
  };

  size_t size_;
  std::vector<Taken> taken_;
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

template <class Body>
void Worker::deal(size_t n, size_t unit, Body&& body) {
  for (size_t i = 0; i < count(); ++i) {
    const size_t owner = (index_ + i) % count();
    const Range part = share_of(owner, n, unit);
    std::atomic<size_t>& taken = pool_.taken_[owner].items;
    while (taken.load(std::memory_order_relaxed) < part.end - part.begin) {
      const size_t begin = part.begin + taken.fetch_add(unit, std::memory_order_relaxed);
      if (begin >= part.end) break;
      body(Range{begin, std::min(part.end, begin + unit)});
    }
  }
}

// CPUs that this process may use.
size_t usable_cpus();

}  // namespace bitdistill
