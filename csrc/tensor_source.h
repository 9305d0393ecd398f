// Where weights come from: a file, or random numbers of the same shapes (for measurements).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace bitdistill {

enum class DType { u8, i8, bf16, f32 };
size_t size_of(DType dtype);
// Throws std::invalid_argument for a name that the engine does not know.
DType dtype_named(const std::string& name);
const char* name_of(DType dtype);

struct TensorEntry {
  std::string name;
  DType dtype;
  std::vector<size_t> shape;
  uint64_t offset;  // from the start of the file
  uint64_t nbytes;
  std::optional<uint64_t> checksum;  // docs/format.md
};

std::string describe(const TensorEntry& entry);  // "NAME (U8 [1, 2, 3])"

class TensorSource {
 public:
  virtual ~TensorSource() = default;
  // Throws std::invalid_argument when the entry's bytes do not fit its shape or do not lie in the file.
  virtual void check(const TensorEntry& entry) const = 0;
  // Bytes [begin, begin + count) of a tensor. May be called by several threads. Throws std::system_error.
  virtual void read(const TensorEntry& entry, uint64_t begin, size_t count, uint8_t* out) const = 0;
  // The bytes in place, where the source can share them; else null.
  virtual const uint8_t* in_place(const TensorEntry&) const { return nullptr; }
};

// Throws std::system_error with the path.
std::unique_ptr<TensorSource> open_file(const std::string& path, bool mmap);
// Trits, int8 and small floats; norms 1, scales 1 / sqrt(columns) or so. The same for the same seed.
std::unique_ptr<TensorSource> random_source(uint64_t seed);

// Partial checksum of `count` bytes that start at byte `begin` (a multiple of 8) of a tensor.
uint64_t partial_checksum(const uint8_t* bytes, uint64_t begin, size_t count);

}  // namespace bitdistill
