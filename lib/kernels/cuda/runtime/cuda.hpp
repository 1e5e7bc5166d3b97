#pragma once
// The CUDA backend, seen from host code.

#include "kernels/interface/backend.hpp"

namespace nsa {

/// Opens GPU `local_rank` of this host. Throws UserError(device) when the host has no such GPU, unless the environment
/// says NSA_SHARE_GPU=1: then ranks take turns on the GPUs there are, which tries a layout out but times nothing.
Backend open_cuda(int local_rank);

}  // namespace nsa
