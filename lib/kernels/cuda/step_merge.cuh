#pragma once
// The end of a decode step in one kernel: a CTA weighs its warps' o and adds them up by branch. One CTA alone has o
// then; else each CTA of the list merges a share of the columns, which the others send to its shared memory.

#include "kernels/cuda/step_rank.cuh"

namespace nsa::gpu {

template <class E, int W>
struct StepMerge {
  using T = typename E::Type;
  using Layout = StepLayout<E, W>;
  static constexpr int threads = 32 * W;
  const StepParams& p;
  const StepPlace& at;
  char* shared;
  int cmp_tiles, sel_tiles, win_tiles;  // of the list

  __device__ __forceinline__ void put_warp(const E& e, int which) const {
    auto* o = reinterpret_cast<float*>(shared) + (at.warp * 2 + which) * Layout::warp_floats;
    auto* sums = reinterpret_cast<float2*>(shared + Layout::sums) + (at.warp * 2 + which) * E::heads;
    e.put_values(o, [](int, float) { return 1.0f; });
    e.put_total(sums);
  }

  // Warps of this CTA before the x-th of the cluster's.
  __device__ __forceinline__ int warps_before(int x) const {
    return min(W, p.by_cluster(max(0, x - at.cta + p.cluster - 1)));
  }

  struct Part {
    float4 o = {};
    Sum2 total;
  };
  // The sum of `count` parts. ms_of and o_of: of the i-th.
  template <class MsOf, class OOf>
  static __device__ __forceinline__ Part sum_of(int count, MsOf ms_of, OOf o_of) {
    Part sum;
#pragma unroll 4
    for (int i = 0; i < count; ++i) sum.total.m = fmaxf(sum.total.m, ms_of(i).x);
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      const float2 ms = ms_of(i);
      const float4 x = o_of(i);
      const float weight = exp2_fast(ms.x - sum.total.m);
      sum.total.s += weight * ms.y;
      sum.o.x += weight * x.x, sum.o.y += weight * x.y, sum.o.z += weight * x.z, sum.o.w += weight * x.w;
    }
    return sum;
  }

  // `parts` of every CTA: o [branch][cta][items of that CTA], then (m, sum) [branch][cta][its heads].
  __device__ __forceinline__ float4* parts_o() const { return reinterpret_cast<float4*>(shared + Layout::parts); }
  __device__ __forceinline__ float2* parts_ms() const {
    return reinterpret_cast<float2*>(parts_o() + branches * p.cluster * p.share);
  }

  // The warps whose second course is `b`, or whose first is cmp: [from, to) of this CTA.
  struct Range {
    int from, to;
  };
  __device__ __forceinline__ Range warps_of(int b) const {
    const int sel_end = at.warps - p.win_warps;
    if (b == cmp) return {0, p.scores_only ? 0 : warps_before(cmp_tiles)};
    if (b == sel) return {warps_before(sel_end - min(sel_end, sel_tiles)), warps_before(sel_end)};
    return {warps_before(at.warps - min(p.win_warps, win_tiles)), W};
  }
  __device__ __forceinline__ float2* warp_sums() const { return reinterpret_cast<float2*>(shared + Layout::sums); }
  __device__ __forceinline__ float2* cta_sums() const { return reinterpret_cast<float2*>(shared + Layout::sums_end); }

  // (m, sum) of the CTA by branch and head; of every warp the weight of its o in place of its maximum.
  __device__ __forceinline__ void weigh_warps() const {
    if (static_cast<int>(threadIdx.x) >= branches * E::heads) return;
    const int b = threadIdx.x / E::heads, head = threadIdx.x % E::heads;
    const Range warps = warps_of(b);
    float2* sums = warp_sums() + (b != cmp) * E::heads + head;
    Sum2 total;
#pragma unroll 1
    for (int w = warps.from; w < warps.to; ++w) total.m = fmaxf(total.m, sums[w * 2 * E::heads].x);
#pragma unroll 1
    for (int w = warps.from; w < warps.to; ++w) {
      float2& of = sums[w * 2 * E::heads];
      const float weight = exp2_fast(of.x - total.m);
      total.s += weight * of.y;
      of.x = weight;
    }
    cta_sums()[threadIdx.x] = make_float2(total.m, total.s);
  }

