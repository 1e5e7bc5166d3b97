#pragma once
// Scores and order of selection blocks, for the rank stage and for the fused decode step. Both form these sums in the
// same order with the same roundings, so they select the same blocks bit for bit.

#include "kernels/cuda/attention/online_softmax.cuh"
#include "kernels/cuda/sizes/work.hpp"

namespace nsa::gpu {

/// Softmax normalisers of N heads, (m * log2(e), 1 / s), from the (m, s) of their `buckets` LSE buckets, m natural. A
/// whole warp reduces in a fixed tree. load(x, i) returns bucket x of head i.
template <int N, class Load>
__device__ __forceinline__ void softmax_normalisers(int buckets, Load load, float2 (&normaliser)[N]) {
  SoftmaxState<Natural> total[N];
  for (int x = threadIdx.x % 32; x < buckets; x += 32)
#pragma unroll
    for (int i = 0; i < N; ++i) merge_exact_into(total[i], load(x, i));
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float m = warp_max(total[i].m), sum = warp_sum(__fmul_rn(total[i].s, exp_shifted(total[i].m, m)));
    normaliser[i] = make_float2(m * log2_e, sum > 0.0f ? 1.0f / sum : 0.0f);
  }
}

/// Adds P of one head to the sums of four tokens. Callers pass heads in rising order.
__device__ __forceinline__ void add_probabilities(float4& sum, float4 scores, float2 normaliser) {
  sum.x = __fmaf_rn(exp2_fast(scores.x - normaliser.x), normaliser.y, sum.x);
  sum.y = __fmaf_rn(exp2_fast(scores.y - normaliser.x), normaliser.y, sum.y);
  sum.z = __fmaf_rn(exp2_fast(scores.z - normaliser.x), normaliser.y, sum.z);
  sum.w = __fmaf_rn(exp2_fast(scores.w - normaliser.x), normaliser.y, sum.w);
}

/// Score of a block: the probabilities of its tokens times their overlaps, summed by rising token.
__device__ __forceinline__ float block_score(const float* terms, const float* overlaps, int tokens) {
  float sum = 0.0f;
  for (int k = 0; k < tokens; ++k) sum = __fmaf_rn(terms[k], overlaps[k], sum);
  return sum;
}

/// Sort key of a block: forced blocks first, then by score. Scores are never negative, so their bits are ordered.
__device__ __forceinline__ unsigned key_of(bool forced, float score) {
  return forced ? 0x7F800000u : __float_as_uint(score);
}

/// Key in the upper 32 bits, complement of the block in the lower ones: larger is better, ties go to the lower block.
/// 0: no block.
using Entry = std::uint64_t;
__device__ __forceinline__ Entry entry_of(unsigned key, int block) {
  return static_cast<Entry>(key) << 32 | static_cast<unsigned>(~block);
}
__device__ __forceinline__ int block_of(Entry entry) { return static_cast<int>(~static_cast<unsigned>(entry)); }

/// Sorts the 32 entries of a warp, best first (bitonic sort).
__device__ __forceinline__ Entry warp_sort_descending(Entry mine) {
  const unsigned lane = threadIdx.x % 32;
#pragma unroll
  for (unsigned size = 2; size <= 32; size *= 2)
#pragma unroll
    for (unsigned distance = size / 2; distance > 0; distance /= 2) {
      const Entry other = __shfl_xor_sync(0xffffffffu, mine, distance);
      const bool keeps_larger = ((lane & distance) == 0) == ((lane & size) == 0 || size == 32);
      mine = (other > mine) == keeps_larger ? other : mine;
    }
  return mine;
}

/// Bitonic merge of 16 entries in each half of a warp; the result descends.
__device__ __forceinline__ Entry bitonic_merge16(Entry mine) {
  const unsigned lane = threadIdx.x % 32;
#pragma unroll
  for (unsigned distance = 8; distance > 0; distance /= 2) {
    const Entry other = __shfl_xor_sync(0xffffffffu, mine, distance);
    mine = (other > mine) == ((lane & distance) == 0) ? other : mine;
  }
  return mine;
}
/// The best 16 of a and b in each half of a warp. a, b and the result descend.
__device__ __forceinline__ Entry top16_of_two(Entry a, Entry b) {
  const Entry reversed = __shfl_xor_sync(0xffffffffu, b, 15);
  return bitonic_merge16(a > reversed ? a : reversed);
}
/// The best 16 of `best`, which descends, and 32 entries in any order, one a lane; in the first half of the warp. Few
/// of them are better than the last of `best` where many have been seen: each is inserted.
__device__ __forceinline__ Entry top16_with(Entry best, Entry fresh) {
  constexpr int few = 12;
  const Entry last = __shfl_sync(0xffffffffu, best, 15);
  unsigned better = __ballot_sync(0xffffffffu, fresh > last);
  if (__popc(better) > few) return top16_of_two(best, warp_sort_descending(fresh));
#pragma unroll 1
  for (; better != 0; better &= better - 1) {
    const Entry x = __shfl_sync(0xffffffffu, fresh, __ffs(static_cast<int>(better)) - 1),
                before = __shfl_up_sync(0xffffffffu, best, 1);
    best = best > x ? best : threadIdx.x % 32 == 0 || before > x ? x : before;
  }
  return best;
}
/// The best 32 of a and b, one a lane. a, b and the result descend.
__device__ __forceinline__ Entry top32_of_two(Entry a, Entry b) {
  const unsigned lane = threadIdx.x % 32;
  const Entry reversed = __shfl_xor_sync(0xffffffffu, b, 31);
  Entry mine = a > reversed ? a : reversed;
#pragma unroll
  for (unsigned distance = 16; distance > 0; distance /= 2) {
    const Entry other = __shfl_xor_sync(0xffffffffu, mine, distance);
    mine = (other > mine) == ((lane & distance) == 0) ? other : mine;
  }
  return mine;
}
/// The best 32 of `count` sorted lists of 32 in shared memory, `stride` entries apart. All lanes must call it.
__device__ __forceinline__ Entry top32_of_lists(const Entry* lists, int count, int stride = 32) {
  const int lane = threadIdx.x % 32;
  Entry best = count > 0 ? lists[lane] : 0;
#pragma unroll 1
  for (int i = 1; i < count; ++i) best = top32_of_two(best, lists[i * stride + lane]);
  return best;
}
/// The best 16 of `count` <= MaxLists sorted lists of 16 in shared memory, `stride` entries apart. Both halves of the
/// warp get them. All lanes must call it.
template <int MaxLists>
__device__ __forceinline__ Entry top16_of_lists(const Entry* lists, int count, int stride = warp_top_n) {
  static_assert(MaxLists == 4 || MaxLists == 8 || MaxLists == 12);
  const int half = threadIdx.x % 32 / 16, lane = threadIdx.x % 16;
  const auto pair = [&](int first) {
    const int a = first + half * 2, b = a + 1;
    const Entry x = a < count ? lists[a * stride + lane] : 0, y = b < count ? lists[b * stride + 15 - lane] : 0;
    return bitonic_merge16(x > y ? x : y);
  };
  Entry best = pair(0);
  if (MaxLists > 4 && count > 4) best = top16_of_two(best, pair(4));
  if (MaxLists > 8 && count > 8) best = top16_of_two(best, pair(8));
  const Entry other = __shfl_xor_sync(0xffffffffu, best, 31);
  return bitonic_merge16(best > other ? best : other);
}

}  // namespace nsa::gpu
