#include "memory.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstdio>
#include <new>
#include <utility>

namespace bitdistill {
namespace {
constexpr size_t kHugePage = size_t{2} << 20;
}

Pages::Pages(size_t bytes, bool huge) : size_(bytes) {
  if (bytes == 0) return;
  const size_t alignment = huge ? kHugePage : size_t{4096};
  if (bytes > SIZE_MAX / 2) throw std::bad_alloc();
  mapped_ = round_up(bytes, alignment) + (huge ? kHugePage : 0);
  mapping_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping_ == MAP_FAILED) {
    mapping_ = nullptr;
    throw std::bad_alloc();
  }
  data_ = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<uintptr_t>(mapping_), alignment));
#if defined(MADV_HUGEPAGE)
  // Advice only: a kernel without transparent huge pages goes on with small ones.
  if (huge) madvise(data_, round_up(bytes, kHugePage), MADV_HUGEPAGE);
#endif
}

Pages::Pages(Pages&& other) noexcept { *this = std::move(other); }

Pages& Pages::operator=(Pages&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(mapping_, other.mapping_);
  std::swap(mapped_, other.mapped_);
  return *this;
}

Pages::~Pages() {
  if (mapping_ != nullptr) munmap(mapping_, mapped_);
}

MemoryUsage memory_usage() {
  MemoryUsage usage{};
  if (FILE* file = std::fopen("/proc/self/statm", "r")) {
    unsigned long total = 0, resident = 0;
    if (std::fscanf(file, "%lu %lu", &total, &resident) == 2) {
      usage.resident = uint64_t{resident} * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    }
    std::fclose(file);
  }
  rusage own{};
  getrusage(RUSAGE_SELF, &own);
#if defined(__APPLE__)
  usage.peak_resident = static_cast<uint64_t>(own.ru_maxrss);
#else
  usage.peak_resident = static_cast<uint64_t>(own.ru_maxrss) * 1024;
#endif
  return usage;
}

}  // namespace bitdistill
