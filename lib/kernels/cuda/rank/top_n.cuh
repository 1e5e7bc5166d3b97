#pragma once
// Top-n selection by a CTA of the rank kernel: the n-th largest of many keys by radix, or by counting larger entries.

#include "kernels/cuda/attention/block_scores.cuh"

namespace nsa::gpu {

struct Threshold {
  unsigned key;        // the n-th largest
  std::int64_t above;  // blocks with a larger key
};

// The n-th largest of `blocks` keys, 8 bits a pass.
__device__ inline Threshold nth_largest(std::int64_t blocks, std::int64_t n, unsigned* histogram,
                                        const unsigned* keys) {
  __shared__ unsigned chosen;
  __shared__ unsigned above;
  unsigned prefix = 0, mask = 0;
  std::int64_t wanted = n;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int b = threadIdx.x; b < 256; b += blockDim.x) histogram[b] = 0;
    __syncthreads();
    for (std::int64_t u = threadIdx.x; u < blocks; u += blockDim.x) {
      const unsigned k = keys[u];
      if ((k & mask) == prefix) atomicAdd(&histogram[k >> shift & 255u], 1u);
    }
    __syncthreads();
    if (threadIdx.x < 32) {  // lane l holds digits 255-8l .. 248-8l, largest first
      unsigned counts[8], sum = 0;
      for (int d = 0; d < 8; ++d) sum += counts[d] = histogram[255 - threadIdx.x * 8 - d];
      unsigned inclusive = sum;
      for (int distance = 1; distance < 32; distance *= 2) {
        const unsigned other = __shfl_up_sync(0xffffffffu, inclusive, distance);
        if (static_cast<int>(threadIdx.x) >= distance) inclusive += other;
      }
      unsigned exclusive = inclusive - sum;
      if (exclusive < wanted && inclusive >= wanted)
        for (int d = 0; d < 8; ++d) {
          if (exclusive + counts[d] >= wanted) {
            chosen = 255 - threadIdx.x * 8 - d;
            above = exclusive;
            break;
          }
          exclusive += counts[d];
        }
    }
    __syncthreads();
    prefix |= chosen << shift;
    mask |= 255u << shift;
    wanted -= above;
    __syncthreads();
  }
  return {prefix, n - wanted};
}

// Collects the blocks above the threshold and the first of those equal to it, by rising index.
__device__ inline void collect(std::int64_t blocks, std::int64_t n, Threshold threshold, const unsigned* keys,
                               int* chosen) {
  __shared__ int above_of[32], equal_of[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const std::int64_t equal_wanted = n - threshold.above;
  std::int64_t equal_seen = 0, taken = 0;
  for (std::int64_t u0 = 0; u0 < blocks && taken < n; u0 += blockDim.x) {
    const std::int64_t u = u0 + threadIdx.x;
    const unsigned k = u < blocks ? keys[u] : 0;
    const bool above = u < blocks && k > threshold.key, equal = u < blocks && k == threshold.key;
    const unsigned above_mask = __ballot_sync(0xffffffffu, above), equal_mask = __ballot_sync(0xffffffffu, equal);
    if (lane == 0) {
      above_of[warp] = __popc(above_mask);
      equal_of[warp] = __popc(equal_mask);
    }
    __syncthreads();
    std::int64_t above_before = 0, equal_before = equal_seen, above_all = 0, equal_all = 0;
    for (int w = 0; w < warps; ++w) {
      if (w < warp) above_before += above_of[w], equal_before += equal_of[w];
      above_all += above_of[w], equal_all += equal_of[w];
    }
    const unsigned below = (1u << lane) - 1;
    above_before += __popc(above_mask & below);
    equal_before += __popc(equal_mask & below);
    const std::int64_t equal_kept = (equal_before < equal_wanted ? equal_before : equal_wanted) -
                                    (equal_seen < equal_wanted ? equal_seen : equal_wanted);
    if (above || (equal && equal_before < equal_wanted))
      chosen[taken + above_before + equal_kept] = static_cast<int>(u);
    const std::int64_t now = equal_seen + equal_all;
    taken +=
        above_all + (now < equal_wanted ? now : equal_wanted) - (equal_seen < equal_wanted ? equal_seen : equal_wanted);
    equal_seen = now;
    __syncthreads();
  }
}

// Keeps the best n of every 32 entries, in place and packed. Returns how many remain. All threads.
__device__ inline int thin_out(Entry* entries, int count, int n) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int runs = (count + 31) / 32;
  for (int run0 = 0; run0 < runs; run0 += warps) {
    const int run = run0 + warp, at = run * 32 + lane;
    const Entry own = warp_sort_descending(at < count ? entries[at] : 0);
    __syncthreads();
    if (run < runs && lane < n) entries[run * n + lane] = own;
    __syncthreads();
  }
  return runs * n;
}

// Stores the sorted best n of `count` entries at `to`. All threads.
__device__ inline void best_of(const Entry* entries, int count, int n, Entry* to) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const Entry own = entries[i];
    int better = 0;
#pragma unroll 8
    for (int other = 0; other < count; ++other) better += entries[other] > own;
    if (own != 0 && better < n) to[better] = own;
  }
}

}  // namespace nsa::gpu
