// combine: merges the ranks' partials of every branch, normalises, weighs with the gates. One CTA a (row, head),
// one thread an element; reads ranks * 3 * (Dv + 2) floats a head once. Bound by launch latency in decode, by
// reading the partials in prefill.

#include "kernels/cuda/stages.cuh"

namespace nsa::gpu {

namespace {

template <class T>
__global__ void combine_kernel(CombineArgs a) {
  const LayerShape& s = a.shape;
  const int heads = s.heads(), d_v = s.d_v;
  const std::int64_t rows = a.tile.rows(), rh = blockIdx.x;
  const std::int64_t row = rh / heads, head = rh % heads, group = head / s.heads_per_group;
  const std::int64_t rank_floats = partial_floats(s, rows), branch_o = rows * heads * d_v, branch_ms = rows * heads * 2;
  for (int e = threadIdx.x; e < d_v; e += blockDim.x) {
    float sum = 0.0f;
    for (int b = 0; b < branches; ++b) {
      float value = 0.0f;
      if (!a.leave_out[b]) {
        float m = -INFINITY, weight = 0.0f, o = 0.0f;
        for (int rank = 0; rank < a.ranks; ++rank) {
          const float* base = a.partials + rank * rank_floats;
          const float* ms = base + branches * branch_o + b * branch_ms + rh * 2;
          if (ms[0] == -INFINITY) continue;
          const float top = fmaxf(m, ms[0]), old = exp_above(m, top), fresh = exp_above(ms[0], top);
          weight = weight * old + ms[1] * fresh;
          o = o * old + base[b * branch_o + rh * d_v + e] * fresh;
          m = top;
        }
        value = weight > 0.0f ? o / weight : 0.0f;
      }
      if (a.o_branch[b]) a.o_branch[b][rh * d_v + e] = value;
      if (!a.leave_out[b]) sum += a.gate[(row * s.groups + group) * branches + b] * value;
    }
    store(static_cast<T*>(a.o) + rh * d_v + e, sum);
  }
}

}  // namespace

void combine(const CombineArgs& a, Stream* stream) {
  const std::int64_t rows = a.tile.rows();
  if (rows == 0) return;
  const int threads = a.shape.d_v <= 64 ? 64 : a.shape.d_v <= 128 ? 128 : 256;
  with_type(a.shape.dtype, [&](auto type) {
    combine_kernel<decltype(type)>
        <<<static_cast<unsigned>(rows * a.shape.heads()), threads, 0, cuda(stream)>>>(a);
  });
  check_launch("combine");
}

}  // namespace nsa::gpu
