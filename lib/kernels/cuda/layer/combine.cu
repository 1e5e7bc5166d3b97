// combine: merges the partials of the ranks by branch, normalises, applies the gates.
//
// Tiling: a thread has 4 elements of a head (1 where Dv is not divisible). Bytes: ranks * 3 * (Dv + 2) floats a head,
// once. Bound: launch latency in decode, reading the partials in prefill.

#include "kernels/cuda/attention/online_softmax.cuh"
#include "kernels/cuda/layer/stages.cuh"

namespace nsa::gpu {

namespace {

constexpr int threads = 128;

// V consecutive elements of the partial of one rank and head.
template <int V>
struct PartialSlice {
  float m, s, o[V];
};
template <int V>
__device__ __forceinline__ PartialSlice<V> load_partial(const CombineArgs& a, int rank, int branch, std::int64_t rh,
                                                        int e) {
  const LayerShape& s = a.shape;
  const std::int64_t rows = a.tile.rows(), heads = rows * s.heads();
  const float* base = a.partials + rank * partial_floats(s, rows);
  const float* ms = base + branches * heads * s.d_v + (branch * heads + rh) * 2;
  PartialSlice<V> partial{ms[0], ms[1], {}};
  const float* from = base + (branch * heads + rh) * s.d_v + e;
  if constexpr (V == 4)
    *reinterpret_cast<float4*>(partial.o) = *reinterpret_cast<const float4*>(from);
  else
    partial.o[0] = *from;
  if (partial.m == -INFINITY)
    for (float& o : partial.o) o = 0.0f;
  return partial;
}

template <class T, int V>
__global__ void __launch_bounds__(threads) combine_kernel(const __grid_constant__ CombineArgs a, int elements) {
  griddep_wait();
  const LayerShape& s = a.shape;
  const int item = blockIdx.x * threads + threadIdx.x, rh = item / elements, e = item % elements * V;
  if (rh >= a.tile.rows() * s.heads()) return;
  const int group = rh / s.heads_per_group;  // row * groups + g
  PartialSlice<V> total[branches];
#pragma unroll
  for (int b = 0; b < branches; ++b)
    if (!a.leave_out[b]) total[b] = load_partial<V>(a, 0, b, rh, e);
  for (int rank = 1; rank < a.ranks; ++rank)
#pragma unroll
    for (int b = 0; b < branches; ++b) {
      if (a.leave_out[b]) continue;
      const PartialSlice<V> partial = load_partial<V>(a, rank, b, rh, e);
      const Rescale<Natural> r(total[b].m, partial.m);
      total[b].s = r(total[b].s, partial.s);
      for (int i = 0; i < V; ++i) total[b].o[i] = r(total[b].o[i], partial.o[i]);
      total[b].m = r.m;
    }
  float sum[V] = {};
#pragma unroll
  for (int b = 0; b < branches; ++b) {
    const bool attended = !a.leave_out[b] && total[b].s > 0.0f;
    const float inverse = attended ? 1.0f / total[b].s : 0.0f, gate = a.gate[group * branches + b];
    for (int i = 0; i < V; ++i) {
      const float value = attended ? total[b].o[i] * inverse : 0.0f;
      if (a.o_branch[b]) a.o_branch[b][std::int64_t{rh} * s.d_v + e + i] = value;
      if (!a.leave_out[b]) sum[i] += gate * value;
    }
  }
  for (int i = 0; i < V; ++i) store(static_cast<T*>(a.o) + std::int64_t{rh} * s.d_v + e + i, sum[i]);
}

template <class T, int V>
void launch(const CombineArgs& a, Stream* stream) {
  const int elements = a.shape.d_v / V;
  const std::int64_t items = a.tile.rows() * a.shape.heads() * elements;
  launch_pdl(combine_kernel<T, V>, dim3(static_cast<unsigned>((items + threads - 1) / threads)), threads, 0, stream, 1,
             a, elements);
}

}  // namespace

void combine(const CombineArgs& a, Stream* stream) {
  const std::int64_t rows = a.tile.rows();
  if (rows == 0) return;
  with_type(a.shape.dtype, [&](auto type) {
    using T = decltype(type);
    // Every rank's partials must begin at a whole vector.
    if (a.shape.d_v % 4 == 0 && (a.ranks == 1 || partial_floats(a.shape, rows) % 4 == 0))
      launch<T, 4>(a, stream);
    else
      launch<T, 1>(a, stream);
  });
}

}  // namespace nsa::gpu
