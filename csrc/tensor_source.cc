#include "tensor_source.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>

namespace bitdistill {
namespace {

void check_size(const TensorEntry& entry) {
  uint64_t bytes = size_of(entry.dtype);
  for (const size_t n : entry.shape) {
    if (n == 0 || __builtin_mul_overflow(bytes, uint64_t{n}, &bytes)) {
      throw std::invalid_argument(describe(entry) + ": impossible shape");
    }
  }
  if (bytes != entry.nbytes) {
    throw std::invalid_argument(describe(entry) + " takes " + std::to_string(bytes) + " bytes, the file gives it " +
                                std::to_string(entry.nbytes));
  }
}

class File final : public TensorSource {
 public:
  File(const std::string& path, bool map) : path_(path) {
    descriptor_ = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor_ < 0) fail();
    struct stat status{};
    if (fstat(descriptor_, &status) != 0) {
      const int error = errno;
      close(descriptor_);
      throw std::system_error(error, std::generic_category(), path_);
    }
    size_ = static_cast<uint64_t>(status.st_size);
    if (map && size_ != 0) {
      void* pages = mmap(nullptr, size_, PROT_READ, MAP_SHARED, descriptor_, 0);
      if (pages != MAP_FAILED) pages_ = static_cast<uint8_t*>(pages);
    }
  }
  ~File() override {
    if (pages_ != nullptr) munmap(pages_, size_);
    close(descriptor_);
  }

  void check(const TensorEntry& entry) const override {
    check_size(entry);
    if (entry.offset > size_ || entry.nbytes > size_ - entry.offset) {
      throw std::invalid_argument(describe(entry) + " ends beyond the file (" + std::to_string(size_) +
                                  " bytes): it is truncated");
    }
  }

  void read(const TensorEntry& entry, uint64_t begin, size_t count, uint8_t* out) const override {
    uint64_t at = entry.offset + begin;
    while (count != 0) {
      const ssize_t got = pread(descriptor_, out, count, static_cast<off_t>(at));
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) fail();
      if (got == 0) throw std::system_error(EIO, std::generic_category(), path_ + ": file became shorter");
      out += got;
      at += static_cast<uint64_t>(got);
      count -= static_cast<size_t>(got);
    }
  }

  const uint8_t* in_place(const TensorEntry& entry) const override {
    return pages_ == nullptr ? nullptr : pages_ + entry.offset;
  }

 private:
  [[noreturn]] void fail() const { throw std::system_error(errno, std::generic_category(), path_); }

  std::string path_;
  int descriptor_ = -1;
  uint64_t size_ = 0;
  uint8_t* pages_ = nullptr;
};

uint64_t mix(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

class Random final : public TensorSource {
 public:
  explicit Random(uint64_t seed) : seed_(seed) {}

  void check(const TensorEntry& entry) const override { check_size(entry); }

  void read(const TensorEntry& entry, uint64_t begin, size_t count, uint8_t* out) const override {
    const uint64_t key = mix(seed_ ^ std::hash<std::string>{}(entry.name));
    const bool is_scale = entry.name.ends_with("_scale"), is_norm = entry.name.find("norm") != std::string::npos;
    for (size_t i = 0; i < count; ++i) {
      const uint64_t at = begin + i;
      const uint64_t bits = mix(key + at / 8) >> at % 8 * 8;
      switch (entry.dtype) {
        case DType::u8:
          out[i] = static_cast<uint8_t>((bits & 255) * 243 >> 8);
          break;
        case DType::i8:
          out[i] = static_cast<uint8_t>(bits);
          break;
        default: {  // 1 in norms; 2^-6 in scales; else magnitudes in [2^-6, 2^-4) of either sign
          const size_t size = size_of(entry.dtype), part = at % size;
          const bool top = part == size - 1, next = part == size - 2;
          if (is_norm || is_scale) {
            const uint16_t high = is_norm ? 0x3f80 : 0x3c80;
            out[i] = static_cast<uint8_t>(top ? high >> 8 : next ? high & 255 : 0);
          } else {
            out[i] = static_cast<uint8_t>(top ? (bits & 0x80) | 0x3c : next ? 0x80 | (bits & 0x7f) : bits & 255);
          }
        }
      }
    }
  }

 private:
  uint64_t seed_;
};

}  // namespace

size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::bf16:
      return 2;
    case DType::f32:
      return 4;
    default:
      return 1;
  }
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::u8:
      return "U8";
    case DType::i8:
      return "I8";
    case DType::bf16:
      return "BF16";
    default:
      return "F32";
  }
}

DType dtype_named(const std::string& name) {
  for (const DType dtype : {DType::u8, DType::i8, DType::bf16, DType::f32}) {
    if (name == name_of(dtype)) return dtype;
  }
  throw std::invalid_argument("dtype '" + name + "' is not one of U8, I8, BF16, F32");
}

std::string describe(const TensorEntry& entry) {
  std::string shape;
  for (const size_t n : entry.shape) shape += (shape.empty() ? "" : ", ") + std::to_string(n);
  return entry.name + " (" + name_of(entry.dtype) + " [" + shape + "])";
}

std::unique_ptr<TensorSource> open_file(const std::string& path, bool mmap) {
  return std::make_unique<File>(path, mmap);
}

std::unique_ptr<TensorSource> random_source(uint64_t seed) { return std::make_unique<Random>(seed); }

uint64_t partial_checksum(const uint8_t* bytes, uint64_t begin, size_t count) {
  uint64_t sum = 0, factor = begin / 8 * 2 + 1;
  size_t i = 0;
  for (; i + 8 <= count; i += 8, factor += 2) {
    uint64_t word;
    std::memcpy(&word, bytes + i, 8);
    sum += word * factor;
  }
  if (i < count) {
    uint64_t word = 0;
    std::memcpy(&word, bytes + i, count - i);
    sum += word * factor;
  }
  return sum;
}

}  // namespace bitdistill
