// compress: the compressed tokens that complete inside the tile, by the mean or by the learned form (paper,
// section 3.3.1).
//
// mean: one CTA a (plane, token), a thread an element; reads l rows, writes one. mlp: one CTA a (plane, several tokens,
// K or V), a thread a hidden unit. Bound: reading the weights [l * D, hidden], once for `tokens_per_cta` tokens. pos is
// added in fp32; nothing is rounded between the layers.

#include <algorithm>

#include "kernels/cuda/layer/append_compress.cuh"
#include "kernels/cuda/layer/fp8_rows.cuh"
#include "kernels/cuda/layer/stages.cuh"

namespace nsa::gpu {

namespace {

constexpr int tokens_per_cta = 8;  // of the mlp kernel

std::int64_t max_completed(const LayerShape& s, const QueryTile& tile) { return (tile.tokens - 1) / s.rules.d + 1; }

template <class T>
__global__ void mean_kernel(CompressArgs a, std::int64_t max_tokens) {
  griddep_wait();
  const std::int64_t in_tile = blockIdx.x / max_tokens,
                     plane = std::int64_t{a.tile.batch_begin} * a.shape.groups + in_tile;
  const TokenRange tokens = completed(a.shape, a.tile, in_tile / a.shape.groups);
  const std::int64_t i = tokens.begin + blockIdx.x % max_tokens;
  if (i >= tokens.end || !is_wanted(a.k_cmp, a.fill_halo, i)) return;
  mean_of<T>(a.shape, a.k_raw, a.k_cmp, a.fill_halo, plane, i);
  mean_of<T>(a.shape, a.v_raw, a.v_cmp, a.fill_halo, plane, i);
}

// Shared memory: x [tokens_per_cta][D] (one position of each token), hidden [tokens_per_cta][phi_hidden].
template <class T>
__global__ void mlp_kernel(CompressArgs a, std::int64_t max_tokens) {
  extern __shared__ float shared[];
  const bool keys = blockIdx.y == 0;
  const KvView raw = keys ? a.k_raw : a.v_raw, cmp = keys ? a.k_cmp : a.v_cmp;
  const PhiWeights phi = keys ? a.phi_k : a.phi_v;
  const T *pos = static_cast<const T*>(phi.pos), *w1 = static_cast<const T*>(phi.w1),
          *w2 = static_cast<const T*>(phi.w2);
  const int width = cmp.width, hidden_units = a.shape.phi_hidden;
  float *x = shared, *hidden = shared + tokens_per_cta * width;
  const std::int64_t strips = (max_tokens + tokens_per_cta - 1) / tokens_per_cta;
  const std::int64_t in_tile = blockIdx.x / strips, plane = std::int64_t{a.tile.batch_begin} * a.shape.groups + in_tile;
  const TokenRange tokens = completed(a.shape, a.tile, in_tile / a.shape.groups);
  const std::int64_t begin = tokens.begin + blockIdx.x % strips * tokens_per_cta;
  bool wanted[tokens_per_cta], any = false;
  for (int n = 0; n < tokens_per_cta; ++n)
    any |= wanted[n] = begin + n < tokens.end && is_wanted(cmp, a.fill_halo, begin + n);
  if (!any) return;
  for (int unit0 = 0; unit0 < hidden_units; unit0 += blockDim.x) {  // one round when phi_hidden <= blockDim.x
    const int unit = unit0 + threadIdx.x;
    float sums[tokens_per_cta] = {};
    for (int m = 0; m < a.shape.rules.l; ++m) {
      __syncthreads();
      for (int item = threadIdx.x; item < tokens_per_cta * width; item += blockDim.x) {
        const int n = item / width, e = item % width;
        const std::int64_t first = (begin + n) * a.shape.rules.d;
        x[item] = wanted[n] ? to_float(static_cast<const T*>(
                                  raw.data)[offset_in_chunk(raw, plane, chunk_of(raw.map, first), first + m) + e]) +
                                  to_float(pos[m * width + e])
                            : 0.0f;
      }
      __syncthreads();
      if (unit >= hidden_units) continue;
      for (int e = 0; e < width; ++e) {
        const float w = to_float(w1[(std::int64_t{m} * width + e) * hidden_units + unit]);
#pragma unroll
        for (int n = 0; n < tokens_per_cta; ++n) sums[n] += x[n * width + e] * w;
      }
    }
    if (unit < hidden_units)
#pragma unroll
      for (int n = 0; n < tokens_per_cta; ++n) hidden[n * hidden_units + unit] = sums[n] / (1.0f + expf(-sums[n]));
  }
  __syncthreads();
  for (int item = threadIdx.x; item < tokens_per_cta * width; item += blockDim.x) {
    const int n = item / width, e = item % width;
    if (begin + n >= tokens.end || !is_wanted(cmp, a.fill_halo, begin + n)) continue;
    float sum = 0.0f;
    for (int unit = 0; unit < hidden_units; ++unit)
      sum += hidden[n * hidden_units + unit] * to_float(w2[unit * width + e]);
    write_token<T>(cmp, a.fill_halo, plane, begin + n, e, sum);
  }
}

}  // namespace

void compress(const CompressArgs& a, Stream* stream) {
  const std::int64_t planes = std::int64_t{a.tile.batches} * a.shape.groups,
                     max_tokens = max_completed(a.shape, a.tile);
  if (planes == 0 || a.tile.tokens == 0) return;
  if (is_quantised(a.k_cmp)) return compress_quantised(a, stream);
  with_type(a.shape.dtype, [&](auto type) {
    using T = decltype(type);
    if (a.shape.phi == PhiKind::mean) {
      launch_pdl(mean_kernel<T>, dim3(static_cast<unsigned>(planes * max_tokens)), 128, 0, stream, 1, a, max_tokens);
      return;
    }
    const std::int64_t strips = (max_tokens + tokens_per_cta - 1) / tokens_per_cta;
    const std::size_t shared = tokens_per_cta *
                               (static_cast<std::size_t>(std::max(a.shape.d_k, a.shape.d_v)) + a.shape.phi_hidden) *
                               sizeof(float);
    allow_shared(mlp_kernel<T>, shared);
    mlp_kernel<T><<<dim3(static_cast<unsigned>(planes * strips), 2), 256, shared, cuda(stream)>>>(a, max_tokens);
  });
  check_launch("compress");
  round_compressed(a, stream);
}

}  // namespace nsa::gpu
