#pragma once
// A decode step's attention on ranks that share its sequences, as one launch a rank.

#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu {

bool sharded_step_accepts(const ShardedStepArgs&);
void sharded_step(const ShardedStepArgs&, Stream*);

}  // namespace nsa::gpu
