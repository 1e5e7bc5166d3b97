#pragma once
// Prefill's choice (prefill/rank/rank.cu): a warp a (row, group) finds the best n of its block scores.
//
// The n-th best of 32 lanes' maxima is a bound below which nothing is chosen; what passes it, some 25 blocks of a
// thousand, is sorted. Bytes: the block scores, 4 each, twice, the second time mostly from the caches. Bound: their
// reading, at half of its rate.

#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu::scored {

constexpr int choose_warps = 8;
constexpr int most_kept = 32 + 128;  // blocks that may be chosen, of a list

// A block's place in the order of choice: score above, index below, turned round; the larger the better. 0: none.
using Entry = std::uint64_t;
__device__ __forceinline__ Entry entry_of(float score, int block) {
  return static_cast<Entry>(__float_as_uint(score)) << 32 | static_cast<unsigned>(~block);
}
__device__ __forceinline__ int block_of(Entry entry) { return static_cast<int>(~static_cast<unsigned>(entry)); }
__device__ __forceinline__ float score_of(Entry entry) { return __uint_as_float(static_cast<unsigned>(entry >> 32)); }

template <class T>
__device__ __forceinline__ T exchanged(T mine, unsigned step, bool keeps_larger) {
  const T other = __shfl_xor_sync(0xffffffffu, mine, step);
  return (other > mine) == keeps_larger ? other : mine;
}
// A warp's 32 values from the best down (bitonic).
template <class T>
__device__ __forceinline__ T sorted(T mine) {
  const unsigned lane = threadIdx.x % 32;
#pragma unroll
  for (unsigned size = 2; size <= 32; size *= 2)
#pragma unroll
    for (unsigned step = size / 2; step > 0; step /= 2)
      mine = exchanged(mine, step, ((lane & step) == 0) == ((lane & size) == 0 || size == 32));
  return mine;
}
// The best 32 of two sorted lots, sorted.
__device__ __forceinline__ Entry merged(Entry a, Entry b) {
  const Entry other = __shfl_sync(0xffffffffu, b, 31 - threadIdx.x % 32);
  Entry mine = a > other ? a : other;
#pragma unroll
  for (unsigned step = 16; step > 0; step /= 2) mine = exchanged(mine, step, (threadIdx.x & step) == 0);
  return mine;
}

struct ChooseParams {
  RankArgs a;
  const float* scores;
  std::int64_t pitch;
};

// Blocks [begin, end) of a list are chosen by score, those before and behind are chosen anyway.
struct Contest {
  int begin, end, eligible;
  __device__ __forceinline__ Contest(const BlockRules& r, int blocks)
      : begin(min(r.n_init, blocks)), end(max(begin, blocks - r.n_local)), eligible(blocks) {}
  __device__ __forceinline__ int forced() const { return begin + eligible - end; }
  __device__ __forceinline__ int forced_block(int i) const { return i < begin ? i : end + i - begin; }
};

// The lane's four of 128 blocks' scores from `first`, a multiple of 128; -1: not in the contest.
__device__ __forceinline__ float4 scores_at(const float* scores, const Contest& c, int first) {
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

// The contest's best `wanted` (1 .. 32), lane c the c-th (0 behind them). The wanted-th best of 32 lanes' maxima is a
// bound below which nothing is chosen. `kept`: the warp's, [most_kept].
__device__ __forceinline__ Entry winners(const float* scores, const Contest& c, int wanted, Entry* kept) {
  const int lane = threadIdx.x % 32;
  float top = -1.0f;
#pragma unroll 4
  for (int first = 0; first < c.end; first += 128) {
    const float4 x = scores_at(scores, c, first);
    top = fmaxf(top, fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)));
  }
  // Where fewer lanes than that have a block, everything passes.
  float bound = fmaxf(__shfl_sync(0xffffffffu, sorted(top), wanted - 1), 0.0f);
  int count = 0;
#pragma unroll 2
  for (int first = 0; first < c.end; first += 128) {
    const float4 x = scores_at(scores, c, first);
    const float mine[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned mask = __ballot_sync(0xffffffffu, mine[i] >= bound);
      if (mask == 0) continue;
      if (mine[i] >= bound) kept[count + __popc(mask & ((1u << lane) - 1))] = entry_of(mine[i], first + 4 * lane + i);
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

// The list's best n, lane c the c-th (0 behind them): the forced ones by rising index, then the winners.
__device__ __forceinline__ Entry chosen_of(const BlockRules& r, const float* scores, int eligible, Entry* kept) {
  const int lane = threadIdx.x % 32;
  const Contest contest(r, eligible);
  const int forced = contest.forced(), wanted = r.n_sel - forced;
  Entry best = 0;
  if (wanted > 0 && contest.end > contest.begin) best = winners(scores, contest, wanted, kept);
  best = __shfl_sync(0xffffffffu, best, lane - forced);
  return lane < forced ? entry_of(INFINITY, contest.forced_block(lane)) : best;
}

__global__ void __launch_bounds__(32 * choose_warps) choose_kernel(const __grid_constant__ ChooseParams p) {
  __shared__ Entry kept[choose_warps][most_kept];
  griddep_wait();
  const LayerShape& s = p.a.shape;
  const BlockRules& r = s.rules;
  const int lane = threadIdx.x % 32, n = r.n_sel;
  const unsigned list = blockIdx.x * choose_warps + threadIdx.x / 32;  // their scores are in memory: below 2^31
  if (list >= p.a.tile.rows() * s.groups) return;
  const unsigned row = list / static_cast<unsigned>(s.groups);
  const std::int64_t t = *p.a.tile.first_position + row % static_cast<unsigned>(p.a.tile.tokens);
  const int eligible = static_cast<int>(eligible_blocks(r, t));
  const float* scores = p.scores + list * p.pitch;
  const Entry mine = chosen_of(r, scores, eligible, kept[threadIdx.x / 32]);
  const int block = mine == 0 ? -1 : block_of(mine);
  if (p.a.candidates && lane < n)
    p.a.candidates[std::int64_t{list} * n + lane] = block < 0 ? Candidate{} : Candidate{score_of(mine), block};
  if (p.a.selected) {
    int place = 0;
    for (int c = 0; c < n; ++c) {
      const int other = __shfl_sync(0xffffffffu, block, c);
      place += other >= 0 && other < block;
    }
    if (lane < n) p.a.selected[std::int64_t{list} * n + (block < 0 ? lane : place)] = block;
  }
  if (!p.a.p_slc) return;
  for (std::int64_t j = lane; j < p.a.p_slc_blocks; j += 32)
    p.a.p_slc[list * p.a.p_slc_blocks + j] = j < eligible ? scores[j] : 0.0f;
}

}  // namespace nsa::gpu::scored
