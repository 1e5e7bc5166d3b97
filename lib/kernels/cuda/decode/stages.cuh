#pragma once
// The attention of a decode step as a whole: one query row a sequence.

#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu {

/// From cmp to combine in one launch or four. decode/fused/launch.cu, decode/attention.cu
bool decode_step_accepts(const AttentionArgs&);
void decode_step(const AttentionArgs&, Stream*);

/// The launches of a step between its exchanges, where ranks share the sequences. decode/sharded.cu
bool decode_shard_accepts(const ShardedAttentionArgs&);
void decode_open(const ShardedAttentionArgs&, Stream*);
void decode_weigh(const ShardedAttentionArgs&, Stream*);
void decode_combine(const ShardedAttentionArgs&, Stream*);

}  // namespace nsa::gpu
