#pragma once
// Split-KV merge as a launch of its own (decode/split_kv/merge_splits.cu) instead of in the last CTA of a work item.
// The KV mainloop may then use as many splits as fill the GPU, and many threads form the LSE buckets of a long work
// item.

#include "kernels/cuda/decode/split_kv/params.cuh"

namespace nsa::gpu {

/// Runs after `launch` with DecodeEpilogue::store_partials. Null outputs are skipped.
struct MergeParams {
  DecodeParams launch;
  Partials out[2] = {};      ///< by job of `launch`: the merged partials
  float* win_lse = nullptr;  ///< (m, sum) of the window job if there is one: [rows][H][2]
  bool buckets = false;      ///< LSE buckets of the cmp job, to launch.lse
};
void launch_merge_splits(const MergeParams& params, Stream* stream);

/// Whether a separate launch is faster: always where there are partials to merge (docs/kernels/README.md), else where
/// one CTA would take long to form the LSE buckets.
bool merges_separately(Branch branch, int splits, std::int64_t tiles);

/// Writes the cmp and win part of ShardedAttentionArgs::weighted: partials normalised over all ranks, times the gates.
void launch_normalise_partials(const DecodeParams& launch, const ShardedAttentionArgs& args, Stream* stream);

}  // namespace nsa::gpu
