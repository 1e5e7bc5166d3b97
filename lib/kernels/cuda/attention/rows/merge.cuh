#pragma once
// Merges of the row-wise attention kernel (attention/rows/cta.cuh): warps of a CTA, LSE buckets, splits of a work item.

#include "kernels/cuda/attention/rows/cta.cuh"

namespace nsa::gpu {

// Partial of the CTA: every warp rescales its o to the common maximum, then they are summed. All threads.
template <class T, int DK, int DV, Branch B>
__device__ __forceinline__ void RowsCta<T, DK, DV, B>::merge_warps(float* warp_o, float* partial) const {
  float2* warp_ms = reinterpret_cast<float2*>(warp_o + rows_warps * heads_per_tile * DV);
  if (warp < rows_warps && quad == 0) {
    warp_ms[warp * heads_per_tile + g] = make_float2(total[0].m, total[0].s);
    warp_ms[warp * heads_per_tile + g + 8] = make_float2(total[1].m, total[1].s);
  }
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (warp >= rows_warps) break;
    const int head = g + half * 8;
    float m = neg_inf;
#pragma unroll
    for (int w = 0; w < rows_warps; ++w) m = fmaxf(m, warp_ms[w * heads_per_tile + head].x);
    const float scale = exp2_fast(total[half].m - m);
    float* to = warp_o + (warp * heads_per_tile + head) * DV + quad * 16;
#pragma unroll
    for (int column_block = 0; column_block < DV / 64; ++column_block)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd)
#pragma unroll
        for (int j = 0; j < 8; j += 4) {
          const auto& x = o[column_block];
          const int i = half * 2 + odd;
          *reinterpret_cast<float4*>(to + column_block * 64 + odd * 8 + j) =
              make_float4(scale * x[j][i], scale * x[j + 1][i], scale * x[j + 2][i], scale * x[j + 3][i]);
        }
  }
  __syncthreads();
  for (int item = threadIdx.x; item < heads_per_tile * DV / 4; item += blockDim.x) {
    float4 sum = {};
#pragma unroll
    for (int w = 0; w < rows_warps; ++w) {
      const float4 x = reinterpret_cast<const float4*>(warp_o)[w * heads_per_tile * DV / 4 + item];
      sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    reinterpret_cast<float4*>(partial)[item] = sum;
  }
  if (threadIdx.x < heads_per_tile) {
    SoftmaxState<Exp2> sum;
#pragma unroll
    for (int w = 0; w < rows_warps; ++w) {
      const float2 other = warp_ms[w * heads_per_tile + threadIdx.x];
      sum = merge_exact(sum, {other.x, other.y});
    }
    reinterpret_cast<float2*>(partial + heads_per_tile * DV)[threadIdx.x] = make_float2(sum.m, sum.s);
  }
}

// Merges the (m, sum) of the warps to segments, and those to buckets by rising segment: this rank's u-th segment
// belongs to its bucket u % local buckets.
template <class T, int DK, int DV, Branch B>
__device__ __forceinline__ void RowsCta<T, DK, DV, B>::merge_buckets(int first, int stride) const {
  const int local_buckets = s.lse.buckets / shards_of(map);
  const std::int64_t row_heads = p.a.tile.rows() * s.heads();
  const float2* segment_lse = p.segment_lse + work_item * p.max_spans * rows_warps * heads_per_tile;
  for (int item = first; item < local_buckets * heads_per_tile; item += stride) {
    const int slot = item / heads_per_tile, head = item % heads_per_tile;
    if (head >= heads) continue;
    SoftmaxState<Exp2> sum;
#pragma unroll 4
    for (int u = slot; u < spans; u += local_buckets) {
      SoftmaxState<Exp2> segment_sum;
#pragma unroll
      for (int w = 0; w < rows_warps; ++w) {
        const float2 other = __ldcg(&segment_lse[(std::int64_t{u} * rows_warps + w) * heads_per_tile + head]);
        segment_sum = merge_exact(segment_sum, {other.x, other.y});
      }
      sum = merge_exact(sum, segment_sum);
    }
    reinterpret_cast<float2*>(p.a.lse)[slot * row_heads + first_head + head] = to_natural_log(sum);
  }
}

// Merges the partials of the splits, by rising split, into the partial of the row.
template <class T, int DK, int DV, Branch B>
template <class PartialOf, class Load>
__device__ __forceinline__ void RowsCta<T, DK, DV, B>::merge_splits(int first, int stride, PartialOf partial_of,
                                                                    Load load) const {
  for (int item = first; item < heads * DV / 4; item += stride) {
    const int head = item / (DV / 4);
    float4 x[8];
    float2 ms[8];
    SoftmaxState<Exp2> state;
    float4 merged_o = {};
    for (int i0 = 0; i0 < p.splits; i0 += 8) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i0 + i >= p.splits) break;
        const float* partial = partial_of(i0 + i);
        ms[i] = load(reinterpret_cast<const float2*>(partial + heads_per_tile * DV) + head);
        x[i] = load(reinterpret_cast<const float4*>(partial) + item);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i0 + i >= p.splits) break;
        merge_partial(state, merged_o, ms[i], x[i]);
      }
    }
    reinterpret_cast<float4*>(p.a.out.o + first_head * DV)[item] = merged_o;
    if (item % (DV / 4) == 0) reinterpret_cast<float2*>(p.a.out.ms)[first_head + head] = to_natural_log(state);
  }
}

}  // namespace nsa::gpu
