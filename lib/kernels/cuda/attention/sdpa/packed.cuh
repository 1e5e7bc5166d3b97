#pragma once
// Packed SDPA of the selected branch: what a framework does with the best kernels it can call. A gather copies the
// tokens of the selected blocks of each (row, group) next to each other; attention over packed rows reads them.

#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu {

/// K and V of work items first .. first + count, (row, group) of the tile, each a matrix of `columns` rows of which the
/// first `lengths[item]` are written.
struct PackedRows {
  std::int64_t first, count, columns;
  void *k, *v;            ///< [count][columns][Dk], [count][columns][Dv], storage type
  std::int32_t* lengths;  ///< [count]
};

/// Copies the tokens of the selected blocks at positions <= t and counts them in a.reads. attention/sdpa/gather.cu
void gather_selected(const AttendArgs& a, const PackedRows& packed, Stream* stream);
bool gather_reads(const RowMap&);  ///< whole sequences

}  // namespace nsa::gpu
