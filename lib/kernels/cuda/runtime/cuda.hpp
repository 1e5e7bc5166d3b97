#pragma once
// The CUDA backend as host code sees it.

#include "kernels/interface/backend.hpp"

namespace nsa {

/// Opens GPU `local_rank` of this host. Throws UserError(device) when the host has no such GPU, unless the environment
/// has NSA_SHARE_GPU=1: then several ranks share a GPU, which tests a layout but gives no meaningful times.
Backend open_cuda(int local_rank);

}  // namespace nsa
