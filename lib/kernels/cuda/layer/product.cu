// The matrix products around the attention. Many rows: cuBLAS with fp32 accumulation and result. Few rows (decode): the
// bound is reading the weights once (bytes of w / bandwidth), and a kernel here reads its first weights before its
// predecessor completes.
//
// 16-bit, up to 32 rows: tensor cores. A CTA has 64 columns, a cluster of CTAs shares the depth of a strip where strips
// alone do not fill the SMs. Warps split the depth 16 rows of w at a time and have four such steps in flight in
// registers; no operand passes through shared memory. Warps, then CTAs, are added in order.
// Up to 8 rows, other shapes: a CTA has 8 vectors of columns, its threads split the depth and add up in order.

#include "kernels/cuda/attention/split_kv.cuh"
#include "kernels/cuda/layer/product.cuh"
#include "kernels/cuda/layer/stages.cuh"
#include "kernels/cuda/primitives/mma.cuh"
#include "kernels/cuda/runtime/cublas.cuh"

namespace nsa::gpu {

namespace {

constexpr int threads = 256, warps = threads / 32;
constexpr int scalar_rows = 8, mma_rows = 32;  // most rows of the two kernels

template <class T, int V>
struct alignas(sizeof(T) * V) Vector {
  T v[V];
};

struct Output {
  float* values;
  float* sum;  ///< null, or += values
  __device__ __forceinline__ void store(std::int64_t at, float x) const {
    values[at] = x;
    if (sum) sum[at] += x;
  }
};

template <class T>
__device__ __forceinline__ float rounded(float x, T) {
  T stored;
  store(&stored, x);
  return to_float(stored);
}

// Factors of rmsnorm, as the kernel of KernelTable::rmsnorm forms them. A CTA forms all, so it suits few rows.
__device__ void normalise(int rows, int depth, const float* residual, float* factors) {
  __shared__ float sums[warps];
  for (int r = 0; r < rows; ++r) {
    float sum = 0;
    for (int e = threadIdx.x; e < depth; e += threads) sum += residual[r * depth + e] * residual[r * depth + e];
    sum = warp_sum(sum);
    __syncthreads();
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0;
    for (int warp = 0; warp < warps; ++warp) sum += sums[warp];
    if (threadIdx.x == 0) factors[r] = 1.0f / sqrtf(sum / depth + 1e-6f);
  }
  __syncthreads();
}

// V columns a thread, `strip` threads across.
template <class T, int V>
__global__ void __launch_bounds__(threads) scalar_product_kernel(int rows, int depth, std::int64_t columns, const T* x,
                                                                 const T* w, Output out, const float* residual) {
  constexpr int strip = 8, slices = threads / strip, in_flight = 8;
  __shared__ float sums[warps][scalar_rows][strip * V];
  const int column_in_strip = threadIdx.x % strip, slice = threadIdx.x / strip, warp = threadIdx.x / 32;
  const std::int64_t column = (std::int64_t{blockIdx.x} * strip + column_in_strip) * V;
  const bool exists = column < columns;
  float acc[scalar_rows][V] = {};
  Vector<T, V> weights[in_flight];
  const auto load = [&](int k0) {
#pragma unroll
    for (int i = 0; i < in_flight; ++i)
      if (exists && k0 + i * slices < depth)
        weights[i] = *reinterpret_cast<const Vector<T, V>*>(w + (k0 + i * slices) * columns + column);
  };
  load(slice);
  griddep_wait();
  __shared__ float factors[scalar_rows];
  if (residual) normalise(rows, depth, residual, factors);
  const auto x_at = [&](int r, int k) {
    const std::int64_t at = std::int64_t{r} * depth + k;
    return residual ? rounded(residual[at] * factors[r], T{}) : to_float(x[at]);
  };
  for (int k0 = slice; k0 < depth; k0 += in_flight * slices) {
    if (k0 != slice) load(k0);
#pragma unroll
    for (int r = 0; r < scalar_rows; ++r) {
      if (r >= rows) break;
      float value[in_flight];
#pragma unroll
      for (int i = 0; i < in_flight; ++i) value[i] = k0 + i * slices < depth ? x_at(r, k0 + i * slices) : 0.0f;
#pragma unroll
      for (int i = 0; i < in_flight; ++i) {
        if (!exists || k0 + i * slices >= depth) continue;
#pragma unroll
        for (int v = 0; v < V; ++v) acc[r][v] += value[i] * to_float(weights[i].v[v]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < scalar_rows; ++r) {
    if (r >= rows) break;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      for (int step = 16; step >= strip; step /= 2) acc[r][v] += __shfl_xor_sync(0xffffffffu, acc[r][v], step);
      if (threadIdx.x % 32 < strip) sums[warp][r][column_in_strip * V + v] = acc[r][v];
    }
  }
  __syncthreads();
  for (int item = threadIdx.x; item < rows * strip * V; item += threads) {
    const int r = item / (strip * V), c = item % (strip * V);
    const std::int64_t at = std::int64_t{blockIdx.x} * strip * V + c;
    if (at >= columns) continue;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < warps; ++i) sum += sums[i][r][c];
    out.store(r * columns + at, sum);
  }
}

template <class T, int V>
void launch_scalar_product(const Product& p, Stream* stream) {
  const std::int64_t strips = (p.columns + 8 * V - 1) / (8 * V);
  launch_pdl(scalar_product_kernel<T, V>, dim3(static_cast<unsigned>(strips)), threads, 0, stream, 1,
             static_cast<int>(p.rows), p.depth, p.columns, static_cast<const T*>(p.x), static_cast<const T*>(p.w),
             Output{p.out, p.sum}, p.residual);
}

constexpr int strip_columns = 64, step_depth = 16, steps_in_flight = 4, max_splits = 8;
constexpr int sum_pitch = strip_columns + 8;

// M tiles of 16 rows. Of a step, lane (g, c) of a warp has rows 4c .. 4c + 3 of w at columns 8g .. 8g + 7, which are
// the operands B of eight products: column n of product j is 8n + j, depth 2c, 2c + 1, 2c + 8, 2c + 9 is 4c .. 4c + 3.
template <class T, int M>
struct MmaProduct {
  int rows, depth, split, splits;  // split: index of this CTA among those of its strip
  std::int64_t columns;
  const T *x, *w;
  uint4 weights[steps_in_flight][4];
  uint2 values[steps_in_flight][M][2];
  float acc[M][8][4];

  __device__ __forceinline__ int begin() const { return (split * warps + static_cast<int>(threadIdx.x) / 32); }
  __device__ __forceinline__ int stride() const { return splits * warps; }
  __device__ __forceinline__ int steps() const { return depth / step_depth; }

  __device__ __forceinline__ void load_weights(int slot, int step) {
    if (step >= steps()) return;
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    const std::int64_t first = std::int64_t{blockIdx.x / splits} * strip_columns + g * 8,
                       column = first < columns ? first : columns - 8;
    const T* from = w + (std::int64_t{step} * step_depth + c * 4) * columns + column;
#pragma unroll
    for (int i = 0; i < 4; ++i) weights[slot][i] = load_no_allocate(from + i * columns);
  }
  __device__ __forceinline__ void load_values(int slot, int step) {
    if (step >= steps()) return;
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = min(m * 16 + half * 8 + g, rows - 1);  // of rows that do not exist nothing is stored
        values[slot][m][half] =
            *reinterpret_cast<const uint2*>(x + std::int64_t{row} * depth + step * step_depth + c * 4);
      }
  }
  __device__ __forceinline__ void multiply(int slot, int step) {
    if (step >= steps()) return;
    const uint4(&w4)[4] = weights[slot];
    const auto products = [&](auto word, unsigned r0, unsigned r1, unsigned r2, unsigned r3) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const unsigned order = odd ? 0x7632 : 0x5410, b0 = __byte_perm(r0, r1, order), b1 = __byte_perm(r2, r3, order);
#pragma unroll
        for (int m = 0; m < M; ++m)
          mma(acc[m][2 * word + odd], values[slot][m][0].x, values[slot][m][1].x, values[slot][m][0].y,
              values[slot][m][1].y, b0, b1, T{});
      }
    };
    products(std::integral_constant<int, 0>{}, w4[0].x, w4[1].x, w4[2].x, w4[3].x);
    products(std::integral_constant<int, 1>{}, w4[0].y, w4[1].y, w4[2].y, w4[3].y);
    products(std::integral_constant<int, 2>{}, w4[0].z, w4[1].z, w4[2].z, w4[3].z);
    products(std::integral_constant<int, 3>{}, w4[0].w, w4[1].w, w4[2].w, w4[3].w);
  }
  __device__ __forceinline__ void mainloop() {
#pragma unroll
    for (int u = 0; u < steps_in_flight; ++u) load_weights(u, begin() + u * stride());
    griddep_wait();
#pragma unroll
    for (int u = 0; u < steps_in_flight; ++u) load_values(u, begin() + u * stride());
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[m][j][i] = 0.0f;
#pragma unroll 1
    for (int step0 = begin(); step0 < steps(); step0 += steps_in_flight * stride()) {
#pragma unroll
      for (int u = 0; u < steps_in_flight; ++u) {
        const int step = step0 + u * stride(), next = step + steps_in_flight * stride();
        multiply(u, step);
        load_weights(u, next);
        load_values(u, next);
      }
    }
  }
  // Sums of a tile over the warps: [16][sum_pitch], column 8n + j at 8j + n.
  __device__ __forceinline__ void sum_warps(int m, float* of_warps, float* total) const {
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    float* own = of_warps + threadIdx.x / 32 * 16 * sum_pitch;
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < M; ++tile) {
      if (tile != m) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        *reinterpret_cast<float2*>(own + g * sum_pitch + j * 8 + 2 * c) = make_float2(acc[tile][j][0], acc[tile][j][1]);
        *reinterpret_cast<float2*>(own + (g + 8) * sum_pitch + j * 8 + 2 * c) =
            make_float2(acc[tile][j][2], acc[tile][j][3]);
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 16 * strip_columns / threads; ++i) {
      const int item = i * threads + threadIdx.x, at = item / strip_columns * sum_pitch + item % strip_columns;
      float sum = 0.0f;
#pragma unroll
      for (int warp = 0; warp < warps; ++warp) sum += of_warps[warp * 16 * sum_pitch + at];
      total[at] = sum;
    }
  }
  // Adds the CTAs of the strip; each stores a share of the rows.
  __device__ __forceinline__ void store(int m, float* total, const Output& out) const {
    splits > 1 ? cluster_barrier() : __syncthreads();
    const std::int64_t first = std::int64_t{blockIdx.x / splits} * strip_columns;
    const int share = 16 / splits;
#pragma unroll 1
    for (int item = threadIdx.x; item < share * strip_columns; item += threads) {
      const int in_tile = split * share + item / strip_columns, row = m * 16 + in_tile, column = item % strip_columns;
      if (row >= rows || first + column >= columns) continue;
      float* mine = total + in_tile * sum_pitch + column % 8 * 8 + column / 8;
      float sum = 0.0f;
      for (int i = 0; i < splits; ++i) sum += splits > 1 ? *map_to_cta(mine, i) : *mine;
      out.store(row * columns + first + column, sum);
    }
    if (splits > 1) cluster_barrier();  // the others have read `total`
  }
};

