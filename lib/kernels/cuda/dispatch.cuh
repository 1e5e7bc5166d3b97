#pragma once
// The CUDA implementations of each branch.

#include <span>

#include "kernels/interface/kernel_table.hpp"

namespace nsa::gpu {

/// Implementations of a branch for KernelTable::attend; the first, `fused`, accepts every shape.
std::span<const AttendKernel> attend_kernels(Branch branch);

}  // namespace nsa::gpu
