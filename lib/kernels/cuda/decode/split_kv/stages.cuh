#pragma once
// Decode attention of one branch, split-KV.

#include "kernels/cuda/runtime/common.cuh"
#include "kernels/cuda/sizes/accepts.hpp"

namespace nsa::gpu {

/// The rows of a decode step; tensor cores, fp32 scalar. Maps it does not read go to the scalar kernel.
/// decode/split_kv/branch.cu
void attend_decode(Branch branch, const AttendArgs&, Stream*);

/// Dense attention of each row over its first `lengths[row]` tokens, at most max_positions, whatever its position; uses
/// the counters of `branch`. Reads are not counted where `reads` is null.
void attend_rows_of_length(Branch branch, const AttendArgs&, const std::int32_t* lengths, Stream*);

}  // namespace nsa::gpu
