// The one door to the kernel rooms: what was compiled, what this CPU can run, which one is used.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernel_table.h"

namespace bitdistill {

// Slowest first.
std::span<const KernelTable* const> compiled_rooms();

// Feature bits of this CPU, including the operating system's support of wide registers.
uint32_t cpu_features();

// Throws std::invalid_argument for a name that is not a feature.
uint32_t features_from_names(const std::vector<std::string>& names);

// The room to use. `forced` by name, or else BITDISTILL_ISA where `use_environment`, or else the last that `features`
// allow among those that are not `only_by_name`. Throws std::runtime_error with the remedy.
const KernelTable& select_room(std::optional<std::string_view> forced, uint32_t features, bool use_environment);

// By name, on this CPU; for tests of single kernels.
const KernelTable& room_named(std::string_view name);

}  // namespace bitdistill
