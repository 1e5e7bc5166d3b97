#pragma once
// Online softmax: the running state (m, s) of a row, and how states and partials (o, m, s) are merged and rescaled.
//
// Two numeric bases. Exp2: scores and maxima are scaled by log2(e), exponentials are ex2.approx. Natural: as in the
// kernel interface, with -inf for an empty row. The compiler contracts the sum of merge() to one fma. merge_exact()
// spells its roundings out: states that decide which blocks are selected must have the same bits in every kernel.

#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu {

/// Bases. scale(m, m_new) brings a sum relative to m to one relative to m_new >= m.
struct Exp2 {
  static constexpr float empty_max = neg_inf;
  static __device__ __forceinline__ float scale(float m, float m_new) { return exp2_fast(m - m_new); }
};
struct Natural {
  static constexpr float empty_max = -INFINITY;
  static __device__ __forceinline__ float scale(float m, float m_new) { return exp_shifted(m, m_new); }
};

/// Running (maximum, sum of exponentials above it).
template <class Base>
struct SoftmaxState {
  float m = Base::empty_max, s = 0.0f;
};

template <class Base>
__device__ __forceinline__ SoftmaxState<Base> merge(SoftmaxState<Base> a, SoftmaxState<Base> b) {
  const float m = fmaxf(a.m, b.m);
  return {m, a.s * Base::scale(a.m, m) + b.s * Base::scale(b.m, m)};
}
/// The same with explicit roundings.
template <class Base>
__device__ __forceinline__ SoftmaxState<Base> merge_exact(SoftmaxState<Base> a, SoftmaxState<Base> b) {
  const float m = fmaxf(a.m, b.m);
  return {m, __fmaf_rn(a.s, Base::scale(a.m, m), __fmul_rn(b.s, Base::scale(b.m, m)))};
}
template <class Base>
__device__ __forceinline__ void merge_exact_into(SoftmaxState<Base>& total, float2 ms) {
  const float m = fmaxf(total.m, ms.x);
  total.s = __fmaf_rn(total.s, Base::scale(total.m, m), __fmul_rn(ms.y, Base::scale(ms.x, m)));
  total.m = m;
}

/// Factors when a tile is merged: of the o accumulated so far, and of P of the tile.
struct TileScale {
  float o, p;
};
/// Merges the (m, s) of a tile, relative to its own maximum, into the running state.
template <class Base>
__device__ __forceinline__ TileScale merge_tile(SoftmaxState<Base>& total, SoftmaxState<Base> tile) {
  const float m = fmaxf(total.m, tile.m), p = Base::scale(tile.m, m), o = Base::scale(total.m, m);
  total = {m, total.s * o + tile.s * p};
  return {o, p};
}
/// The same with explicit roundings.
template <class Base>
__device__ __forceinline__ TileScale merge_tile_exact(SoftmaxState<Base>& total, SoftmaxState<Base> tile) {
  const float m = fmaxf(total.m, tile.m), p = Base::scale(tile.m, m), o = Base::scale(total.m, m);
  total = {m, __fmaf_rn(total.s, o, __fmul_rn(tile.s, p))};
  return {o, p};
}

/// (m, s) as the kernel interface has it: m natural, -inf where nothing was attended.
__device__ __forceinline__ float2 to_natural_log(SoftmaxState<Exp2> x) {
  return make_float2(x.s > 0.0f ? x.m * 0.6931471805599453f : -INFINITY, x.s);
}

__device__ __forceinline__ void scale_by(float4& x, float factor) {
  x.x *= factor, x.y *= factor, x.z *= factor, x.w *= factor;
}
__device__ __forceinline__ void add_scaled(float4& to, float factor, float4 x) {
  to.x += factor * x.x, to.y += factor * x.y, to.z += factor * x.z, to.w += factor * x.w;
}

/// Rescaling of two partials to their common maximum m.
template <class Base>
struct Rescale {
  float m, scale_prev, scale_new;
  __device__ __forceinline__ Rescale(float m_prev, float m_new)
      : m(fmaxf(m_prev, m_new)), scale_prev(Base::scale(m_prev, m)), scale_new(Base::scale(m_new, m)) {}
  /// The sum of two rescaled values.
  __device__ __forceinline__ float operator()(float prev, float next) const {
    return prev * scale_prev + next * scale_new;
  }
};

/// Merges the partial (x, ms) of another split or rank into the state and four columns of o of a head.
template <class Base>
__device__ __forceinline__ void merge_partial(SoftmaxState<Base>& state, float4& o, float2 ms, float4 x) {
  const Rescale<Base> r(state.m, ms.x);
  state = {r.m, r(state.s, ms.y)};
  o.x = r(o.x, x.x), o.y = r(o.y, x.y), o.z = r(o.z, x.z), o.w = r(o.w, x.w);
}

/// Four columns of the unnormalised o of a head and its state.
template <class Base>
struct Partial {
  float4 o = {};
  SoftmaxState<Base> state;
};
/// Merge of `count` partials that are all in memory: the common maximum first, then one rescaling each. ms_of(i) and
/// o_of(i) load partial i.
template <class Base, class MsOf, class OOf>
__device__ __forceinline__ Partial<Base> merge_partials(int count, MsOf ms_of, OOf o_of) {
  Partial<Base> sum;
#pragma unroll 4
  for (int i = 0; i < count; ++i) sum.state.m = fmaxf(sum.state.m, ms_of(i).x);
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    const float2 ms = ms_of(i);
    const float4 x = o_of(i);
    const float scale = Base::scale(ms.x, sum.state.m);
    sum.state.s += scale * ms.y;
    add_scaled(sum.o, scale, x);
  }
  return sum;
}

/// 1 / s, 0 where nothing was attended.
__device__ __forceinline__ float inverse_or_zero(float s) { return s > 0.0f ? 1.0f / s : 0.0f; }

}  // namespace nsa::gpu
