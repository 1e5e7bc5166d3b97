#pragma once
// Prefill's top-n selection (prefill/rank/rank.cu): a warp a (row, group) finds the n blocks of the highest scores.
//
// The n-th highest of the 32 lanes' maxima is a lower bound of the n-th highest score. Blocks that reach it, some 25 of
// a thousand, are sorted. Bytes: the block scores, 4 each, twice, the second time mostly from caches. Bound: these
// reads, at half the peak rate.

#include "kernels/cuda/attention/block_scores.cuh"

namespace nsa::gpu::block_scoring {

constexpr int top_n_warps = 8;
constexpr int max_candidates = 32 + 128;  // of a (row, group), in shared memory

// Entries whose key is the bits of the score, which is not negative. 0: none.
__device__ __forceinline__ Entry score_entry(float score, int block) { return entry_of(__float_as_uint(score), block); }
__device__ __forceinline__ float score_of(Entry entry) { return __uint_as_float(static_cast<unsigned>(entry >> 32)); }

template <class T>
__device__ __forceinline__ T compare_exchange(T mine, unsigned step, bool keeps_larger) {
  const T other = __shfl_xor_sync(0xffffffffu, mine, step);
  return (other > mine) == keeps_larger ? other : mine;
}
// A warp's 32 values in falling order (bitonic sort).
template <class T>
__device__ __forceinline__ T sorted(T mine) {
  const unsigned lane = threadIdx.x % 32;
#pragma unroll
  for (unsigned size = 2; size <= 32; size *= 2)
#pragma unroll
    for (unsigned step = size / 2; step > 0; step /= 2)
      mine = compare_exchange(mine, step, ((lane & step) == 0) == ((lane & size) == 0 || size == 32));
  return mine;
}
// The best 32 of two sorted sets, sorted.
__device__ __forceinline__ Entry merged(Entry a, Entry b) {
  const Entry other = __shfl_sync(0xffffffffu, b, 31 - threadIdx.x % 32);
  Entry mine = a > other ? a : other;
#pragma unroll
  for (unsigned step = 16; step > 0; step /= 2) mine = compare_exchange(mine, step, (threadIdx.x & step) == 0);
  return mine;
}

struct TopNParams {
  RankArgs a;
  const float* scores;
  std::int64_t pitch;
};

// Blocks [begin, end) are selected by score; the eligible ones before and after are always selected.
struct Candidates {
  int begin, end, eligible;
  __device__ __forceinline__ Candidates(const BlockRules& r, int blocks)
      : begin(min(r.n_init, blocks)), end(max(begin, blocks - r.n_local)), eligible(blocks) {}
  __device__ __forceinline__ int forced() const { return begin + eligible - end; }
  __device__ __forceinline__ int forced_block(int i) const { return i < begin ? i : end + i - begin; }
};

// The lane's four of 128 blocks' scores from `first`, a multiple of 128; -1: not a candidate.
__device__ __forceinline__ float4 scores_at(const float* scores, const Candidates& c, int first) {
  const int j = first + threadIdx.x % 32 * 4;
  if (first >= c.begin && first + 128 <= c.end) return *reinterpret_cast<const float4*>(scores + j);
  const auto at = [&](int i) { return i >= c.begin && i < c.end ? scores[i] : -1.0f; };
  return make_float4(at(j), at(j + 1), at(j + 2), at(j + 3));
}

// The best 32 of a warp's `count` entries, sorted.
__device__ __forceinline__ Entry best_of(const Entry* kept, int count) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
  Entry best = sorted(lane < count ? kept[lane] : 0);
  for (int i = 32; i < count; i += 32) best = merged(best, sorted(lane + i < count ? kept[lane + i] : 0));
  __syncwarp();
  return best;
}

