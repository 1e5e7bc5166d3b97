#pragma once
// The host twin: every stage on CPU threads (OpenMP) and SIMD units (chosen at run time). The reference
// that everybody can run. Results do not depend on the number of threads.

#include "kernels/interface/backend.hpp"

namespace nsa {

const KernelTable& host_kernels();

/// Streams run inline, events are steady_clock stamps, there are no graphs (capture is null).
const DeviceOps& host_device();

/// Threads the stages of this process use from now on; at least 1.
void set_host_threads(int threads);

}  // namespace nsa
