#pragma once
// Epilogue of the fused decode step: a CTA rescales the o of its warps and sums them by branch. A single CTA then has
// o. Else each CTA of a head tile merges a slice of the columns, which the others send to its shared memory. o has one
// part of 16 heads and up to 128 columns, or two that are merged one after the other.

#include "kernels/cuda/decode/fused/select_blocks.cuh"

namespace nsa::gpu {

template <class WarpTile, int W, class Params = FusedDecodeParams>
struct FusedMerge {
  using T = typename WarpTile::Type;
  using SharedLayout = FusedSharedLayout<WarpTile, W>;
  static constexpr int threads = 32 * W;
  const Params& p;
  const typename Params::Coord& at;
  char* shared;
  int cmp_tiles, sel_tiles, win_tiles;  // of the work item
  static constexpr int column_quads = WarpTile::v_columns / 4, part_heads = WarpTile::part_heads;

  __device__ __forceinline__ int head_tiles() const { return WarpTile::tuned ? 1 : p.head_tiles; }
  __device__ __forceinline__ int ctas() const { return WarpTile::tuned ? p.cluster : p.tile_ctas; }
  // First head of a part in the head tile, its heads, its first column.
  template <int Part>
  static constexpr int first_head = Part / WarpTile::v_panels* part_heads;
  template <int Part>
  __device__ __forceinline__ int valid_heads() const {
    return WarpTile::parts == 1 ? at.valid_heads : min(part_heads, at.valid_heads - first_head<Part>);
  }
  // Whether the shape has the columns of an item of a part.
  template <int Part>
  __device__ __forceinline__ bool has_columns(int item) const {
    return WarpTile::tuned || Part % WarpTile::v_panels * WarpTile::v_columns + item % column_quads * 4 < p.shape.d_v;
  }
  // Index of four columns of an item of a part in o, in vectors of four.
  template <int Part>
  __device__ __forceinline__ std::int64_t quad_of(int item) const {
    if (WarpTile::tuned) return std::int64_t{at.first_head} * column_quads + item;
    return (std::int64_t{at.first_head} + first_head<Part> + item / column_quads) * (p.shape.d_v / 4) +
           Part % WarpTile::v_panels * column_quads + item % column_quads;
  }

  // Index of the partial of a warp.
  static __device__ __forceinline__ int partial_of(int warp, int pass) {
    return SharedLayout::after_cmp ? warp : warp * 2 + pass;
  }
  template <int Part>
  __device__ __forceinline__ void store_warp(const WarpTile& warp_tile, int pass) const {
    auto* o = reinterpret_cast<float*>(shared) + partial_of(at.warp, pass) * SharedLayout::warp_floats;
    float2* states = warp_lse() + partial_of(at.warp, pass) * WarpTile::heads;
    const auto unscaled = [](int, float) { return 1.0f; };
    if constexpr (is_quantised_tile<WarpTile>)
      warp_tile.template store_scaled_o<Part>(o, unscaled, SharedLayout::pitch);
    else
      warp_tile.template store_scaled_o<Part>(o, unscaled);
    warp_tile.store_state(states);
  }

  // Warps of this CTA before warp x of the head tile.
  __device__ __forceinline__ int warps_before(int x) const {
    const int warps = max(0, x - at.tile_cta + ctas() - 1);
    return min(W, WarpTile::tuned ? p.by_cluster(warps) : p.by_tile_ctas(warps));
  }

  // Partials received from every CTA: o [branch][cta][items of the slice], then (m, sum) [branch][cta][heads of the
  // slice].
  __device__ __forceinline__ float4* partials_o() const {
    return reinterpret_cast<float4*>(shared + SharedLayout::partials);
  }
  __device__ __forceinline__ float2* partials_ms() const {
    return reinterpret_cast<float2*>(partials_o() + branches * ctas() * p.o_slice);
  }

