// numpy arrays in and out, and words for choices.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernel_table.h"

namespace bitdistill {

namespace nb = nanobind;

template <class T, size_t kDimensions>
using ArrayIn = nb::ndarray<const T, nb::ndim<kDimensions>, nb::c_contig, nb::device::cpu>;
using Tokens = ArrayIn<int32_t, 1>;
using FloatVector = ArrayIn<float, 1>;

// An array made here and handed to Python, which then owns it.
template <class T>
class ArrayOut {
 public:
  explicit ArrayOut(std::vector<size_t> shape) : shape_(std::move(shape)) {
    size_t n = 1;
    for (const size_t d : shape_) n *= d;
    data_ = std::make_unique<T[]>(n);
  }
  T* data() { return data_.get(); }
  nb::object cast() {
    T* data = data_.release();
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
    return nb::cast(nb::ndarray<nb::numpy, T>(data, shape_.size(), shape_.data(), owner));
  }

 private:
  std::vector<size_t> shape_;
  std::unique_ptr<T[]> data_;
};
using FloatOut = ArrayOut<float>;

template <class T>
T one_of(const char* field, const std::string& value, std::initializer_list<std::pair<const char*, T>> choices) {
  std::string known;
  for (const auto& [name, choice] : choices) {
    if (value == name) return choice;
    known += (known.empty() ? "" : ", ") + std::string(name);
  }
  throw std::invalid_argument(std::string(field) + " = '" + value + "' is not one of " + known);
}

inline Cache cache_named(const std::string& name) {
  return one_of<Cache>(
      "kv", name,
      {{"fp16", Cache::f16}, {"int8", Cache::i8}, {"int4", Cache::i4}, {"int3", Cache::i3}, {"fp32", Cache::f32}});
}

}  // namespace bitdistill
