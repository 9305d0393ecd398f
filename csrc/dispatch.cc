#include "dispatch.h"

#include <array>
#include <cstdlib>
#include <stdexcept>
#include <utility>

namespace bitdistill {
namespace {

constexpr std::array<std::pair<std::string_view, uint32_t>, 9> kFeatureNames = {{
    {"avx2", kAvx2},
    {"fma", kFma},
    {"f16c", kF16c},
    {"avx512f", kAvx512f},
    {"avx512bw", kAvx512bw},
    {"avx512vl", kAvx512vl},
    {"avx512dq", kAvx512dq},
    {"avx512vnni", kAvx512vnni},
    {"avx512vbmi", kAvx512vbmi},
}};

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
  static const std::array<const KernelTable*, 4> rooms = {kernels_scalar(), kernels_avx2(), kernels_avx512_vnni(),
                                                          kernels_avx512_vbmi()};
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
  const auto rooms = compiled_rooms();
  for (size_t i = rooms.size(); i-- > 1;) {
    if ((rooms[i]->features & ~features) == 0) return *rooms[i];
  }
  throw std::runtime_error(
      "this CPU has no AVX2, which the engine's fast kernels need; BITDISTILL_ISA=scalar runs without, very slowly");
}

const KernelTable& room_named(std::string_view name) { return select_room(name, cpu_features(), false); }

}  // namespace bitdistill
