#pragma once
// Decode attention of one branch, split-KV.

#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu {

/// One query row a sequence; tensor cores, fp32 scalar. Maps it does not read go to the scalar kernel.
/// decode/split_kv/branch.cu
void attend_decode(Branch branch, const AttendArgs&, Stream*);
bool decode_accepts(const LayerShape&, const QueryTile&);

/// Bytes of scratch a stage needs.
std::size_t decode_scratch(const LayerShape&, const QueryTile&);

}  // namespace nsa::gpu
