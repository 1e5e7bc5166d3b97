#pragma once
// The CUDA backend, seen from host code.

#include "kernels/backend.hpp"

namespace nsa {

/// Opens GPU `local_rank` of this host. Throws UserError(device) when the host has no such GPU: two ranks on one
/// GPU may hang NCCL, so they are refused unless the environment says NSA_SHARE_GPU=1.
Backend open_cuda(int local_rank);

}  // namespace nsa