template <class T, int M>
__global__ void __launch_bounds__(threads, M == 1 ? 2 : 1)
    mma_product_kernel(int rows, int depth, std::int64_t columns, int splits, const T* x, const T* w, Output out) {
  __shared__ float of_warps[warps * 16 * sum_pitch], total[16 * sum_pitch];
  MmaProduct<T, M> product{rows, depth, static_cast<int>(blockIdx.x) % splits, splits, columns, x, w};
  product.mainloop();
#pragma unroll 1
  for (int m = 0; m < M; ++m) {
    if (m * 16 >= rows) break;
    product.sum_warps(m, of_warps, total);
    product.store(m, total, out);
  }
}

// As many CTAs as fill every SM twice, of at least eight steps a warp pair.
int splits_of(std::int64_t strips, int depth) {
  int splits = 1;
  while (limits().capability >= 90 && splits < max_splits && strips * splits * 2 <= 2 * limits().sms &&
         depth / (2 * splits) >= warps * step_depth * steps_in_flight)
    splits *= 2;
  return splits;
}

template <class T>
void launch_mma_product(const Product& p, Stream* stream) {
  const std::int64_t strips = (p.columns + strip_columns - 1) / strip_columns;
  const int splits = splits_of(strips, p.depth);
  const auto launch = [&](auto* kernel) {
    launch_pdl(kernel, dim3(static_cast<unsigned>(strips * splits)), threads, 0, stream, splits,
               static_cast<int>(p.rows), p.depth, p.columns, splits, static_cast<const T*>(p.x),
               static_cast<const T*>(p.w), Output{p.out, p.sum});
  };
  p.rows <= 16 ? launch(mma_product_kernel<T, 1>) : launch(mma_product_kernel<T, 2>);
}