  // The CTA's warps added up. One CTA alone has o; else what it has is sent to where the list's parts meet.
  __device__ __forceinline__ void send(const E& of_cmp, const E& second) const {
    constexpr int quads = E::d_v / 4;
    __syncthreads();  // the rings are empty
    put_warp(of_cmp, 0);
    put_warp(second, 1);
    __syncthreads();
    weigh_warps();
    __syncthreads();
    const Range ranges[branches] = {warps_of(cmp), warps_of(sel), warps_of(win)};
#pragma unroll 1
    for (int item = threadIdx.x; item < at.present * quads; item += threads) {
      const int head = item / quads;
      const auto* o = reinterpret_cast<const float*>(shared) + head * Layout::pitch + item % quads * 4;
      float4 parts[branches];
#pragma unroll
      for (int b = 0; b < branches; ++b) {
        float4 sum = {};
#pragma unroll 2
        for (int w = ranges[b].from; w < ranges[b].to; ++w) {
          const int slot = w * 2 + (b != cmp);
          const float weight = warp_sums()[slot * E::heads + head].x;
          const float4 x = *reinterpret_cast<const float4*>(o + slot * Layout::warp_floats);
          sum.x += weight * x.x, sum.y += weight * x.y, sum.z += weight * x.z, sum.w += weight * x.w;
        }
        parts[b] = sum;
      }
      if (p.cluster == 1)
        put_item(item, parts);
      else
        send_item(item, parts);
    }
  }
  // To the CTA that merges the item.
  __device__ __forceinline__ void send_item(int item, const float4 (&parts)[branches]) const {
    constexpr int quads = E::d_v / 4;
    const int head = item / quads, owner = p.by_share(item), first = owner * p.share, local = item - first;
    float4* to_o = in_cta(parts_o(), owner) + at.cta * p.share + local;
    float2* to_ms = in_cta(parts_ms(), owner) + at.cta * p.share_heads + head - first / quads;
#pragma unroll
    for (int b = 0; b < branches; ++b) {
      to_o[b * p.cluster * p.share] = parts[b];
      if (local == 0 || item % quads == 0) to_ms[b * p.cluster * p.share_heads] = cta_sums()[b * E::heads + head];
    }
  }
  __device__ __forceinline__ void put_item(int item, const float4 (&parts)[branches]) const {
    constexpr int quads = E::d_v / 4;
    float4 sum = {};
#pragma unroll
    for (int b = 0; b < branches; ++b) {
      if (p.leave_out[b]) continue;
      const float s = cta_sums()[b * E::heads + item / quads].y, by = s > 0.0f ? 1.0f / s : 0.0f, gate = gates()[b];
      const float4 value = {parts[b].x * by, parts[b].y * by, parts[b].z * by, parts[b].w * by};
      if (p.o_branch[b]) reinterpret_cast<float4*>(p.o_branch[b])[at.head0 * quads + item] = value;
      sum.x += gate * value.x, sum.y += gate * value.y, sum.z += gate * value.z, sum.w += gate * value.w;
    }
    put_quad(item, sum);
  }
  __device__ __forceinline__ void put_quad(int item, float4 x) const {
    T* to = static_cast<T*>(p.o) + (std::int64_t{at.head0} * (E::d_v / 4) + item) * 4;
    store(to, x.x), store(to + 1, x.y), store(to + 2, x.z), store(to + 3, x.w);
  }
  __device__ __forceinline__ float* gates() const { return reinterpret_cast<float*>(shared + Layout::gates); }

  // The list's parts of this CTA's columns to o. Four threads an item, a branch each.
  __device__ __forceinline__ void merge() const {
    constexpr int quads = E::d_v / 4;
    const int first = at.cta * p.share, b = threadIdx.x % 4;
#pragma unroll 1
    for (int i0 = 0; i0 < p.share; i0 += threads / 4) {
      const int local = i0 + threadIdx.x / 4, item = first + local;
      const bool here = local < p.share && item < at.present * quads;
      float4 value = {};
      if (here && b < branches && !p.leave_out[b]) {
        const float4* o = parts_o() + b * p.cluster * p.share + local;
        const float2* ms = parts_ms() + b * p.cluster * p.share_heads + item / quads - first / quads;
        const Part part = sum_of(
            p.cluster, [&](int i) { return ms[i * p.share_heads]; }, [&](int i) { return o[i * p.share]; });
        const float inverse = part.total.s > 0.0f ? 1.0f / part.total.s : 0.0f;
        value = {part.o.x * inverse, part.o.y * inverse, part.o.z * inverse, part.o.w * inverse};
        if (p.o_branch[b]) reinterpret_cast<float4*>(p.o_branch[b])[at.head0 * quads + item] = value;
        const float gate = gates()[b];
        value.x *= gate, value.y *= gate, value.z *= gate, value.w *= gate;
      }
      const auto over_branches = [](float x) {
        const float second = __shfl_down_sync(0xffffffffu, x, 1), third = __shfl_down_sync(0xffffffffu, x, 2);
        return x + second + third;
      };
      value = {over_branches(value.x), over_branches(value.y), over_branches(value.z), over_branches(value.w)};
      if (!here || b != 0) continue;
      put_quad(item, value);
    }
  }
};

}  // namespace nsa::gpu
