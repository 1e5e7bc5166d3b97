#pragma once
// The GPU's own clocks.

#include "kernels/interface/backend.hpp"

namespace nsa::gpu {

/// Queues: ring[1 + ring[0]++] = nanoseconds of the GPU's timer.
void stamp(std::int64_t* ring, Stream* stream);

#ifdef __CUDACC__
/// The GPU's timer, which may tick in steps of a microsecond.
__device__ __forceinline__ std::int64_t device_nanoseconds() {
  unsigned long long nanoseconds;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds));
  return static_cast<std::int64_t>(nanoseconds);
}
#endif

/// Of SM 0; all zero where no block ran there. Waits.
ClockReading read_clock(Stream* stream);

}  // namespace nsa::gpu
