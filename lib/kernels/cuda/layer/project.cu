// project and output: matrix products around the attention (layer/product.cu); the fused decode prologue.
//
// After the product one CTA a (row, group) applies RoPE, rounds, scatters and computes the gate (layer/rope_gate.cuh).

#include "kernels/cuda/layer/append_compress.cuh"
#include "kernels/cuda/layer/fp8_rows.cuh"
#include "kernels/cuda/layer/product.cuh"
#include "kernels/cuda/layer/rope_gate.cuh"
#include "kernels/cuda/layer/stages.cuh"

namespace nsa::gpu {

namespace {

constexpr int threads = 256;

template <class T>
__global__ void __launch_bounds__(threads)
    rope_gate_kernel(const __grid_constant__ ProjectArgs a, const float* product, std::int64_t columns) {
  extern __shared__ float2 shared[];
  rope_and_gate<T, threads>(a, product, columns, blockIdx.x, shared);
}

struct DecodePrologueParams {
  PrologueArgs a;
  const float* product;  // null: q, k, v and gate are inputs
  std::int64_t columns;
  bool compresses;
};

// Fused prologue of one decode row of a (sequence, group): projects, appends to the caches, completes a compressed
// token.
template <class T>
__global__ void __launch_bounds__(threads) decode_prologue_kernel(const __grid_constant__ DecodePrologueParams p) {
  extern __shared__ float2 shared[];
  const LayerShape& s = p.a.append[sel].shape;
  const QueryTile& tile = p.a.append[sel].tile;
  const std::int64_t work_item = blockIdx.x,
                     plane = std::int64_t{tile.batch_begin} * s.groups + work_item;  // one token
  if (p.product)
    rope_and_gate<T, threads>(p.a.project, p.product, p.columns, blockIdx.x, shared);
  else
    griddep_wait();
  __syncthreads();
  for (const AppendArgs& to : p.a.append) {
    for (int e = threadIdx.x; e < s.d_k; e += blockDim.x)
      append_element(tile, s.groups, static_cast<const T*>(to.k), to.k_cache, work_item * s.d_k + e);
    for (int e = threadIdx.x; e < s.d_v; e += blockDim.x)
      append_element(tile, s.groups, static_cast<const T*>(to.v), to.v_cache, work_item * s.d_v + e);
  }
  if (!p.compresses) return;
  __syncthreads();
  const CompressArgs& c = p.a.compress;
  const TokenRange tokens = completed(s, tile, work_item / s.groups);
  if (tokens.begin == tokens.end || !is_wanted(c.k_cmp, c.fill_halo, tokens.begin)) return;
  mean_of<T>(s, c.k_raw, c.k_cmp, c.fill_halo, plane, tokens.begin);
  mean_of<T>(s, c.v_raw, c.v_cmp, c.fill_halo, plane, tokens.begin);
}

}  // namespace

float* project_product(const ProjectArgs& a, Stream* stream) {
  if (a.scratch_bytes < project_scratch(a.shape, a.tile)) throw InternalError("project: scratch too small");
  auto* sums = static_cast<float*>(a.scratch);
  Product p{.type = a.shape.dtype,
            .rows = a.tile.rows(),
            .depth = a.shape.dim,
            .columns = qkv_columns(a.shape),
            .x = a.x,
            .w = a.weights.w_qkv,
            .out = sums};
  if (a.residual && normalises(p))
    p.residual = a.residual;
  else if (a.residual)
    rmsnorm(a.shape, a.tile.rows(), a.residual, a.x, true, stream);
  product(p, stream);
  return sums;
}

void project(const ProjectArgs& a, Stream* stream) {
  const std::int64_t rows = a.tile.rows();
  if (rows == 0) return;
  const float* sums = project_product(a, stream);
  with_type(a.shape.dtype, [&](auto type) {
    launch_pdl(rope_gate_kernel<decltype(type)>, dim3(static_cast<unsigned>(rows * a.shape.groups)), threads,
               gate_shared(a.shape, threads), stream, 1, a, sums, qkv_columns(a.shape));
  });
}

void decode_prologue(const PrologueArgs& a, Stream* stream) {
  const LayerShape& s = a.append[sel].shape;
  const QueryTile& tile = a.append[sel].tile;
  if (tile.rows() == 0) return;
  if (is_quantised(a.compress.k_cmp)) {
    if (a.projects) project(a.project, stream);
    return quantised_prologue(a, stream);
  }
  // With several query tokens the mean needs rows that other CTAs append.
  DecodePrologueParams p{a, nullptr, qkv_columns(s), s.phi == PhiKind::mean && tile.tokens == 1};
  if (a.projects) p.product = project_product(a.project, stream);
  with_type(s.dtype, [&](auto type) {
    launch_pdl(decode_prologue_kernel<decltype(type)>, dim3(static_cast<unsigned>(tile.rows() * s.groups)), threads,
               gate_shared(s, threads), stream, 1, p);
  });
  for (const AppendArgs& append : a.append) round_appended(append, stream);
  p.compresses ? round_compressed(a.compress, stream) : compress(a.compress, stream);
}

void output(const OutputArgs& a, Stream* stream) {
  const std::int64_t rows = a.tile.rows();
  if (rows == 0) return;
  const LayerShape& s = a.shape;
  const auto* w_o = static_cast<const std::byte*>(a.w_o) +
                    std::int64_t{a.heads.first} * s.d_v * s.dim * static_cast<std::int64_t>(size_of(s.dtype));
  product({.type = s.dtype,
           .rows = rows,
           .depth = a.heads.count * s.d_v,
           .columns = s.dim,
           .x = a.o,
           .w = w_o,
           .out = a.y,
           .sum = a.residual},
          stream);
}

}  // namespace nsa::gpu
