#pragma once
// What the attention kernels share: how work is split over CTAs, and how the splits of one row meet again.
//
// A row's K/V of one branch is a list of units (cmp: LSE lanes, sel: chosen blocks, win: runs of positions). Split
// s of S takes units s, s+S, ... and leaves its partial (o, m, sum) in scratch; the CTA that arrives last merges them
// by rising split, so the result does not depend on who arrives when.

#include <algorithm>

#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu {

constexpr int window_unit = 64;     ///< positions of the window a unit holds
constexpr int heads_per_tile = 16;  ///< query heads of a group that share one pass over K/V

/// Units of a branch at most, on this rank.
inline std::int64_t units_of(Branch branch, const LayerShape& s, const RowMap& map) {
  if (branch == cmp) return map.rank == all_ranks ? s.lse.buckets : std::max(1, s.lse.buckets / map.kv);
  return branch == sel ? s.rules.n_sel : (std::int64_t{s.rules.w} + window_unit - 1) / window_unit;
}

inline int head_tiles(const LayerShape& s) { return (s.heads_per_group + heads_per_tile - 1) / heads_per_tile; }

constexpr int decode_heads(DType type) { return type == DType::f32 ? 4 : 16; }
inline int decode_head_tiles(const LayerShape& s) {
  return (s.heads_per_group + decode_heads(s.dtype) - 1) / decode_heads(s.dtype);
}

/// The maps the kernel reads: whole sequences; a rank's own chunks; gathered chunks; for the window the ring it fills
/// exactly. A chunk holds whole window units.
inline bool reads_kv_map(Branch branch, const LayerShape& s, const RowMap& map) {
  if (map.ring > 0) return branch == win && map.ring == s.rules.w;
  if (map.chunk == INT64_MAX) return map.halo == 0;
  return map.kv > 1 && (branch != win || (map.rank == all_ranks && map.chunk % window_unit == 0));
}

/// Splits of a row: enough CTAs to fill the GPU twice, no more than there are units.
inline int splits_of(const LayerShape& s, const QueryTile& tile, std::int64_t units) {
  const std::int64_t lists = tile.rows() * s.groups * head_tiles(s);
  const std::int64_t wanted = (2 * limits().sms + lists - 1) / lists;
  return lists > max_split_rows ? 1 : static_cast<int>(std::clamp<std::int64_t>(wanted, 1, units));
}

/// Floats of scratch one split of one list takes.
__host__ __device__ inline std::int64_t split_floats(const LayerShape& s) {
  return std::int64_t{heads_per_tile} * (s.d_v + 2);
}

/// Called by all threads once this CTA's writes are done: whether it is the last of `splits`.
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

/// All threads of all CTAs of the cluster; what they wrote to shared memory is there for the others.
__device__ __forceinline__ void cluster_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

/// Its two halves: a thread may do something between them that needs no other CTA.
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

/// Where CTA `rank` of the cluster has what this one has at `mine` in shared memory.
template <class V>
__device__ __forceinline__ V* in_cta(V* mine, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  V* theirs;
  asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(mine), "r"(rank));
  return theirs;
#else
  return mine;
#endif
}

}  // namespace nsa::gpu
