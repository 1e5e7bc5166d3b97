#pragma once
// Properties of a GPU that decide launch sizes, and with them how much scratch the stages need.

#include <cstddef>

namespace nsa::gpu {

struct DeviceLimits {
  int sms = 132;                         ///< streaming multiprocessors
  int capability = 90;                   ///< 10 * major + minor
  std::size_t shared_bytes = 227 << 10;  ///< maximum dynamic shared memory of a block
};

/// Of the open device, or of the GPU that is planned for: at first of an H200.
const DeviceLimits& limits();
void set_limits(const DeviceLimits& limits);

/// DeviceLimits::shared_bytes of a GPU of that compute capability (CUDA C++ Programming Guide, Technical Specifications
/// per Compute Capability).
std::size_t shared_bytes_of(int capability);

}  // namespace nsa::gpu
