#pragma once
// A decode warp's engine for fp32 storage: scalar arithmetic, up to 4 heads. decode/split_kv/warp_tile.cuh says what an
// engine does.

#include "kernels/cuda/decode/split_kv/warp_tile_outputs.cuh"

namespace nsa::gpu {

/// A lane a token in scores(), neighbours 4 apart, whose rows lie in different banks (primitives/cp_async_ring.cuh); a
/// lane Dv / 32 columns in add().
template <int DK, int DV>
struct Scalars {
  using Type = float;
  static constexpr int heads = 4, d_k = DK, d_v = DV, k_bytes = DK * 4, v_bytes = DV * 4;
  static constexpr int query_bytes = heads * DK * 4, weight_bytes = tile_rows * heads * 4;
  static constexpr int ctas = DK > 64 ? 1 : 2;  // an SM
  static constexpr int columns = DV / 32;

  const float4* q;  // shared, [heads][Dk / 4]
  float4* weights;  // shared, of the warp: [tile_rows], a head an element
  float c[heads] = {};
  float o[heads][columns] = {};
  Sum2 total[heads], tile[heads];

  static __device__ __forceinline__ void fill_queries(char* to, const float* from, int present, int thread,
                                                      int threads) {
    for (int item = thread; item < heads * DK; item += threads)
      reinterpret_cast<float*>(to)[item] = item < present * DK ? from[item] : 0.0f;
  }
  static __device__ __forceinline__ void copy_queries(unsigned to, const float* from, int present, int thread,
                                                      int threads) {
    for (int item = thread; item < heads * DK / 4; item += threads) {
      const bool exists = item < present * DK / 4;
      cp_async_vector(to + item * 16, from + (exists ? item : 0) * 4, exists);
    }
  }
  __device__ __forceinline__ Scalars(char* queries, char* warp_weights)
      : q(reinterpret_cast<const float4*>(queries)), weights(reinterpret_cast<float4*>(warp_weights)) {}

  __device__ __forceinline__ void scores(unsigned slot) {
    const int lane = threadIdx.x % 32;
    float sum[heads] = {};
#pragma unroll 8
    for (int piece = 0; piece < DK / 4; ++piece) {
      const float4 k = load(slot + token() * k_bytes + piece / 8 * 128 + ((piece ^ lane) % 8) * 16);
#pragma unroll
      for (int h = 0; h < heads; ++h) sum[h] = added(sum[h], q[h * (DK / 4) + piece], k);
    }
#pragma unroll
    for (int h = 0; h < heads; ++h) c[h] = sum[h];
  }

  __device__ __forceinline__ void scale() {
    const float factor = log2_e / sqrtf(static_cast<float>(DK));
#pragma unroll
    for (int h = 0; h < heads; ++h) c[h] = __fmul_rn(c[h], factor);
  }
  __device__ __forceinline__ void put_scores(ScoreRows to, int rows, int present) const {
#pragma unroll
    for (int h = 0; h < heads; ++h)
      if (token() < rows && h < present) to.first[h * to.pitch + token()] = c[h];
  }
  __device__ __forceinline__ void put_last(const SumRows& to, int rows) const {
    if (token() == tile_rows - 1 && rows == tile_rows && to.last) put_four(to, to.last, {c[0], c[1], c[2], c[3]});
  }
  __device__ __forceinline__ void put_front(ScoreRows to, unsigned row, int present) const {
    const int lane = threadIdx.x % 32;
    const float4 x = front(row);
    const float of[heads] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int h = 0; h < heads; ++h)
      if (lane < 8 && h < present) to.first[h * to.pitch + lane - 8] = lane == 7 ? of[h] : 0.0f;
  }
  __device__ __forceinline__ void put_front(float* to, unsigned row) const {
    const float4 x = front(row);
    if (threadIdx.x % 32 == 0) *reinterpret_cast<float4*>(to) = x;
  }
  __device__ __forceinline__ void soften(int rows, const SumRows& sums = {}) {
    // Loops without a branch in them: what heads shuffle is under way side by side.
#pragma unroll
    for (int h = 0; h < heads; ++h) {
      if (token() >= rows) c[h] = -INFINITY;
      tile[h].m = fmaxf(neg_inf, warp_max(c[h]));
      c[h] = exp2_fast(c[h] - tile[h].m);
    }
    if (sums.sums) put_block_sums(sums);
#pragma unroll
    for (int h = 0; h < heads; ++h) {
      tile[h].s = warp_sum(c[h]);
      const float m = fmaxf(total[h].m, tile[h].m), factor = exp2_fast(tile[h].m - m), old = exp2_fast(total[h].m - m);
      total[h] = {m, total[h].s * old + tile[h].s * factor};
      c[h] *= factor;
#pragma unroll
      for (int e = 0; e < columns; ++e) o[h][e] *= old;
    }
    __syncwarp();  // the last tile's weights are read
    weights[token()] = {c[0], c[1], c[2], c[3]};
    __syncwarp();
  }

