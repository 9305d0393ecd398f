#include "thread_pool.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

#include <stdexcept>

namespace bitdistill {
namespace {

constexpr size_t kMaxThreads = 1024;
// About 20 microseconds: longer than the uneven ends of a phase, shorter than a scheduler's slice.
constexpr unsigned kSpins = 4000;

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

std::vector<int> allowed_cpus() {
  std::vector<int> cpus;
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
    }
  }
#endif
  return cpus;
}

// Pins the calling thread to one CPU for its lifetime.
class Pin {
 public:
  explicit Pin([[maybe_unused]] int cpu) {
#if defined(__linux__)
    pinned_ = pthread_getaffinity_np(pthread_self(), sizeof before_, &before_) == 0;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    pinned_ = pinned_ && pthread_setaffinity_np(pthread_self(), sizeof one, &one) == 0;
#endif
  }
  ~Pin() {
#if defined(__linux__)
    if (pinned_) pthread_setaffinity_np(pthread_self(), sizeof before_, &before_);
#endif
  }
  Pin(const Pin&) = delete;
  Pin& operator=(const Pin&) = delete;

 private:
#if defined(__linux__)
  cpu_set_t before_;
  bool pinned_ = false;
#endif
};

size_t checked_count(size_t threads) {
  if (threads > kMaxThreads) throw std::invalid_argument("threads = " + std::to_string(threads) + ": use at most 1024");
  return threads != 0 ? threads : usable_cpus();
}

}  // namespace

size_t usable_cpus() {
  const size_t cpus = allowed_cpus().size();
  return cpus != 0 ? cpus : std::max<size_t>(1, std::thread::hardware_concurrency());
}

size_t Worker::count() const { return pool_.size_; }
void Worker::barrier() { pool_.barrier(); }

Range Worker::share_of(size_t index, size_t n, size_t unit) const {
  const size_t units = (n + unit - 1) / unit;
  const auto edge = [&](size_t worker) { return std::min(n, units * worker / count() * unit); };
  return {edge(index), edge(index + 1)};
}

ThreadPool::ThreadPool(size_t threads) : size_(checked_count(threads)), taken_(size_) {
  const std::vector<int> cpus = allowed_cpus();
  // With fewer CPUs than threads, spinning would keep the others from the work that is waited for.
  const bool enough = size_ <= cpus.size();
  if (enough && size_ > 1) cpus_.assign(cpus.begin(), cpus.begin() + static_cast<std::ptrdiff_t>(size_));
  spins_ = enough ? kSpins : 0;
  for (size_t i = 1; i < size_; ++i) threads_.emplace_back([this, i] { loop(i); });
}

ThreadPool::~ThreadPool() {
  stopping_ = true;
  start_.fetch_add(1, std::memory_order_release);
  start_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::run(const std::function<void(Worker&)>& work) {
  const std::lock_guard lock(one_at_a_time_);
  Worker self(*this, 0);
  std::optional<Pin> pin;
  if (!cpus_.empty()) pin.emplace(cpus_[0]);
  work_ = &work;
  start_.fetch_add(1, std::memory_order_release);
  start_.notify_all();
  work(self);
  barrier();
}

void ThreadPool::loop(size_t index) {
  std::optional<Pin> pin;
  if (!cpus_.empty()) pin.emplace(cpus_[index]);
  Worker self(*this, index);
  for (uint32_t seen = 0;;) {
    wait_while(start_, seen);
    seen = start_.load(std::memory_order_acquire);
    if (stopping_) return;
    (*work_)(self);
    barrier();
  }
}

void ThreadPool::barrier() {
  const uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    arrived_.store(0, std::memory_order_relaxed);
    for (Taken& taken : taken_) taken.items.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    phase_.notify_all();
  } else {
    wait_while(phase_, phase);
  }
}

void ThreadPool::wait_while(const std::atomic<uint32_t>& value, uint32_t old) {
  for (unsigned i = 0; i < spins_; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause_cpu();
  }
  value.wait(old, std::memory_order_acquire);
}

}  // namespace bitdistill