// Row-major, so cuBLAS sees the transposes: out^T [columns, rows] = w^T x^T; no operand is transposed in memory.
void blas_product(const Product& p, Stream* stream) {
  const float one = 1.0f, zero = 0.0f;
  const cudaDataType storage = storage_type(p.type);
  check(cublasGemmEx(blas(stream), CUBLAS_OP_N, CUBLAS_OP_N, static_cast<int>(p.columns), static_cast<int>(p.rows),
                     p.depth, &one, p.w, storage, static_cast<int>(p.columns), p.x, storage, p.depth, &zero, p.out,
                     CUDA_R_32F, static_cast<int>(p.columns), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
        "cublasGemmEx");
  if (p.sum) add(p.rows * p.columns, p.sum, p.out, stream);
}

bool mma_accepts(const Product& p) {
  return limits().capability >= 80 && p.type != DType::f32 && p.rows <= mma_rows && p.depth % step_depth == 0 &&
         p.columns % 8 == 0;
}

}  // namespace

bool normalises(const Product& p) { return !mma_accepts(p) && p.rows <= scalar_rows; }

void product(const Product& p, Stream* stream) {
  if (mma_accepts(p))
    return p.type == DType::bf16 ? launch_mma_product<__nv_bfloat16>(p, stream) : launch_mma_product<__half>(p, stream);
  if (p.rows > scalar_rows) return blas_product(p, stream);
  with_type(p.type, [&](auto t) {
    using T = decltype(t);
    constexpr int vector = 16 / sizeof(T);
    p.columns % vector == 0 ? launch_scalar_product<T, vector>(p, stream) : launch_scalar_product<T, 1>(p, stream);
  });
}

}  // namespace nsa::gpu
