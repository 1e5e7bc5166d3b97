#pragma once
// The GPU's own clocks.

#include "kernels/interface/backend.hpp"

namespace nsa::gpu {

/// Queues: ring[1 + ring[0]++] = nanoseconds of the GPU's timer.
void stamp(std::int64_t* ring, Stream* stream);

/// Of SM 0; all zero where no block ran there. Waits.
ClockReading read_clock(Stream* stream);

}  // namespace nsa::gpu
