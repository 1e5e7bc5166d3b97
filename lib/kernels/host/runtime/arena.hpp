#pragma once
// Bump allocation of a stage's scratch. With a null base it only adds up the sizes: the same code sizes the scratch and
// uses it.

#include <omp.h>

#include <cstddef>
#include <cstdint>

#include "kernels/diagnostics/error.hpp"

namespace nsa::host {

class Arena {
 public:
  Arena() = default;
  Arena(void* base, std::size_t bytes) : base_(static_cast<std::byte*>(base)), bytes_(bytes) {}

  /// `count` elements, in multiples of 64 bytes; null with a null base. Throws InternalError past the end.
  template <class T>
  T* allocate(std::int64_t count) {
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

constexpr std::int64_t round_up(std::int64_t n, std::int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

/// Threads of a parallel region.
inline int threads() { return omp_get_max_threads(); }

}  // namespace nsa::host
