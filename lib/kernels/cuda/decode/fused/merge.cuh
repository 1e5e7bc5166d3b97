#pragma once
// The end of a decode step in one kernel: a CTA weighs its warps' o and adds them up by branch. One CTA alone has o
// then; else each CTA of the list merges a share of the columns, which the others send to its shared memory.

#include "kernels/cuda/decode/fused/rank.cuh"

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

  // (m, sum) of the CTA by branch and head; of every warp the weight of its o in place of its maximum. A thread a warp,
  // neighbours a head's.
  __device__ __forceinline__ void weigh_warps() const {
#pragma unroll 1
    for (int item0 = at.warp * 32; item0 < branches * E::heads * W; item0 += threads) {
      const int item = item0 + threadIdx.x % 32, w = item % W, to = item / W, b = to / E::heads;
      const Range warps = warps_of(b);
      const bool has = b < branches && w >= warps.from && w < warps.to;
      float2* of = warp_sums() + (w * 2 + (b != cmp)) * E::heads + to % E::heads;
      const Sum2 mine = has ? Sum2{of->x, of->y} : Sum2{};
      float m = mine.m;
#pragma unroll
      for (int step = W / 2; step > 0; step /= 2) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, step));
      const float weight = exp2_fast(mine.m - m);
      float sum = weight * mine.s;
#pragma unroll
      for (int step = W / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (has) of->x = weight;
      if (w == 0 && b < branches) cta_sums()[to] = make_float2(m, sum);
    }
  }

  // The CTA's warps added up. One CTA alone has o; else what it has is sent to where the list's parts meet.
  __device__ __forceinline__ void send(const E& of_cmp, const E& second, bool chooses) const {
    constexpr int quads = E::d_v / 4;
    __syncthreads();  // the rings are empty
    const Range ranges[branches] = {warps_of(cmp), warps_of(sel), warps_of(win)};
    const Range behind = chooses ? ranges[sel] : ranges[win];
    if (at.warp < ranges[cmp].to) put_warp(of_cmp, 0);
    if (at.warp >= behind.from && at.warp < behind.to) put_warp(second, 1);
    __syncthreads();
    weigh_warps();
    __syncthreads();
#pragma unroll 1
    for (int item = threadIdx.x; item < at.present * quads; item += threads) {
      const float4 parts[branches] = {sum_of_warps(cmp, ranges[cmp], item), sum_of_warps(sel, ranges[sel], item),
                                      sum_of_warps(win, ranges[win], item)};
      if (p.cluster > 1)
        send_item(item, parts);
      else
        put_item(item, parts);
    }
  }
  // Of branch b, 4 columns of a head; so many warps' at once as there mostly are.
  __device__ __forceinline__ float4 sum_of_warps(int b, Range warps, int item) const {
    constexpr int quads = E::d_v / 4;
    const int head = item / quads, slot = warps.from * 2 + (b != cmp);
    const float2* sums = warp_sums() + slot * E::heads + head;
    const float* o =
        reinterpret_cast<const float*>(shared) + slot * Layout::warp_floats + head * Layout::pitch + item % quads * 4;
    float4 sum = {};
    const auto add = [&](auto most) {
      float weight[most];
      float4 x[most];
#pragma unroll
      for (int i = 0; i < most; ++i)
        weight[i] = sums[i * 2 * E::heads].x, x[i] = *reinterpret_cast<const float4*>(o + i * 2 * Layout::warp_floats);
#pragma unroll
      for (int i = 0; i < most; ++i) {
        sum.x += weight[i] * x[i].x, sum.y += weight[i] * x[i].y;
        sum.z += weight[i] * x[i].z, sum.w += weight[i] * x[i].w;
      }
      sums += most * 2 * E::heads, o += most * 2 * Layout::warp_floats;
    };
    int left = warps.to - warps.from;
    if (b == cmp && left == W) {
      add(std::integral_constant<int, W>{});
      return sum;
    }
#pragma unroll 1
    for (; left >= 2; left -= 2) add(std::integral_constant<int, 2>{});
    if (left > 0) add(std::integral_constant<int, 1>{});
    return sum;
  }
  // To the CTA that merges the item.
  __device__ __forceinline__ void send_item(int item, const float4 (&parts)[branches]) const {
    constexpr int quads = E::d_v / 4;
    const int head = item / quads, owner = p.by_share(item), first = owner * p.share, local = item - first;
    float4* to_o = in_cta(parts_o(), owner) + at.cta * p.share + local;
#pragma unroll
    for (int b = 0; b < branches; ++b) to_o[b * p.cluster * p.share] = parts[b];
    if (local != 0 && item % quads != 0) return;
    float2* to_ms = in_cta(parts_ms(), owner) + at.cta * p.share_heads + head - first / quads;
#pragma unroll
    for (int b = 0; b < branches; ++b) to_ms[b * p.cluster * p.share_heads] = cta_sums()[b * E::heads + head];
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
