#pragma once
// A row-major array with its shape, for code that prefers clarity to speed.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

namespace oracle {

template <class T>
struct Array {
  std::vector<std::int64_t> shape;
  std::vector<T> values;

  Array() = default;
  explicit Array(std::vector<std::int64_t> extents, T fill = {})
      : shape(std::move(extents)), values(count(shape), fill) {}
  Array(std::vector<std::int64_t> extents, std::vector<T> data) : shape(std::move(extents)), values(std::move(data)) {
    if (values.size() != count(shape)) throw std::logic_error("array: shape and number of values differ");
  }

  /// Element at full coordinates; throws std::out_of_range outside the shape.
  template <class... Index>
  T& operator()(Index... index) {
    return values[offset({static_cast<std::int64_t>(index)...})];
  }
  template <class... Index>
  const T& operator()(Index... index) const {
    return values[offset({static_cast<std::int64_t>(index)...})];
  }

 private:
  static std::size_t count(const std::vector<std::int64_t>& extents) {
    return std::accumulate(extents.begin(), extents.end(), std::size_t{1}, std::multiplies<>());
  }
  std::size_t offset(std::initializer_list<std::int64_t> index) const {
    if (index.size() != shape.size()) throw std::out_of_range("array: wrong number of indices");
    std::size_t result = 0, axis = 0;
    for (const std::int64_t i : index) {
      if (i < 0 || i >= shape[axis]) throw std::out_of_range("array: index outside of the shape");
      result = result * static_cast<std::size_t>(shape[axis++]) + static_cast<std::size_t>(i);
    }
    return result;
  }
};

using Reals = Array<double>;
using Integers = Array<std::int64_t>;

}  // namespace oracle