  // Warps [from, to) of this CTA that attend branch b: in pass 0 if it is cmp, else in pass 1.
  struct Range {
    int from, to;
  };
  __device__ __forceinline__ Range warps_of(int b) const {
    const int warps = W * ctas(), win_warps = WarpTile::tuned ? p.win_warps : p.by_head_tiles(p.win_warps),
              sel_end = warps - win_warps;
    if (b == cmp) return {0, p.scores_only ? 0 : warps_before(cmp_tiles)};
    if (b == sel) return {warps_before(sel_end - min(sel_end, sel_tiles)), warps_before(sel_end)};
    return {warps_before(warps - min(win_warps, win_tiles)), W};
  }
  __device__ __forceinline__ float2* warp_lse() const {
    return reinterpret_cast<float2*>(shared + SharedLayout::warp_lse);
  }
  __device__ __forceinline__ float2* cta_lse() const {
    return reinterpret_cast<float2*>(shared + SharedLayout::cta_lse);
  }

  // Forms the (m, sum) of the CTA by branch and head of the part, and replaces the maximum of every warp by the scale
  // of its o. A thread has one warp; neighbouring threads have the warps of one head.
  template <int Part>
  __device__ __forceinline__ void rescale_warps() const {
    constexpr int lanes = W > 8 ? 16 : W > 4 ? 8 : 4;  // of a head
    static_assert(W <= lanes);
#pragma unroll 1
    for (int item0 = at.warp * 32; item0 < branches * part_heads * lanes; item0 += threads) {
      const int item = item0 + threadIdx.x % 32, w = item % lanes, to = item / lanes, b = to / part_heads;
      const Range warps = warps_of(b);
      const bool has = b < branches && w >= warps.from && w < warps.to;
      float2* state = warp_lse() + partial_of(w, b != cmp) * WarpTile::heads + first_head<Part> + to % part_heads;
      const SoftmaxState<Exp2> own = has ? SoftmaxState<Exp2>{state->x, state->y} : SoftmaxState<Exp2>{};
      float m = own.m;
#pragma unroll
      for (int step = lanes / 2; step > 0; step /= 2) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, step));
      const float scale = exp2_fast(own.m - m);
      float sum = scale * own.s;
#pragma unroll
      for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (has) state->x = scale;
      if (w == 0 && b < branches) cta_lse()[to] = make_float2(m, sum);
    }
  }

  // Sums a part of the warps of the CTA. A single CTA stores o; else the partials go to the CTAs that merge them.
  template <int Part>
  __device__ __forceinline__ void send_partials(const ParkedTile<WarpTile>& cmp_tile, const WarpTile& second_tile,
                                                bool attends_sel) const {
    __syncthreads();  // the rings are empty, the part before is sent
    const Range ranges[branches] = {warps_of(cmp), warps_of(sel), warps_of(win)};
    const Range second = attends_sel ? ranges[sel] : ranges[win];
    if constexpr (!Params::after_cmp)
      if (at.warp < ranges[cmp].to) store_warp<Part>(cmp_tile.template unpark<Part>(second_tile), 0);
    if (at.warp >= second.from && at.warp < second.to) store_warp<Part>(second_tile, 1);
    float4 before[items_of_thread] = {};
    if constexpr (Params::after_cmp) merge_before<Part>(before);
    __syncthreads();
    rescale_warps<Part>();
    __syncthreads();
    if constexpr (Params::is_shard) at.send_states(cta_lse(), WarpTile::heads);
    if constexpr (Params::after_cmp)
      store_items<Part>(ranges, before);
    else
      send_items<Part>(ranges);
  }
  template <int Part>
  __device__ __forceinline__ void send_items(const Range (&ranges)[branches]) const {
#pragma unroll 1
    for (int item = threadIdx.x; item < valid_heads<Part>() * column_quads; item += threads) {
      if (!has_columns<Part>(item)) continue;
      const float4 partials[branches] = {sum_warps<Part>(cmp, ranges[cmp], item),
                                         sum_warps<Part>(sel, ranges[sel], item),
                                         sum_warps<Part>(win, ranges[win], item)};
      if (ctas() > 1 || Params::is_shard)
        send_item(item, partials);
      else
        store_item<Part>(item, partials);
    }
  }
  // Sum over the warps of branch b of 4 columns of a head, unrolled over the usual number of warps.
  template <int Part>
  __device__ __forceinline__ float4 sum_warps(int b, Range warps, int item) const {
    constexpr int step = SharedLayout::warp_partials;
    const int head = item / column_quads, slot = partial_of(warps.from, b != cmp);
    const float2* states = warp_lse() + slot * WarpTile::heads + first_head<Part> + head;
    const float* o = reinterpret_cast<const float*>(shared) + slot * SharedLayout::warp_floats +
                     head * SharedLayout::pitch + item % column_quads * 4;
    float4 sum = {};
    const auto add = [&](auto count) {
      float scale[count];
      float4 x[count];
#pragma unroll
      for (int i = 0; i < count; ++i)
        scale[i] = states[i * step * WarpTile::heads].x,
        x[i] = *reinterpret_cast<const float4*>(o + i * step * SharedLayout::warp_floats);
#pragma unroll
      for (int i = 0; i < count; ++i) {
        add_scaled(sum, scale[i], x[i]);
      }
      states += count * step * WarpTile::heads, o += count * step * SharedLayout::warp_floats;
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
  // Sends an item to the CTA that merges it.
  __device__ __forceinline__ void send_item(int item, const float4 (&partials)[branches]) const {
    const int head = item / column_quads, owner = p.by_o_slice(item), first = owner * p.o_slice, local = item - first;
    const auto in_owner = [&](auto* mine) {
      return Params::is_shard && p.cluster == 1 ? mine : map_to_cta(mine, owner * head_tiles() + at.head_tile);
    };
    float4* to_o = in_owner(partials_o()) + at.tile_cta * p.o_slice + local;
#pragma unroll
    for (int b = 0; b < branches; ++b) to_o[b * ctas() * p.o_slice] = partials[b];
    if (local != 0 && item % column_quads != 0) return;
    float2* to_ms = in_owner(partials_ms()) + at.tile_cta * p.o_slice_heads + head - first / column_quads;
#pragma unroll
    for (int b = 0; b < branches; ++b) to_ms[b * ctas() * p.o_slice_heads] = cta_lse()[b * part_heads + head];
  }
  template <int Part>
  __device__ __forceinline__ void store_item(int item, const float4 (&partials)[branches]) const {
    float4 sum = {};
#pragma unroll
    for (int b = 0; b < branches; ++b) {
      if (p.leave_out[b]) continue;
      float s = cta_lse()[b * part_heads + item / column_quads].y;
      float4 value = partials[b];
      if constexpr (Params::lends)
        if (b == cmp) {
          SoftmaxState<Exp2> state = {cta_lse()[item / column_quads].x, s};
          add_lent(item, state, value);
          s = state.s;
        }
      const float inverse = inverse_or_zero(s), gate = gates()[b];
      scale_by(value, inverse);
      if (p.o_branch[b]) reinterpret_cast<float4*>(p.o_branch[b])[quad_of<Part>(item)] = value;
      add_scaled(sum, gate, value);
    }
    store_quad(quad_of<Part>(item), sum);
  }
  // After a launch of cmp: items of a thread.
  static constexpr int items_of_thread = (SharedLayout::items + threads - 1) / threads;
  template <int Part>
  __device__ __forceinline__ bool has_item(int item) const {
    return item < valid_heads<Part>() * column_quads && has_columns<Part>(item);
  }
  // The gated sum of the branches attended by the launch before, cmp and perhaps win, for each item of this thread.
  template <int Part>
  __device__ __forceinline__ void merge_before(float4 (&sums)[items_of_thread]) const {
    Partial<Exp2> merged[2][items_of_thread];
#pragma unroll 1
    for (int first = 0; first < p.splits; first += splits_at_a_time) merge_splits<Part>(merged, first);
#pragma unroll
    for (int r = 0; r < items_of_thread; ++r) {
      const int item = r * threads + threadIdx.x;
      if (!has_item<Part>(item)) return;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int b = i == 0 ? cmp : win;
        if (!p.before[b] || p.leave_out[b]) continue;
        float4 value = merged[i][r].o;
        scale_by(value, inverse_or_zero(merged[i][r].state.s));
        if (p.o_branch[b]) reinterpret_cast<float4*>(p.o_branch[b])[quad_of<Part>(item)] = value;
        add_scaled(sums[r], gates()[b], value);
      }
    }
  }
  // Merges up to `splits_at_a_time` splits from `first` on, of both branches and all items of this thread. All are
  // loaded before the first is merged. A split that has attended nothing has no o.
  static constexpr int splits_at_a_time = 3;
  template <int Part>
  __device__ __forceinline__ void merge_splits(Partial<Exp2> (&merged)[2][items_of_thread], int first) const {
    static_assert(threads % column_quads == 0);
    constexpr int head_step = threads / column_quads;  // between the items of a thread
    const int d_v = WarpTile::tuned ? WarpTile::d_v : p.shape.d_v, quads = d_v / 4,
              head = first_head<Part> + static_cast<int>(threadIdx.x) / column_quads,
              quad = head * quads + Part % WarpTile::v_panels * column_quads + threadIdx.x % column_quads,
              stride = WarpTile::heads * (d_v + 2);
    const std::int64_t begin = (std::int64_t{at.work_item} * p.splits + first) * stride;
    const float* of_branch[2];
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const float* partials = p.before[b == 0 ? cmp : win];
      of_branch[b] = partials ? partials + begin : nullptr;
    }
    float2 ms[2][items_of_thread][splits_at_a_time];
    float4 x[2][items_of_thread][splits_at_a_time];
    const auto for_each_partial = [&](auto f) {
#pragma unroll
      for (int b = 0; b < 2; ++b)
#pragma unroll
        for (int r = 0; r < items_of_thread; ++r)
#pragma unroll
          for (int i = 0; i < splits_at_a_time; ++i) f(b, r, i);
    };
    for_each_partial([&](int b, int r, int i) {
      const auto* states = reinterpret_cast<const float2*>(of_branch[b] + WarpTile::heads * d_v) + head;
      const bool has = of_branch[b] && first + i < p.splits && has_item<Part>(r * threads + threadIdx.x);
      ms[b][r][i] = has ? __ldcg(states + r * head_step + i * (stride / 2)) : make_float2(neg_inf, 0.0f);
    });
    for_each_partial([&](int b, int r, int i) {
      const auto* o = reinterpret_cast<const float4*>(of_branch[b]) + quad;
      x[b][r][i] = ms[b][r][i].y > 0.0f ? __ldcg(o + r * head_step * quads + i * (stride / 4)) : float4{};
    });
    for_each_partial(
        [&](int b, int r, int i) { merge_partial(merged[b][r].state, merged[b][r].o, ms[b][r][i], x[b][r][i]); });
  }
  // Adds the branches of this CTA to those of the launch before, and stores o.
  template <int Part>
  __device__ __forceinline__ void store_items(const Range (&ranges)[branches], float4 (&sums)[items_of_thread]) const {
#pragma unroll
    for (int r = 0; r < items_of_thread; ++r) {
      const int item = r * threads + threadIdx.x;
      if (!has_item<Part>(item)) return;
#pragma unroll
      for (int b = sel; b <= win; ++b) {
        if (p.before[b] || p.leave_out[b]) continue;
        float4 value = sum_warps<Part>(b, ranges[b], item);
        scale_by(value, inverse_or_zero(cta_lse()[b * part_heads + item / column_quads].y));
        if (p.o_branch[b]) reinterpret_cast<float4*>(p.o_branch[b])[quad_of<Part>(item)] = value;
        add_scaled(sums[r], gates()[b], value);
      }
      store_quad(quad_of<Part>(item), sums[r]);
    }
  }
  // Adds what other clusters have attended of this row. Absent partials are the neutral element.
  __device__ __forceinline__ void add_lent(int item, SoftmaxState<Exp2>& state, float4& o) const {
    const int count = at.lent_partials(), stride = at.partial_floats(), head = item / column_quads;
    const float* from = at.first_lent_partial();
#pragma unroll 1
    for (int i0 = 0; i0 < count; i0 += 4, from += 4 * stride) {
      float2 ms[4];
      float4 x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* partial = from + i * stride;
        const bool has = i0 + i < count;
        ms[i] = has ? __ldcg(reinterpret_cast<const float2*>(partial + WarpTile::heads * WarpTile::d_v) + head)
                    : make_float2(neg_inf, 0.0f);
        x[i] = has ? __ldcg(reinterpret_cast<const float4*>(partial) + item) : float4{};
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) merge_partial(state, o, ms[i], x[i]);
    }
  }
  /// Stores the sum over the warps of tiles of cmp that another cluster merges.
  __device__ __forceinline__ void store_lent(const WarpTile& tile, float* to) const {
    const Range warps = warps_of(cmp);
    __syncthreads();  // the rings are empty
    if (at.warp < warps.to) store_warp<0>(tile, 0);
    __syncthreads();
    rescale_warps<0>();
    __syncthreads();
#pragma unroll 1
    for (int item = threadIdx.x; item < at.valid_heads * column_quads; item += threads) {
      __stcg(reinterpret_cast<float4*>(to) + item, sum_warps<0>(cmp, warps, item));
      const int head = item / column_quads;
      if (item % column_quads == 0)
        __stcg(reinterpret_cast<float2*>(to + WarpTile::heads * WarpTile::d_v) + head, cta_lse()[head]);
    }
  }
  __device__ __forceinline__ void store_quad(std::int64_t quad, float4 x) const {
    T* to = static_cast<T*>(p.o) + quad * 4;
    store(to, x.x), store(to + 1, x.y), store(to + 2, x.z), store(to + 3, x.w);
  }
  __device__ __forceinline__ float* gates() const { return reinterpret_cast<float*>(shared + SharedLayout::gates); }

  // The sum over four neighbouring lanes, the last of which has nothing, in the first.
  static __device__ __forceinline__ float4 sum_branches(float4 x) {
    const auto sum = [](float own) {
      const float second = __shfl_down_sync(0xffffffffu, own, 1), third = __shfl_down_sync(0xffffffffu, own, 2);
      return own + second + third;
    };
    return {sum(x.x), sum(x.y), sum(x.z), sum(x.w)};
  }
  // The partial of branch b and the local-th item of the slice, which begins at item `first`.
  __device__ __forceinline__ Partial<Exp2> merge_ctas(int b, int first, int local) const {
    const float4* o = partials_o() + b * ctas() * p.o_slice + local;
    const float2* ms =
        partials_ms() + b * ctas() * p.o_slice_heads + (first + local) / column_quads - first / column_quads;
    return merge_partials<Exp2>(
        ctas(), [&](int i) { return ms[i * p.o_slice_heads]; }, [&](int i) { return o[i * p.o_slice]; });
  }
  // Merges the slice of this CTA of a part into o. Four threads an item, one branch each.
  template <int Part>
  __device__ __forceinline__ void merge() const {
    const int first = at.tile_cta * p.o_slice, b = threadIdx.x % 4;
#pragma unroll 1
    for (int i0 = 0; i0 < p.o_slice; i0 += threads / 4) {
      const int local = i0 + threadIdx.x / 4, item = first + local;
      const bool in_slice = local < p.o_slice && item < valid_heads<Part>() * column_quads && has_columns<Part>(item);
      float4 value = {};
      if (in_slice && b < branches && !p.leave_out[b]) {
        Partial<Exp2> merged = merge_ctas(b, first, local);
        if constexpr (Params::lends)
          if (b == cmp) add_lent(item, merged.state, merged.o);
        const float inverse = inverse_or_zero(merged.state.s);
        value = {merged.o.x * inverse, merged.o.y * inverse, merged.o.z * inverse, merged.o.w * inverse};
        if (p.o_branch[b]) reinterpret_cast<float4*>(p.o_branch[b])[quad_of<Part>(item)] = value;
        scale_by(value, gates()[b]);
      }
      value = sum_branches(value);
      if (!in_slice || b != 0) continue;
      store_quad(quad_of<Part>(item), value);
    }
  }
};

}  // namespace nsa::gpu