  __device__ __forceinline__ void add(unsigned slot) {
    const int lane = threadIdx.x % 32, piece = lane * columns / 4, within = lane * columns % 4;
#pragma unroll 8
    for (int token = 0; token < slot_rows; ++token) {
      const unsigned at = slot + token * v_bytes + piece / 8 * 128 + ((piece ^ token / 4) % 8) * 16 + within * 4;
      float v[columns];
      if constexpr (columns == 4) {
        const float4 x = load(at);
        v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
      } else {
        static_assert(columns == 2);
        asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(v[0]), "=f"(v[1]) : "r"(at) : "memory");
      }
      const float4 w = weights[token];
#pragma unroll
      for (int e = 0; e < columns; ++e) {
        o[0][e] += w.x * v[e], o[1][e] += w.y * v[e];
        o[2][e] += w.z * v[e], o[3][e] += w.w * v[e];
      }
    }
  }

  __device__ __forceinline__ void put_maxima(float* to, const SumRows& rows) const {
    if (threadIdx.x % 32 == 0) put_four(rows, to, {tile[0].m, tile[1].m, tile[2].m, tile[3].m});
  }
  __device__ __forceinline__ void put_tile(float2* to) const { put_sums(to, tile); }
  __device__ __forceinline__ void put_total(float2* to) const { put_sums(to, total); }
  template <class Weight>
  __device__ __forceinline__ void put_values(float* to, Weight weight) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < heads; ++h) {
      const float x = weight(h, total[h].m);
#pragma unroll
      for (int e = 0; e < columns; ++e) to[h * (DV + 8) + lane * columns + e] = x * o[h][e];
    }
  }

 private:
  // Scaled scores of a row that lies unswizzled.
  __device__ __forceinline__ float4 front(unsigned row) const {
    float sum[heads] = {};
#pragma unroll 8
    for (int piece = 0; piece < DK / 4; ++piece) {
      const float4 k = load(row + piece * 16);
#pragma unroll
      for (int h = 0; h < heads; ++h) sum[h] = added(sum[h], q[h * (DK / 4) + piece], k);
    }
    const float factor = log2_e / sqrtf(static_cast<float>(DK));
    return {__fmul_rn(sum[0], factor), __fmul_rn(sum[1], factor), __fmul_rn(sum[2], factor), __fmul_rn(sum[3], factor)};
  }
  // This lane's in the tile.
  static __device__ __forceinline__ int token() { return threadIdx.x % 8 * 4 + threadIdx.x % 32 / 8; }
  // Of the lane-th block; the first eight lanes.
  static __device__ __forceinline__ float sum_of_block(float e) {
    const int lane = threadIdx.x % 32;
    const auto from = [&](int other) { return __shfl_sync(0xffffffffu, e, other % 32); };
    const float e1 = from(lane + 8), e2 = from(lane + 16), e3 = from(lane + 24), front = from(lane + 23);
    return block_sum(e, e1, e2, e3, lane == 0 ? 0.0f : front);
  }
  // c is relative to the tile's maxima.
  __device__ __forceinline__ void put_block_sums(const SumRows& to) const {
    const float4 blocks = {sum_of_block(c[0]), sum_of_block(c[1]), sum_of_block(c[2]), sum_of_block(c[3])};
    if (threadIdx.x % 32 < tile_blocks) put_four(to, to.sums + threadIdx.x % 32 * heads, blocks);
  }
  static __device__ __forceinline__ float added(float sum, float4 x, float4 k) {
    return __fmaf_rn(x.w, k.w, __fmaf_rn(x.z, k.z, __fmaf_rn(x.y, k.y, __fmaf_rn(x.x, k.x, sum))));
  }
  static __device__ __forceinline__ void put_sums(float2* to, const Sum2 (&sums)[heads]) {
    if (threadIdx.x % 32 == 0)
#pragma unroll
      for (int h = 0; h < heads; ++h) to[h] = make_float2(sums[h].m, sums[h].s);
  }
  static __device__ __forceinline__ float4 load(unsigned at) {
    float4 x;
    asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(at)
                 : "memory");
    return x;
  }
};

}  // namespace nsa::gpu
