// compress: the tokens that complete inside the tile, by the mean or by the learned form (paper, section 3.3.1).
//
// mean: one CTA a (plane, token), a thread an element; reads l rows, writes one. mlp: one CTA a (plane, several
// tokens, K or V), a thread a hidden unit; the weights [l*D, hidden] are read once for `together` tokens, which is
// what bounds it. pos is added in fp32, nothing is rounded between the layers.

#include <algorithm>

#include "kernels/cuda/stages.cuh"

namespace nsa::gpu {

namespace {

constexpr int together = 8;  // tokens of an mlp CTA

struct TokenRange {
  std::int64_t begin, end;
};
__device__ TokenRange completed(const LayerShape& s, const QueryTile& tile) {
  const std::int64_t first = *tile.first_position;
  return {compressed_tokens(s.rules, first - 1), compressed_tokens(s.rules, first + tile.tokens - 1)};
}
std::int64_t most_completed(const LayerShape& s, const QueryTile& tile) { return (tile.tokens - 1) / s.rules.d + 1; }

/// Whether any place of `cmp` holds token i.
__device__ bool is_wanted(const KvView& cmp, bool fill_halo, std::int64_t i) {
  const RowMap& m = cmp.map;
  const std::int64_t c = chunk_of(m, i);
  return has_chunk(m, c) || (fill_halo && m.before > 0 && i >= (c + 1) * m.chunk - m.before && has_chunk(m, c + 1));
}

template <class T>
__device__ void write_token(const KvView& cmp, bool fill_halo, std::int64_t plane, std::int64_t i, int e, float value) {
  const RowMap& m = cmp.map;
  T* data = static_cast<T*>(cmp.data);
  const std::int64_t c = chunk_of(m, i);
  if (has_chunk(m, c)) store(&data[offset_in_chunk(cmp, plane, c, i) + e], value);
  if (fill_halo && m.before > 0 && m.rank != all_ranks && i >= (c + 1) * m.chunk - m.before && has_chunk(m, c + 1))
    store(&data[offset_in_chunk(cmp, plane, c + 1, i) + e], value);
}

template <class T>
__device__ void mean_of(const LayerShape& s, const KvView& raw, const KvView& cmp, bool fill_halo, std::int64_t plane,
                        std::int64_t i) {
  const std::int64_t first = i * s.rules.d, c = chunk_of(raw.map, first);
  for (int e = threadIdx.x; e < cmp.width; e += blockDim.x) {
    float sum = 0.0f;
    for (int m = 0; m < s.rules.l; ++m)
      sum += to_float(static_cast<const T*>(raw.data)[offset_in_chunk(raw, plane, c, first + m) + e]);
    write_token<T>(cmp, fill_halo, plane, i, e, sum / s.rules.l);
  }
}

template <class T>
__global__ void mean_kernel(CompressArgs a, std::int64_t most) {
  const TokenRange tokens = completed(a.shape, a.tile);
  const std::int64_t i = tokens.begin + blockIdx.x % most;
  const std::int64_t plane = std::int64_t{a.tile.batch_begin} * a.shape.groups + blockIdx.x / most;
  if (i >= tokens.end || !is_wanted(a.k_cmp, a.fill_halo, i)) return;
  mean_of<T>(a.shape, a.k_raw, a.k_cmp, a.fill_halo, plane, i);
  mean_of<T>(a.shape, a.v_raw, a.v_cmp, a.fill_halo, plane, i);
}

// Shared memory: x [together][D] (one position of each token), hidden [together][phi_hidden].
template <class T>
__global__ void mlp_kernel(CompressArgs a, std::int64_t most) {
  extern __shared__ float shared[];
  const bool keys = blockIdx.y == 0;
  const KvView raw = keys ? a.k_raw : a.v_raw, cmp = keys ? a.k_cmp : a.v_cmp;
  const PhiWeights phi = keys ? a.phi_k : a.phi_v;
  const T *pos = static_cast<const T*>(phi.pos), *w1 = static_cast<const T*>(phi.w1),
          *w2 = static_cast<const T*>(phi.w2);
  const int width = cmp.width, units = a.shape.phi_hidden;
  float *x = shared, *hidden = shared + together * width;
  const std::int64_t strips = (most + together - 1) / together;
  const TokenRange tokens = completed(a.shape, a.tile);
  const std::int64_t begin = tokens.begin + blockIdx.x % strips * together;
  const std::int64_t plane = std::int64_t{a.tile.batch_begin} * a.shape.groups + blockIdx.x / strips;
  bool wanted[together], any = false;
  for (int n = 0; n < together; ++n)
    any |= wanted[n] = begin + n < tokens.end && is_wanted(cmp, a.fill_halo, begin + n);
  if (!any) return;
  for (int unit0 = 0; unit0 < units; unit0 += blockDim.x) {  // every unit when phi_hidden <= blockDim.x
    const int unit = unit0 + threadIdx.x;
    float sums[together] = {};
    for (int m = 0; m < a.shape.rules.l; ++m) {
      __syncthreads();
      for (int item = threadIdx.x; item < together * width; item += blockDim.x) {
        const int n = item / width, e = item % width;
        const std::int64_t first = (begin + n) * a.shape.rules.d;
        x[item] = wanted[n] ? to_float(static_cast<const T*>(
                                  raw.data)[offset_in_chunk(raw, plane, chunk_of(raw.map, first), first + m) + e]) +
                                  to_float(pos[m * width + e])
                            : 0.0f;
      }
      __syncthreads();
      if (unit >= units) continue;
      for (int e = 0; e < width; ++e) {
        const float w = to_float(w1[(std::int64_t{m} * width + e) * units + unit]);
#pragma unroll
        for (int n = 0; n < together; ++n) sums[n] += x[n * width + e] * w;
      }
    }
    if (unit < units)
#pragma unroll
      for (int n = 0; n < together; ++n) hidden[n * units + unit] = sums[n] / (1.0f + expf(-sums[n]));
  }
  __syncthreads();
  for (int item = threadIdx.x; item < together * width; item += blockDim.x) {
    const int n = item / width, e = item % width;
    if (begin + n >= tokens.end || !is_wanted(cmp, a.fill_halo, begin + n)) continue;
    float sum = 0.0f;
    for (int unit = 0; unit < units; ++unit) sum += hidden[n * units + unit] * to_float(w2[unit * width + e]);
    write_token<T>(cmp, a.fill_halo, plane, begin + n, e, sum);
  }
}

}  // namespace

void compress(const CompressArgs& a, Stream* stream) {
  const std::int64_t planes = std::int64_t{a.tile.batches} * a.shape.groups, most = most_completed(a.shape, a.tile);
  if (planes == 0 || a.tile.tokens == 0) return;
  with_type(a.shape.dtype, [&](auto type) {
    using T = decltype(type);
    if (a.shape.phi == PhiKind::mean) {
      mean_kernel<T><<<static_cast<unsigned>(planes * most), 128, 0, cuda(stream)>>>(a, most);
      return;
    }
    const std::int64_t strips = (most + together - 1) / together;
    const std::size_t shared =
        together * (static_cast<std::size_t>(std::max(a.shape.d_k, a.shape.d_v)) + a.shape.phi_hidden) * sizeof(float);
    allow_shared(mlp_kernel<T>, shared);
    mlp_kernel<T><<<dim3(static_cast<unsigned>(planes * strips), 2), 256, shared, cuda(stream)>>>(a, most);
  });
  check_launch("compress");
}

}  // namespace nsa::gpu
