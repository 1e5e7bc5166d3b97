#pragma once
// Scores of the selection blocks and top-n selection.

#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu {

void rank(const RankArgs&, Stream*);
void select(const SelectArgs&, Stream*);

}  // namespace nsa::gpu
