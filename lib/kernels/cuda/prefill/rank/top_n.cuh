#pragma once
// Prefill's top-n selection (prefill/rank/rank.cu): a warp a (row, group) finds the n blocks of the highest scores.
//
// The n-th highest of the 32 lanes' maxima (of their best two each, where n is above 32) is a lower bound of the n-th
// highest score. Blocks that reach it, some 25 of a thousand, are sorted. `Slots`: 1 or 2, sorted entries that a lane
// holds; entry c is slot c / 32 of lane c % 32. Bytes: the block scores, 4 each, twice, the second time mostly from
// caches. Bound: these reads, at half the peak rate.

#include "kernels/cuda/attention/block_scores.cuh"

namespace nsa::gpu::block_scoring {

constexpr int top_n_warps = 8;
template <int Slots>
constexpr int max_candidates = 32 * Slots + 128;  // of a (row, group), in shared memory

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
template <class T>
__device__ __forceinline__ T merged(T a, T b) {
  const T other = __shfl_sync(0xffffffffu, b, 31 - threadIdx.x % 32);
  T mine = a > other ? a : other;
#pragma unroll
  for (unsigned step = 16; step > 0; step /= 2) mine = compare_exchange(mine, step, (threadIdx.x & step) == 0);
  return mine;
}
// The other 32, sorted.
template <class T>
__device__ __forceinline__ T rest_of_merged(T a, T b) {
  const T other = __shfl_sync(0xffffffffu, b, 31 - threadIdx.x % 32);
  T mine = a > other ? other : a;
#pragma unroll
  for (unsigned step = 16; step > 0; step /= 2) mine = compare_exchange(mine, step, (threadIdx.x & step) == 0);
  return mine;
}
// Keeps the best of the sorted entries and 32 more, sorted ones.
template <class T, int Slots>
__device__ __forceinline__ void merge_into(T (&best)[Slots], T more) {
#pragma unroll
  for (int i = 0; i < Slots; ++i) {
    const T rest = i + 1 < Slots ? rest_of_merged(best[i], more) : T{};
    best[i] = merged(best[i], more);
    more = rest;
  }
}
// Entry `index` of the sorted ones, any index in any lane.
template <class T, int Slots>
__device__ __forceinline__ T entry_at(const T (&sorted_entries)[Slots], int index) {
  T mine = __shfl_sync(0xffffffffu, sorted_entries[0], index);
  if constexpr (Slots == 2) {
    const T second = __shfl_sync(0xffffffffu, sorted_entries[1], index);
    if (index >= 32) mine = second;
  }
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

// The best of a warp's `count` entries.
template <int Slots>
__device__ __forceinline__ void best_of(const Entry* kept, int count, Entry (&best)[Slots]) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
  best[0] = sorted(lane < count ? kept[lane] : 0);
#pragma unroll
  for (int i = 1; i < Slots; ++i) best[i] = 0;
  for (int i = 32; i < count; i += 32) merge_into(best, sorted(lane + i < count ? kept[lane + i] : 0));
  __syncwarp();
}

// The best `wanted` (1 .. 32 Slots) of the candidates, and 0 after them. `kept`: the warp's, [max_candidates].
template <int Slots>
__device__ __forceinline__ void top_by_score(const float* scores, const Candidates& c, int wanted, Entry* kept,
                                             Entry (&best)[Slots]) {
  const int lane = threadIdx.x % 32;
  float lane_best[Slots];  // the lane's highest scores, falling
#pragma unroll
  for (float& x : lane_best) x = -1.0f;
#pragma unroll 4
  for (int first = 0; first < c.end; first += 128) {
    const float4 x = scores_at(scores, c, first);
    if constexpr (Slots == 1) {
      lane_best[0] = fmaxf(lane_best[0], fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)));
    } else {
      const float mine[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (const float score : mine) {
        lane_best[1] = fmaxf(lane_best[1], fminf(lane_best[0], score));
        lane_best[0] = fmaxf(lane_best[0], score);
      }
    }
  }
  float highest[Slots] = {sorted(lane_best[0])};
  if constexpr (Slots == 2) highest[1] = -1.0f, merge_into(highest, sorted(lane_best[1]));
  // If fewer than `wanted` of them are blocks, the bound is 0 and all blocks reach it.
  float bound = fmaxf(entry_at(highest, wanted - 1), 0.0f);
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
    if (count <= 32 * Slots) continue;
    best_of(kept, count, best);
#pragma unroll
    for (int i = 0; i < Slots; ++i)
      if (32 * i + lane < wanted) kept[32 * i + lane] = best[i];
    count = wanted;
    bound = fmaxf(bound, score_of(entry_at(best, wanted - 1)));
    __syncwarp();
  }
  best_of(kept, count, best);
#pragma unroll
  for (int i = 0; i < Slots; ++i)
    if (32 * i + lane >= wanted) best[i] = 0;
}

// The n selected blocks, and 0 after them: forced ones by rising index, then by score.
template <int Slots>
__device__ __forceinline__ void select_blocks(const BlockRules& r, const float* scores, int eligible, Entry* kept,
                                              Entry (&selected)[Slots]) {
  const int lane = threadIdx.x % 32;
  const Candidates candidates(r, eligible);
  const int forced = candidates.forced(), wanted = r.n_sel - forced;
  Entry best[Slots] = {};
  if (wanted > 0 && candidates.end > candidates.begin) top_by_score(scores, candidates, wanted, kept, best);
#pragma unroll
  for (int i = 0; i < Slots; ++i) {
    const int c = 32 * i + lane;
    selected[i] = entry_at(best, c - forced);
    if (c < forced) selected[i] = score_entry(INFINITY, candidates.forced_block(c));
  }
}

template <int Slots>
__global__ void __launch_bounds__(32 * top_n_warps) top_n_kernel(const __grid_constant__ TopNParams p) {
  __shared__ Entry kept[top_n_warps][max_candidates<Slots>];
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
  Entry mine[Slots];
  select_blocks(r, scores, eligible, kept[threadIdx.x / 32], mine);
  int block[Slots];
#pragma unroll
  for (int i = 0; i < Slots; ++i) {
    block[i] = mine[i] == 0 ? -1 : block_of(mine[i]);
    if (p.a.candidates && 32 * i + lane < n)
      p.a.candidates[std::int64_t{row_group} * n + 32 * i + lane] =
          block[i] < 0 ? Candidate{} : Candidate{score_of(mine[i]), block[i]};
  }
  if (p.a.selected) {
    int smaller[Slots] = {};  // selected blocks of lower index
    for (int c = 0; c < n; ++c) {
      const int other = entry_at(block, c);
#pragma unroll
      for (int i = 0; i < Slots; ++i) smaller[i] += other >= 0 && other < block[i];
    }
#pragma unroll
    for (int i = 0; i < Slots; ++i)
      if (32 * i + lane < n)
        p.a.selected[std::int64_t{row_group} * n + (block[i] < 0 ? 32 * i + lane : smaller[i])] = block[i];
  }
  if (!p.a.p_slc) return;
  for (std::int64_t j = lane; j < p.a.p_slc_blocks; j += 32)
    p.a.p_slc[row_group * p.a.p_slc_blocks + j] = j < eligible ? scores[j] : 0.0f;
}

}  // namespace nsa::gpu::block_scoring
