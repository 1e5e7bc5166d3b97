#pragma once
// Decode attention of one branch, split-KV.

#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu {

/// One query row a sequence; tensor cores, fp32 scalar. Maps it does not read go to the scalar kernel.
/// decode/split_kv/branch.cu
void attend_decode(Branch branch, const AttendArgs&, Stream*);
bool decode_accepts(const LayerShape&, const QueryTile&);

/// Dense attention of each row over its first `lengths[row]` tokens, at most max_positions, whatever its position; uses
/// the counters of `branch`. Reads are not counted where `reads` is null.
void attend_rows_of_length(Branch branch, const AttendArgs&, const std::int32_t* lengths, Stream*);

/// Bytes of scratch a stage needs.
std::size_t decode_scratch(const LayerShape&, const QueryTile&);

}  // namespace nsa::gpu
