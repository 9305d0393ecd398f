#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include <array>
#include <cstdlib>
#include <stdexcept>
#include <utility>

namespace bitdistill {
namespace {

constexpr std::array<std::pair<std::string_view, uint32_t>, 11> kFeatureNames = {{
    {"avx2", kAvx2},
    {"fma", kFma},
    {"f16c", kF16c},
    {"avx512f", kAvx512f},
    {"avx512bw", kAvx512bw},
    {"avx512vl", kAvx512vl},
    {"avx512dq", kAvx512dq},
    {"avx512vnni", kAvx512vnni},
    {"avx512vbmi", kAvx512vbmi},
    {"avxvnni", kAvxVnni},
    {"dotprod", kDotprod},
}};

// What the least of the fast rooms needs.
#if defined(__x86_64__)
constexpr const char* kLeast = "AVX2";
#elif defined(__aarch64__)
constexpr const char* kLeast = "dot product instructions (dotprod, Linux calls them asimddp)";
#else
constexpr const char* kLeast = "instruction set with kernels here (x86-64 with AVX2, AArch64 with dotprod)";
#endif

std::string join(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
}

std::string names_of(uint32_t features) {
  std::vector<std::string> names;
  for (const auto& [name, bit] : kFeatureNames) {
    if (features & bit) names.emplace_back(name);
  }
  return join(names);
}

std::string room_names() {
  std::vector<std::string> names;
  for (const KernelTable* room : compiled_rooms()) names.emplace_back(room->name);
  return join(names);
}

}  // namespace

std::span<const KernelTable* const> compiled_rooms() {
#if defined(__x86_64__)
  static const std::array<const KernelTable*, 6> rooms = {
      kernels_scalar(),        kernels_avx2(),        kernels_avx_vnni(),
      kernels_avx_vnni_evex(), kernels_avx512_vnni(), kernels_avx512_vbmi(),
  };
#elif defined(__aarch64__)
  static const std::array<const KernelTable*, 2> rooms = {kernels_scalar(), kernels_neon_dotprod()};
#else
  static const std::array<const KernelTable*, 1> rooms = {kernels_scalar()};
#endif
  return rooms;
}

uint32_t cpu_features() {
  uint32_t features = 0;
#if defined(__x86_64__)
  // The builtin also asks the operating system (xgetbv) whether it saves the wide registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) features |= kAvx2;
  if (__builtin_cpu_supports("fma")) features |= kFma;
  // No CPU has AVX2 without half-float conversion, and gcc 12 and clang spell its query differently.
  if (__builtin_cpu_supports("avx2")) features |= kF16c;
  if (__builtin_cpu_supports("avx512f")) features |= kAvx512f;
  if (__builtin_cpu_supports("avx512bw")) features |= kAvx512bw;
  if (__builtin_cpu_supports("avx512vl")) features |= kAvx512vl;
  if (__builtin_cpu_supports("avx512dq")) features |= kAvx512dq;
  if (__builtin_cpu_supports("avx512vnni")) features |= kAvx512vnni;
  if (__builtin_cpu_supports("avx512vbmi")) features |= kAvx512vbmi;
  // Not every compiler's builtin knows this name. The instructions need no more of the operating system than AVX2's.
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool leaf =
      __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && eax >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx);
  if ((features & kAvx2) && leaf && (eax & 1u << 4)) features |= kAvxVnni;
#elif defined(__aarch64__) && defined(__linux__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) features |= kDotprod;
#elif defined(__aarch64__) && defined(__APPLE__)
  features |= kDotprod;  // all of Apple's computers
#endif
  return features;
}

uint32_t features_from_names(const std::vector<std::string>& names) {
  uint32_t features = 0;
  for (const std::string& wanted : names) {
    uint32_t bit = 0;
    for (const auto& [name, value] : kFeatureNames) {
      if (name == wanted) bit = value;
    }
    if (bit == 0) throw std::invalid_argument("'" + wanted + "' is not one of the CPU features " + names_of(~0u));
    features |= bit;
  }
  return features;
}

const KernelTable& select_room(std::optional<std::string_view> forced, uint32_t features, bool use_environment) {
  std::string origin = "isa";
  if (!forced && use_environment) {
    // Read once per model, on the thread that makes it.
    if (const char* name = std::getenv("BITDISTILL_ISA"); name != nullptr && *name != '\0') {
      forced = name;
      origin = "BITDISTILL_ISA";
    }
  }
  if (forced) {
    for (const KernelTable* room : compiled_rooms()) {
      if (room->name != *forced) continue;
      const uint32_t missing = room->features & ~features;
      if (missing == 0) return *room;
      throw std::runtime_error(origin + " = '" + std::string(*forced) + "': this CPU lacks " + names_of(missing) +
                               "; leave it unset to use what the CPU has");
    }
    throw std::runtime_error(origin + " = '" + std::string(*forced) + "' is unknown; this build has " + room_names());
  }
  const KernelTable* best = nullptr;
  for (const KernelTable* room : compiled_rooms()) {
    if (!room->only_by_name && (room->features & ~features) == 0) best = room;
  }
  if (best != nullptr) return *best;
  throw std::runtime_error("this CPU has no " + std::string(kLeast) +
                           ", which the engine's fast kernels need; BITDISTILL_ISA=scalar runs without, very slowly");
}

const KernelTable& room_named(std::string_view name) { return select_room(name, cpu_features(), false); }

}  // namespace bitdistill
