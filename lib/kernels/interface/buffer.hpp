#pragma once
// Owning memory of a backend. Every byte a rank allocates goes through here and is accounted by kind.

#include <array>
#include <cstddef>
#include <utility>

#include "kernels/interface/backend.hpp"

namespace nsa {

enum class MemoryKind : int { weights, caches, activations, workspace };
constexpr std::array memory_kind_names = {"weights", "caches", "activations", "workspace"};

/// Bytes in use now and at most, by kind.
struct MemoryAccount {
  std::array<std::size_t, memory_kind_names.size()> used{}, peak{};
  std::size_t total = 0, total_peak = 0;
  void add(MemoryKind kind, std::size_t bytes);
  void remove(MemoryKind kind, std::size_t bytes) noexcept;
};

class Buffer {
 public:
  Buffer() = default;
  Buffer(const DeviceOps& device, MemoryAccount& account, MemoryKind kind, std::size_t bytes);
  ~Buffer();
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    Buffer(std::move(other)).swap(*this);
    return *this;
  }
  void* data() const { return data_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  std::size_t bytes() const { return bytes_; }

 private:
  void swap(Buffer& other) noexcept;
  const DeviceOps* device_ = nullptr;
  MemoryAccount* account_ = nullptr;
  MemoryKind kind_{};
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace nsa
