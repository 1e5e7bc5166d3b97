#pragma once
// The CUDA kernel table without what runs: names, accepted shapes and sizes. It is all that a plan needs, and the
// kernel table of the CUDA backend begins with it (kernel_table.cu).

#include "kernels/cuda/sizes/limits.hpp"
#include "kernels/interface/kernel_table.hpp"

namespace nsa::gpu {

/// Implementations of a branch, without `run`; the first, `fused`, accepts every shape.
std::span<const AttendKernel> planned_attend_kernels(Branch branch);

/// Sizes are those of limits().
const KernelTable& planned_kernels();

}  // namespace nsa::gpu
