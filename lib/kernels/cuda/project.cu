// project and output: matrix products around the attention.
//
// Many rows: cuBLAS, fp32 accumulation and result. Few rows (decode): the weights are read once and that is the
// bound (bytes of w / bandwidth), so a CTA takes a strip of columns, its threads split the reduction and add up in
// shared memory in a fixed order. Then one CTA a (row, group) rotates, rounds, scatters and computes the gate.

#include "kernels/cuda/blas.cuh"
#include "kernels/cuda/stages.cuh"

namespace nsa::gpu {

namespace {

constexpr int few_rows = 8;
constexpr int threads = 256;

template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

// out [rows, columns] = x [rows, depth] * w [depth, columns]. V columns a thread, `strip` threads across.
template <class T, int V>
__global__ void __launch_bounds__(threads)
    few_rows_product(int rows, int depth, std::int64_t columns, const T* x, const T* w, float* out) {
  constexpr int strip = 8, slices = threads / strip;
  __shared__ float sums[slices][strip * V + 1];
  const int across = threadIdx.x % strip, slice = threadIdx.x / strip;
  const std::int64_t column = (std::int64_t{blockIdx.x} * strip + across) * V;
  float acc[few_rows][V] = {};
  if (column < columns) {
#pragma unroll 4
    for (int k = slice; k < depth; k += slices) {
      const Pack<T, V> weights = *reinterpret_cast<const Pack<T, V>*>(w + k * columns + column);
#pragma unroll
      for (int r = 0; r < few_rows; ++r) {
        if (r >= rows) break;
        const float value = to_float(x[std::int64_t{r} * depth + k]);
#pragma unroll
        for (int v = 0; v < V; ++v) acc[r][v] += value * to_float(weights.v[v]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < few_rows; ++r) {
    if (r >= rows) break;
    __syncthreads();
#pragma unroll
    for (int v = 0; v < V; ++v) sums[slice][across * V + v] = acc[r][v];
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
void launch_few_rows(std::int64_t rows, int depth, std::int64_t columns, const void* x, const void* w, float* out,
                     Stream* stream) {
  const std::int64_t strips = (columns + 8 * V - 1) / (8 * V);
  few_rows_product<T, V><<<static_cast<unsigned>(strips), threads, 0, cuda(stream)>>>(
      static_cast<int>(rows), depth, columns, static_cast<const T*>(x), static_cast<const T*>(w), out);
  check_launch("few_rows_product");
}

// Row-major, so cuBLAS sees the transposes: out^T [columns, rows] = w^T x^T, no operand transposed in memory.
void product(DType type, std::int64_t rows, int depth, std::int64_t columns, const void* x, const void* w, float* out,
             Stream* stream) {
  if (rows > few_rows) {
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
    constexpr int wide = 16 / sizeof(T);
    if (columns % wide == 0)
      launch_few_rows<T, wide>(rows, depth, columns, x, w, out, stream);
    else
      launch_few_rows<T, 1>(rows, depth, columns, x, w, out, stream);
  });
}

// kv_column_order where device code can index it.
__device__ Branch branch_in_column(int order) { return order == 0 ? sel : order == 1 ? cmp : win; }
static_assert(kv_column_order[0] == sel && kv_column_order[1] == cmp && kv_column_order[2] == win);

// The column where K of a branch begins in the product; its V follows.
__device__ std::int64_t kv_column(const LayerShape& s, int order) {
  return std::int64_t{s.heads()} * s.d_k + std::int64_t{order} * s.groups * (s.d_k + s.d_v);
}

__device__ float rotated(const float* from, const float2* turn, int e) {
  const float2 cs = turn[e / 2];
  const float even = from[e & ~1], odd = from[e | 1];
  return e & 1 ? even * cs.y + odd * cs.x : even * cs.x - odd * cs.y;
}

__device__ void write_gate(const ProjectArgs& a, float* gate, const float* mean, float* hidden) {
  const LayerShape& s = a.shape;
  const int half = s.d_k / 2;
  for (int j = threadIdx.x; j < half; j += blockDim.x) {
    float sum = a.weights.gate_b1[j];
    for (int e = 0; e < s.d_k; ++e) sum += mean[e] * a.weights.gate_w1[e * half + j];
    hidden[j] = sum / (1.0f + expf(-sum));
  }
  __syncthreads();
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
  const float top = fmaxf(fmaxf(logits[0], logits[1]), logits[2]);
  float total = 0.0f;
  for (int b = 0; b < branches; ++b) total += logits[b] = expf(logits[b] - top);
  for (int b = 0; b < branches; ++b) gate[b] = logits[b] / total;
}

// Shared memory: cos and sin [Dk/2], mean of the rotated q over the group's heads [Dk], gate's hidden layer [Dk/2].
template <class T>
__global__ void rotate_and_gate(ProjectArgs a, const float* product, std::int64_t columns) {
  extern __shared__ float2 turn[];
  const LayerShape& s = a.shape;
  const int h = s.heads_per_group, half = s.d_k / 2;
  float* mean = reinterpret_cast<float*>(turn + half);
  float* hidden = mean + s.d_k;
  const std::int64_t row = blockIdx.x / s.groups, g = blockIdx.x % s.groups;
  const float* from = product + row * columns;
  const double t = static_cast<double>(tile_row(a.tile, row).t);
  for (int i = threadIdx.x; i < half; i += blockDim.x) {
    double sine, cosine;
    sincos(t * pow(s.rope_base, -2.0 * i / s.d_k), &sine, &cosine);
    turn[i] = make_float2(static_cast<float>(cosine), static_cast<float>(sine));
  }
  __syncthreads();
  for (int e = threadIdx.x; e < s.d_k; e += blockDim.x) {
    float sum = 0.0f;
    for (int j = 0; j < h; ++j) {
      const std::int64_t head = g * h + j;
      T* to = static_cast<T*>(a.q) + (row * s.heads() + head) * s.d_k + e;
      store(to, rotated(from + head * s.d_k, turn, e));
      sum += to_float(*to);
    }
    mean[e] = sum / h;
  }
  for (int order = 0; order < (s.shared_kv ? 1 : branches); ++order) {
    const Branch b = branch_in_column(order);
    const float* k = from + kv_column(s, order) + g * s.d_k;
    const float* v = from + kv_column(s, order) + s.groups * s.d_k + g * s.d_v;
    for (int e = threadIdx.x; e < s.d_k; e += blockDim.x)
      store(static_cast<T*>(a.k[b]) + (row * s.groups + g) * s.d_k + e, rotated(k, turn, e));
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

}  // namespace

std::size_t project_scratch(const LayerShape& s, const QueryTile& tile) {
  return static_cast<std::size_t>(tile.rows() * qkv_columns(s)) * sizeof(float);
}

void project(const ProjectArgs& a, Stream* stream) {
  const std::int64_t rows = a.tile.rows(), columns = qkv_columns(a.shape);
  if (rows == 0) return;
  if (a.scratch_bytes < project_scratch(a.shape, a.tile)) throw InternalError("project: scratch too small");
  float* sums = static_cast<float*>(a.scratch);
  product(a.shape.dtype, rows, a.shape.dim, columns, a.x, a.weights.w_qkv, sums, stream);
  const std::size_t shared = static_cast<std::size_t>(a.shape.d_k) * 5 / 2 * sizeof(float) + 16;
  with_type(a.shape.dtype, [&](auto type) {
    rotate_and_gate<decltype(type)>
        <<<static_cast<unsigned>(rows * a.shape.groups), 128, shared, cuda(stream)>>>(a, sums, columns);
  });
  check_launch("rotate_and_gate");
}

void output(const OutputArgs& a, Stream* stream) {
  if (a.rows == 0) return;
  product(a.shape.dtype, a.rows, a.shape.heads() * a.shape.d_v, a.shape.dim, a.o, a.w_o, a.y, stream);
}

}  // namespace nsa::gpu
