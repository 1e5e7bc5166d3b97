#pragma once
// The host backend: every stage on CPU threads (OpenMP) and SIMD units (chosen at run time), the reference that runs on
// any machine. Results do not depend on the number of threads.

#include "kernels/interface/backend.hpp"

namespace nsa {

const KernelTable& host_kernels();

/// Streams run inline, events are steady_clock stamps, there are no graphs (capture is null).
const DeviceOps& host_device();

/// Sets the threads of this process's stages: at least 1, and at most OMP_THREAD_LIMIT.
void set_host_threads(int threads);

}  // namespace nsa
