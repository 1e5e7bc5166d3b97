#include "kernels/cuda/sizes/limits.hpp"

namespace nsa::gpu {

namespace {

DeviceLimits current;

}  // namespace

const DeviceLimits& limits() { return current; }

void set_limits(const DeviceLimits& limits) { current = limits; }

std::size_t shared_bytes_of(int capability) {
  const bool large = capability == 90 || capability == 100 || capability == 103;
  const std::size_t kib = large ? 227 : capability == 80 || capability == 87 ? 163 : 99;
  return kib << 10;
}

}  // namespace nsa::gpu
