// combine: merges the ranks' partials of every branch, normalises, weighs with the gates. One CTA a (row, head),
// one thread an element; reads ranks * 3 * (Dv + 2) floats a head once. Bound by launch latency in decode, by
// reading the partials in prefill.

#include "kernels/cuda/stages.cuh"

namespace nsa::gpu {

namespace {

// One rank's (or the only) partial of a head, loads only.
struct Part {
  float m, s, o;
};
__device__ __forceinline__ Part part_of(const CombineArgs& a, int rank, int branch, std::int64_t rh, int e) {
  const LayerShape& s = a.shape;
  const std::int64_t rows = a.tile.rows(), heads = rows * s.heads();
  const float* base = a.partials + rank * partial_floats(s, rows);
  const float2 ms = reinterpret_cast<const float2*>(base + branches * heads * s.d_v)[branch * heads + rh];
  return {ms.x, ms.y, base[(branch * heads + rh) * s.d_v + e]};
}

template <class T>
__global__ void combine_kernel(const __grid_constant__ CombineArgs a) {
  wait_for_previous();
  const LayerShape& s = a.shape;
  const int rh = blockIdx.x, group = rh / s.heads_per_group;  // group: row * groups + g
  for (int e = threadIdx.x; e < s.d_v; e += blockDim.x) {
    float m[branches], weight[branches], o[branches], sum = 0.0f;
#pragma unroll
    for (int b = 0; b < branches; ++b) {
      if (a.leave_out[b]) continue;
      const Part first = part_of(a, 0, b, rh, e);
      m[b] = first.m, weight[b] = first.s, o[b] = first.m == -INFINITY ? 0.0f : first.o;
    }
    for (int rank = 1; rank < a.ranks; ++rank)
#pragma unroll
      for (int b = 0; b < branches; ++b) {
        if (a.leave_out[b]) continue;
        const Part part = part_of(a, rank, b, rh, e);
        const float top = fmaxf(m[b], part.m), old = exp_above(m[b], top), fresh = exp_above(part.m, top);
        weight[b] = weight[b] * old + part.s * fresh;
        o[b] = o[b] * old + (part.m == -INFINITY ? 0.0f : part.o * fresh);
        m[b] = top;
      }
#pragma unroll
    for (int b = 0; b < branches; ++b) {
      const float value = a.leave_out[b] || weight[b] == 0.0f ? 0.0f : o[b] / weight[b];
      if (a.o_branch[b]) a.o_branch[b][std::int64_t{rh} * s.d_v + e] = value;
      if (!a.leave_out[b]) sum += a.gate[group * branches + b] * value;
    }
    store(static_cast<T*>(a.o) + std::int64_t{rh} * s.d_v + e, sum);
  }
}

}  // namespace

void combine(const CombineArgs& a, Stream* stream) {
  const std::int64_t rows = a.tile.rows();
  if (rows == 0) return;
  const int threads = a.shape.d_v <= 64 ? 64 : a.shape.d_v <= 128 ? 128 : 256;
  with_type(a.shape.dtype, [&](auto type) {
    launch_early(combine_kernel<decltype(type)>, dim3(static_cast<unsigned>(rows * a.shape.heads())), threads, 0, stream, 1, a);
  });
}

}  // namespace nsa::gpu
