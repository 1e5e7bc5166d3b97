#pragma once
// Carves a stage's scratch into arrays, and gives each thread its share. With a null base it only adds up what
// would be taken: the same code sizes the scratch and uses it.

#include <omp.h>

#include <cstddef>
#include <cstdint>

#include "kernels/diagnostics/error.hpp"

namespace nsa::host {

class Arena {
 public:
  Arena() = default;
  Arena(void* base, std::size_t bytes) : base_(static_cast<std::byte*>(base)), bytes_(bytes) {}

  template <class T>
  T* take(std::int64_t count) {
    T* at = reinterpret_cast<T*>(base_ + used_);
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
    if (base_ && used_ > bytes_) throw InternalError("host scratch too small (scratch_bytes disagrees with a stage)");
    return base_ ? at : nullptr;
  }
  std::size_t used() const { return used_; }

 private:
  std::byte* base_ = nullptr;
  std::size_t bytes_ = 0, used_ = 0;
};

constexpr std::int64_t round_up(std::int64_t n, std::int64_t unit) { return (n + unit - 1) / unit * unit; }

inline int threads() { return omp_get_max_threads(); }

}  // namespace nsa::host
