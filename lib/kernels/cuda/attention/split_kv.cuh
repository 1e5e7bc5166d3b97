#pragma once
// Split-KV: how the attention kernels divide work over CTAs and merge the splits of a work item.
//
// The K/V that a query row attends in one branch is a sequence of spans (cmp: LSE buckets or segments, sel: selected
// blocks, win: runs of positions). Split s of S takes spans s, s + S, ... and stores its partial (o, m, s) in scratch.
// The CTA that arrives last merges the partials by rising split, so the result does not depend on the order of arrival.

#include <algorithm>

#include "kernels/cuda/runtime/common.cuh"
#include "kernels/cuda/sizes/work.hpp"

namespace nsa::gpu {

/// Upper bound of the spans of a branch on this rank, where a span of cmp is an LSE bucket.
inline std::int64_t max_bucket_spans(Branch branch, const LayerShape& s, const RowMap& map) {
  if (branch == cmp) return map.rank == all_ranks ? s.lse.buckets : std::max(1, s.lse.buckets / map.kv);
  return branch == sel ? s.rules.n_sel : (std::int64_t{s.rules.w} + window_span - 1) / window_span;
}

/// Whether the tuned kernels read this map: whole sequences; a rank's own chunks; gathered chunks; for the window the
/// ring that it fills exactly. A chunk must hold whole window spans.
inline bool reads_kv_map(Branch branch, const LayerShape& s, const RowMap& map) {
  if (map.ring > 0) return branch == win && map.ring == s.rules.w;
  if (map.chunk == INT64_MAX) return map.halo == 0;
  return map.kv > 1 && (branch != win || (map.rank == all_ranks && map.chunk % window_span == 0));
}

/// Whether the decode kernels read this map: one of these, or for the window a longer ring, of whole window spans, of
/// which a rank reads whole spans. A span of positions is then one of slots.
inline bool reads_step_map(Branch branch, const LayerShape& s, const RowMap& map) {
  const auto whole = [](std::int64_t slots) { return slots % window_span == 0; };
  return reads_kv_map(branch, s, map) || (branch == win && map.ring > s.rules.w && whole(map.ring) &&
                                          whole(map.slot_begin) && (whole(map.slot_end) || map.slot_end >= map.ring));
}

/// Splits of a work item: enough CTAs to fill the GPU twice, at most one a span.
inline int splits_of(const LayerShape& s, const QueryTile& tile, std::int64_t spans) {
  const std::int64_t work_items = tile.rows() * s.groups * head_tiles(s);
  const std::int64_t wanted = (2 * limits().sms + work_items - 1) / work_items;
  return work_items > max_split_rows ? 1 : static_cast<int>(std::clamp<std::int64_t>(wanted, 1, spans));
}

/// Whether this CTA is the last of `splits` to arrive. All threads call it once the writes of the CTA are issued.
__device__ __forceinline__ bool arrives_last(unsigned* counter, int splits) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(counter, 1u) == static_cast<unsigned>(splits - 1);
    if (last) *counter = 0;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

/// Barrier of all threads of the cluster (arrive.release, wait.acquire): their shared-memory writes become visible.
__device__ __forceinline__ void cluster_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

/// The two halves of cluster_barrier(). Work between them must not depend on other CTAs.
__device__ __forceinline__ void cluster_arrive() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

/// The address in CTA `rank` of the cluster that corresponds to the shared-memory address `mine`.
template <class V>
__device__ __forceinline__ V* map_to_cta(V* mine, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  V* theirs;
  asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(mine), "r"(rank));
  return theirs;
#else
  return mine;
#endif
}

}  // namespace nsa::gpu
