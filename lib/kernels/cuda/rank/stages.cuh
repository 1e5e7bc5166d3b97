#pragma once
// Scores of the selection blocks and top-n selection.

#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu {

void rank(const RankArgs&, Stream*);
void select(const SelectArgs&, Stream*);

/// Bytes of scratch a stage needs.
std::size_t rank_scratch(const LayerShape&, const QueryTile&);

}  // namespace nsa::gpu
