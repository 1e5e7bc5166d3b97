#include "kernels/interface/buffer.hpp"

#include <algorithm>

namespace nsa {

void MemoryAccount::add(MemoryKind kind, std::size_t bytes) {
  const auto k = static_cast<std::size_t>(kind);
  used[k] += bytes;
  peak[k] = std::max(peak[k], used[k]);
  total += bytes;
  total_peak = std::max(total_peak, total);
}

void MemoryAccount::remove(MemoryKind kind, std::size_t bytes) noexcept {
  used[static_cast<std::size_t>(kind)] -= bytes;
  total -= bytes;
}

Buffer::Buffer(const DeviceOps& device, MemoryAccount& account, MemoryKind kind, std::size_t bytes)
    : device_(&device), account_(&account), kind_(kind), data_(device.allocate(bytes)), bytes_(bytes) {
  account.add(kind, bytes);
}

Buffer::~Buffer() {
  if (!device_) return;
  device_->release(data_);
  account_->remove(kind_, bytes_);
}

void Buffer::swap(Buffer& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(account_, other.account_);
  std::swap(kind_, other.kind_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
}

}  // namespace nsa
