#pragma once
// How blocks are scored and put into order, for rank as a stage and for the decode step in one kernel. Both take these
// sums in the same order with the same roundings, so that they choose the same blocks bit for bit.

#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu {

/// Adds a lane's (m, s) to a sum of lanes.
__device__ __forceinline__ void add_lane(SoftmaxState& total, float2 ms) {
  const float both = fmaxf(total.m, ms.x);
  total.s = __fmaf_rn(total.s, exp_shifted(total.m, both), __fmul_rn(ms.y, exp_shifted(ms.x, both)));
  total.m = both;
}

/// (m in powers of two, 1 / s) of N heads from their `lanes` (m, s), m natural: by a whole warp, in a fixed tree.
/// load(x, i): of lane x of the i-th of them.
template <int N, class Load>
__device__ __forceinline__ void normalisers_of(int lanes, Load load, float2 (&by)[N]) {
  SoftmaxState total[N];
  for (int x = threadIdx.x % 32; x < lanes; x += 32)
#pragma unroll
    for (int i = 0; i < N; ++i) add_lane(total[i], load(x, i));
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float m = warp_max(total[i].m), sum = warp_sum(__fmul_rn(total[i].s, exp_shifted(total[i].m, m)));
    by[i] = make_float2(m * log2_e, sum > 0.0f ? 1.0f / sum : 0.0f);
  }
}

/// Adds p of one head to four tokens' sums; heads come by rising index.
__device__ __forceinline__ void add_probabilities(float4& sum, float4 scores, float2 normaliser) {
  sum.x = __fmaf_rn(exp2_fast(scores.x - normaliser.x), normaliser.y, sum.x);
  sum.y = __fmaf_rn(exp2_fast(scores.y - normaliser.x), normaliser.y, sum.y);
  sum.z = __fmaf_rn(exp2_fast(scores.z - normaliser.x), normaliser.y, sum.z);
  sum.w = __fmaf_rn(exp2_fast(scores.w - normaliser.x), normaliser.y, sum.w);
}

/// The tokens' probabilities a block overlaps, each weighed with its overlap, added up by rising token.
__device__ __forceinline__ float block_score(const float* terms, const float* overlaps, int tokens) {
  float sum = 0.0f;
  for (int k = 0; k < tokens; ++k) sum = __fmaf_rn(terms[k], overlaps[k], sum);
  return sum;
}

/// Order of choice as an integer: forced blocks first, then by score (never negative, so its bits are ordered).
__device__ __forceinline__ unsigned key_of(bool forced, float score) {
  return forced ? 0x7F800000u : __float_as_uint(score);
}

/// A key and, below it, the block it belongs to, turned round: the larger the better. 0: none.
using Entry = std::uint64_t;
__device__ __forceinline__ Entry entry_of(unsigned key, int block) {
  return static_cast<Entry>(key) << 32 | static_cast<unsigned>(~block);
}
__device__ __forceinline__ int block_of(Entry entry) { return static_cast<int>(~static_cast<unsigned>(entry)); }

/// A warp's 32 entries from the best down (bitonic).
__device__ __forceinline__ Entry warp_sorted(Entry mine) {
  const unsigned lane = threadIdx.x % 32;
#pragma unroll
  for (unsigned size = 2; size <= 32; size *= 2)
#pragma unroll
    for (unsigned step = size / 2; step > 0; step /= 2) {
      const Entry other = __shfl_xor_sync(0xffffffffu, mine, step);
      const bool keeps_larger = ((lane & step) == 0) == ((lane & size) == 0 || size == 32);
      mine = (other > mine) == keeps_larger ? other : mine;
    }
  return mine;
}

constexpr int most_chosen = 16;  ///< blocks a list may choose where lists are kept by warps

/// The lists of 16 that a warp has, one in every half, from a run that rises and falls to one that falls.
__device__ __forceinline__ Entry fallen(Entry mine) {
  const unsigned lane = threadIdx.x % 32;
#pragma unroll
  for (unsigned step = 8; step > 0; step /= 2) {
    const Entry other = __shfl_xor_sync(0xffffffffu, mine, step);
    mine = (other > mine) == ((lane & step) == 0) ? other : mine;
  }
  return mine;
}
/// The best 16 of a and b, half by half; each falls.
__device__ __forceinline__ Entry better_of(Entry a, Entry b) {
  const Entry turned = __shfl_xor_sync(0xffffffffu, b, 15);
  return fallen(a > turned ? a : turned);
}
/// The best 16 of up to Most lists of 16 in shared memory, `apart` entries from one to the next, in both halves. All
/// lanes.
template <int Most>
__device__ __forceinline__ Entry best_of_lists(const Entry* lists, int count, int apart = most_chosen) {
  static_assert(Most == 4 || Most == 8);
  const int half = threadIdx.x % 32 / 16, lane = threadIdx.x % 16;
  const auto pair = [&](int first) {
    const int a = first + half * 2, b = a + 1;
    const Entry x = a < count ? lists[a * apart + lane] : 0, y = b < count ? lists[b * apart + 15 - lane] : 0;
    return fallen(x > y ? x : y);
  };
  Entry best = pair(0);
  if (Most > 4 && count > 4) best = better_of(best, pair(4));
  const Entry other = __shfl_xor_sync(0xffffffffu, best, 31);
  return fallen(best > other ? best : other);
}

}  // namespace nsa::gpu
