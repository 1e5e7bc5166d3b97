#pragma once
// Where the parts of decode lists meet in launches of their own (decode/split_kv/merge_splits.cu) instead of in the
// last CTA of a list: the walk may then be cut into as many pieces as fill the GPU, and a long list's lanes are formed
// by many threads.

#include "kernels/cuda/decode/split_kv/params.cuh"

namespace nsa::gpu {

/// After a launch of `walk` with DecodeEnd::parts. A pointer that is null is not written.
struct DecodeMeeting {
  DecodeParams walk;
  Partials out[2] = {};   ///< by job of the walk: the merged parts
  float* sums = nullptr;  ///< of the window's job, if there is one: (m, sum) alone, [rows][H][2]
  bool lanes = false;     ///< of the compressed tokens' job, to walk.lse
};
void launch_meeting(const DecodeMeeting& meeting, Stream* stream);

/// Whether that pays: always where there are parts to merge (docs/kernels.md), else where a CTA would be long over
/// lanes.
bool meets_apart(Branch branch, int splits, std::int64_t tiles);

/// Of DecodeShardArgs::weighted what cmp and win give, each normalised by what all ranks have told.
void launch_weighing(const DecodeParams& walk, const ShardedAttentionArgs& args, Stream* stream);

}  // namespace nsa::gpu