// The best `wanted` (1 .. 32) of the candidates: the c-th in lane c, 0 in later lanes. `kept`: the warp's,
// [max_candidates].
__device__ __forceinline__ Entry top_by_score(const float* scores, const Candidates& c, int wanted, Entry* kept) {
  const int lane = threadIdx.x % 32;
  float lane_max = -1.0f;
#pragma unroll 4
  for (int first = 0; first < c.end; first += 128) {
    const float4 x = scores_at(scores, c, first);
    lane_max = fmaxf(lane_max, fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)));
  }
  // If fewer than `wanted` lanes have a block, the bound is 0 and all blocks reach it.
  float bound = fmaxf(__shfl_sync(0xffffffffu, sorted(lane_max), wanted - 1), 0.0f);
  int count = 0;
#pragma unroll 2
  for (int first = 0; first < c.end; first += 128) {
    const float4 x = scores_at(scores, c, first);
    const float mine[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned mask = __ballot_sync(0xffffffffu, mine[i] >= bound);
      if (mask == 0) continue;
      if (mine[i] >= bound)
        kept[count + __popc(mask & ((1u << lane) - 1))] = score_entry(mine[i], first + 4 * lane + i);
      count += __popc(mask);
    }
    if (count <= 32) continue;
    const Entry best = best_of(kept, count);
    if (lane < wanted) kept[lane] = best;
    count = wanted;
    bound = fmaxf(bound, score_of(__shfl_sync(0xffffffffu, best, wanted - 1)));
    __syncwarp();
  }
  const Entry best = best_of(kept, count);
  return lane < wanted ? best : 0;
}

// The n selected blocks, the c-th in lane c, 0 in later lanes: forced ones by rising index, then by score.
__device__ __forceinline__ Entry select_blocks(const BlockRules& r, const float* scores, int eligible, Entry* kept) {
  const int lane = threadIdx.x % 32;
  const Candidates candidates(r, eligible);
  const int forced = candidates.forced(), wanted = r.n_sel - forced;
  Entry best = 0;
  if (wanted > 0 && candidates.end > candidates.begin) best = top_by_score(scores, candidates, wanted, kept);
  best = __shfl_sync(0xffffffffu, best, lane - forced);
  return lane < forced ? score_entry(INFINITY, candidates.forced_block(lane)) : best;
}

__global__ void __launch_bounds__(32 * top_n_warps) top_n_kernel(const __grid_constant__ TopNParams p) {
  __shared__ Entry kept[top_n_warps][max_candidates];
  griddep_wait();
  const LayerShape& s = p.a.shape;
  const BlockRules& r = s.rules;
  const int lane = threadIdx.x % 32, n = r.n_sel;
  const unsigned row_group = blockIdx.x * top_n_warps + threadIdx.x / 32;  // their scores are in memory: below 2^31
  if (row_group >= p.a.tile.rows() * s.groups) return;
  const unsigned row = row_group / static_cast<unsigned>(s.groups);
  const std::int64_t t = *p.a.tile.first_position + row % static_cast<unsigned>(p.a.tile.tokens);
  const int eligible = static_cast<int>(eligible_blocks(r, t));
  const float* scores = p.scores + row_group * p.pitch;
  const Entry mine = select_blocks(r, scores, eligible, kept[threadIdx.x / 32]);
  const int block = mine == 0 ? -1 : block_of(mine);
  if (p.a.candidates && lane < n)
    p.a.candidates[std::int64_t{row_group} * n + lane] = block < 0 ? Candidate{} : Candidate{score_of(mine), block};
  if (p.a.selected) {
    int smaller = 0;  // selected blocks of lower index
    for (int c = 0; c < n; ++c) {
      const int other = __shfl_sync(0xffffffffu, block, c);
      smaller += other >= 0 && other < block;
    }
    if (lane < n) p.a.selected[std::int64_t{row_group} * n + (block < 0 ? lane : smaller)] = block;
  }
  if (!p.a.p_slc) return;
  for (std::int64_t j = lane; j < p.a.p_slc_blocks; j += 32)
    p.a.p_slc[row_group * p.a.p_slc_blocks + j] = j < eligible ? scores[j] : 0.0f;
}

}  // namespace nsa::gpu::block_scoring
