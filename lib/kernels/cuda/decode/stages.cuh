#pragma once
// The attention of a decode step as a whole: one query row a sequence.

#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu {

/// From cmp to combine in one launch or four. step.cu, decode_step.cu
bool decode_step_accepts(const DecodeStepArgs&);
void decode_step(const DecodeStepArgs&, Stream*);

/// The launches of a step between its exchanges, where ranks share the sequences. decode_shard.cu
bool decode_shard_accepts(const DecodeShardArgs&);
void decode_open(const DecodeShardArgs&, Stream*);
void decode_weigh(const DecodeShardArgs&, Stream*);
void decode_combine(const DecodeShardArgs&, Stream*);

}  // namespace nsa::gpu
