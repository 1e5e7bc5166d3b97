// project and output: matrix products around the attention; the fused decode prologue.
//
// Many rows: cuBLAS with fp32 accumulation and result. Few rows (decode): a skinny GEMM whose bound is reading the
// weights once (bytes of w / bandwidth): a CTA has a strip of columns, its threads split the reduction and add up in
// shared memory in a fixed order. Then one CTA a (row, group) applies RoPE, rounds, scatters and computes the gate.

#include "kernels/cuda/layer/append_compress.cuh"
#include "kernels/cuda/layer/stages.cuh"
#include "kernels/cuda/runtime/cublas.cuh"

namespace nsa::gpu {

namespace {

constexpr int skinny_rows = 8;
constexpr int threads = 256, gate_threads = 128;

template <class T, int V>
struct alignas(sizeof(T) * V) Vector {
  T v[V];
};

// out [rows, columns] = x [rows, depth] * w [depth, columns]. V columns a thread, `strip` threads across. The first
// weights are loaded before the predecessor, which computes x, completes.
template <class T, int V>
__global__ void __launch_bounds__(threads)
    skinny_gemm_kernel(int rows, int depth, std::int64_t columns, const T* x, const T* w, float* out) {
  constexpr int strip = 8, slices = threads / strip, in_flight = 8;
  __shared__ float sums[slices][strip * V + 1];
  const int column_in_strip = threadIdx.x % strip, slice = threadIdx.x / strip;
  const std::int64_t column = (std::int64_t{blockIdx.x} * strip + column_in_strip) * V;
  float acc[skinny_rows][V] = {};
  if (column < columns) {
    Vector<T, V> weights[in_flight];
    const auto load = [&](int k0) {
#pragma unroll
      for (int i = 0; i < in_flight; ++i)
        if (k0 + i * slices < depth)
          weights[i] = *reinterpret_cast<const Vector<T, V>*>(w + (k0 + i * slices) * columns + column);
    };
    load(slice);
    griddep_wait();
    for (int k0 = slice; k0 < depth; k0 += in_flight * slices) {
      if (k0 != slice) load(k0);
#pragma unroll
      for (int r = 0; r < skinny_rows; ++r) {
        if (r >= rows) break;
        float value[in_flight];
#pragma unroll
        for (int i = 0; i < in_flight; ++i)
          value[i] = k0 + i * slices < depth ? to_float(x[std::int64_t{r} * depth + k0 + i * slices]) : 0.0f;
#pragma unroll
        for (int i = 0; i < in_flight; ++i)
          if (k0 + i * slices < depth)
#pragma unroll
            for (int v = 0; v < V; ++v) acc[r][v] += value[i] * to_float(weights[i].v[v]);
      }
    }
  } else {
    griddep_wait();
  }
#pragma unroll
  for (int r = 0; r < skinny_rows; ++r) {
    if (r >= rows) break;
    __syncthreads();
#pragma unroll
    for (int v = 0; v < V; ++v) sums[slice][column_in_strip * V + v] = acc[r][v];
    __syncthreads();
    const int c = threadIdx.x;
    const std::int64_t at = std::int64_t{blockIdx.x} * strip * V + c;
    if (c < strip * V && at < columns) {
      float sum = 0.0f;
      for (int s = 0; s < slices; ++s) sum += sums[s][c];
      out[r * columns + at] = sum;
    }
  }
}

template <class T, int V>
void launch_skinny_gemm(std::int64_t rows, int depth, std::int64_t columns, const void* x, const void* w, float* out,
                        Stream* stream) {
  const std::int64_t strips = (columns + 8 * V - 1) / (8 * V);
  launch_pdl(skinny_gemm_kernel<T, V>, dim3(static_cast<unsigned>(strips)), threads, 0, stream, 1,
             static_cast<int>(rows), depth, columns, static_cast<const T*>(x), static_cast<const T*>(w), out);
}

// Row-major, so cuBLAS sees the transposes: out^T [columns, rows] = w^T x^T; no operand is transposed in memory.
void product(DType type, std::int64_t rows, int depth, std::int64_t columns, const void* x, const void* w, float* out,
             Stream* stream) {
  if (rows > skinny_rows) {
    const float one = 1.0f, zero = 0.0f;
    const cudaDataType storage = storage_type(type);
    check(cublasGemmEx(blas(stream), CUBLAS_OP_N, CUBLAS_OP_N, static_cast<int>(columns), static_cast<int>(rows), depth,
                       &one, w, storage, static_cast<int>(columns), x, storage, depth, &zero, out, CUDA_R_32F,
                       static_cast<int>(columns), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
          "cublasGemmEx");
    return;
  }
  with_type(type, [&](auto t) {
    using T = decltype(t);
    constexpr int vector = 16 / sizeof(T);
    if (columns % vector == 0)
      launch_skinny_gemm<T, vector>(rows, depth, columns, x, w, out, stream);
    else
      launch_skinny_gemm<T, 1>(rows, depth, columns, x, w, out, stream);
  });
}

// kv_column_order for device code, which cannot index the array.
__device__ Branch branch_in_column(int order) { return order == 0 ? sel : order == 1 ? cmp : win; }
static_assert(kv_column_order[0] == sel && kv_column_order[1] == cmp && kv_column_order[2] == win);

// First column of K of a branch in the product; its V follows.
__device__ std::int64_t kv_column(const LayerShape& s, int order) {
  return std::int64_t{s.heads()} * s.d_k + std::int64_t{order} * s.groups * (s.d_k + s.d_v);
}

__device__ float apply_rope(const float* from, const float2* cos_sin, int e) {
  const float2 cs = cos_sin[e / 2];
  const float even = from[e & ~1], odd = from[e | 1];
  return e & 1 ? even * cs.y + odd * cs.x : even * cs.x - odd * cs.y;
}

__device__ void write_gate(const ProjectArgs& a, float* gate, const float* mean, float* hidden) {
  const LayerShape& s = a.shape;
  const int half = s.d_k / 2;
  // Rounds of the hidden layer; the terms of a unit are split over the remaining threads.
  __shared__ float slices[gate_threads];
  const int units_per_round = min(half, static_cast<int>(blockDim.x)),
            split = max(1, static_cast<int>(blockDim.x) / units_per_round);
  for (int j0 = 0; j0 < half; j0 += units_per_round) {
    const int j = j0 + threadIdx.x % units_per_round, slice = threadIdx.x / units_per_round;
    float sum = 0.0f;
    if (j < half && slice < split)
#pragma unroll 16
      for (int e = slice; e < s.d_k; e += split) sum += mean[e] * a.weights.gate_w1[e * half + j];
    slices[threadIdx.x] = sum;
    __syncthreads();
    if (slice == 0 && j < half) {
      sum = a.weights.gate_b1[j];
      for (int i = 0; i < split; ++i) sum += slices[i * units_per_round + threadIdx.x];
      hidden[j] = sum / (1.0f + expf(-sum));
    }
    __syncthreads();
  }
  if (threadIdx.x >= 32) return;
  float logits[branches];
  for (int b = 0; b < branches; ++b) {
    float sum = 0.0f;
    for (int j = threadIdx.x; j < half; j += 32) sum += hidden[j] * a.weights.gate_w2[j * branches + b];
    logits[b] = warp_sum(sum) + a.weights.gate_b2[b];
  }
  if (threadIdx.x != 0) return;
  if (s.gate == GateKind::sigmoid) {
    for (int b = 0; b < branches; ++b) gate[b] = 1.0f / (1.0f + expf(-logits[b]));
    return;
  }
  const float max_logit = fmaxf(fmaxf(logits[0], logits[1]), logits[2]);
  float total = 0.0f;
  for (int b = 0; b < branches; ++b) total += logits[b] = expf(logits[b] - max_logit);
  for (int b = 0; b < branches; ++b) gate[b] = logits[b] / total;
}

// Row (r, g) of the product to q, k, v and gate, by 128 threads. Shared memory: cos and sin [Dk/2], mean of the rotated
// q over the heads of the group [Dk], hidden layer of the gate [Dk/2].
template <class T>
__device__ void rope_and_gate(const ProjectArgs& a, const float* product, std::int64_t columns, float2* cos_sin) {
  const LayerShape& s = a.shape;
  const int h = s.heads_per_group, half = s.d_k / 2;
  float* mean = reinterpret_cast<float*>(cos_sin + half);
  float* hidden = mean + s.d_k;
  const std::int64_t row = blockIdx.x / s.groups, g = blockIdx.x % s.groups;
  const float* from = product + row * columns;
  // The position was set before the predecessor began, so the angles do not wait for it.
  const double t = static_cast<double>(tile_row(a.tile, row).t);
  for (int i = threadIdx.x; i < half; i += blockDim.x) {
    double sine, cosine;
    sincos(t * pow(s.rope_base, -2.0 * i / s.d_k), &sine, &cosine);
    cos_sin[i] = make_float2(static_cast<float>(cosine), static_cast<float>(sine));
  }
  griddep_wait();
  __syncthreads();
  for (int e = threadIdx.x; e < s.d_k; e += blockDim.x) {
    float sum = 0.0f;
    for (int j = 0; j < h; ++j) {
      const std::int64_t head = g * h + j;
      T* to = static_cast<T*>(a.q) + (row * s.heads() + head) * s.d_k + e;
      store(to, apply_rope(from + head * s.d_k, cos_sin, e));
      sum += to_float(*to);
    }
    mean[e] = sum / h;
  }
  for (int order = 0; order < (s.shared_kv ? 1 : branches); ++order) {
    const Branch b = branch_in_column(order);
    const float* k = from + kv_column(s, order) + g * s.d_k;
    const float* v = from + kv_column(s, order) + s.groups * s.d_k + g * s.d_v;
    for (int e = threadIdx.x; e < s.d_k; e += blockDim.x)
      store(static_cast<T*>(a.k[b]) + (row * s.groups + g) * s.d_k + e, apply_rope(k, cos_sin, e));
    for (int e = threadIdx.x; e < s.d_v; e += blockDim.x)
      store(static_cast<T*>(a.v[b]) + (row * s.groups + g) * s.d_v + e, v[e]);
  }
  float* gate = a.gate + (row * s.groups + g) * branches;
  if (a.force_branch >= 0) {
    if (threadIdx.x < branches) gate[threadIdx.x] = static_cast<int>(threadIdx.x) == a.force_branch ? 1.0f : 0.0f;
    return;
  }
  __syncthreads();
  write_gate(a, gate, mean, hidden);
}

template <class T>
__global__ void __launch_bounds__(gate_threads)
    rope_gate_kernel(const __grid_constant__ ProjectArgs a, const float* product, std::int64_t columns) {
  extern __shared__ float2 cos_sin[];
  rope_and_gate<T>(a, product, columns, cos_sin);
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
__global__ void __launch_bounds__(gate_threads) decode_prologue_kernel(const __grid_constant__ DecodePrologueParams p) {
  extern __shared__ float2 cos_sin[];
  const LayerShape& s = p.a.append[sel].shape;
  const QueryTile& tile = p.a.append[sel].tile;
  const std::int64_t work_item = blockIdx.x, plane = std::int64_t{tile.batch_begin} * s.groups + work_item;
  if (p.product)
    rope_and_gate<T>(p.a.project, p.product, p.columns, cos_sin);
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

std::size_t gate_shared(const LayerShape& s) { return static_cast<std::size_t>(s.d_k) * 5 / 2 * sizeof(float) + 16; }

float* compute_product(const ProjectArgs& a, Stream* stream) {
  if (a.scratch_bytes < project_scratch(a.shape, a.tile)) throw InternalError("project: scratch too small");
  auto* sums = static_cast<float*>(a.scratch);
  product(a.shape.dtype, a.tile.rows(), a.shape.dim, qkv_columns(a.shape), a.x, a.weights.w_qkv, sums, stream);
  return sums;
}

}  // namespace

std::size_t project_scratch(const LayerShape& s, const QueryTile& tile) {
  return static_cast<std::size_t>(tile.rows() * qkv_columns(s)) * sizeof(float);
}

void project(const ProjectArgs& a, Stream* stream) {
  const std::int64_t rows = a.tile.rows();
  if (rows == 0) return;
  const float* sums = compute_product(a, stream);
  with_type(a.shape.dtype, [&](auto type) {
    launch_pdl(rope_gate_kernel<decltype(type)>, dim3(static_cast<unsigned>(rows * a.shape.groups)), gate_threads,
               gate_shared(a.shape), stream, 1, a, sums, qkv_columns(a.shape));
  });
}

void decode_prologue(const PrologueArgs& a, Stream* stream) {
  const LayerShape& s = a.append[sel].shape;
  const QueryTile& tile = a.append[sel].tile;
  if (tile.rows() == 0) return;
  DecodePrologueParams p{a, nullptr, qkv_columns(s), s.phi == PhiKind::mean};
  if (a.projects) p.product = compute_product(a.project, stream);
  with_type(s.dtype, [&](auto type) {
    launch_pdl(decode_prologue_kernel<decltype(type)>, dim3(static_cast<unsigned>(tile.rows() * s.groups)),
               gate_threads, gate_shared(s), stream, 1, p);
  });
  if (!p.compresses) compress(a.compress, stream);
}

void output(const OutputArgs& a, Stream* stream) {
  const std::int64_t rows = a.tile.rows();
  if (rows == 0) return;
  const LayerShape& s = a.shape;
  const auto* w_o = static_cast<const std::byte*>(a.w_o) +
                    std::int64_t{a.heads.first} * s.d_v * s.dim * static_cast<std::int64_t>(size_of(s.dtype));
  product(s.dtype, rows, a.heads.count * s.d_v, s.dim, a.o, w_o, a.y, stream);
}

}  // namespace nsa::gpu
