#pragma once
// Warp tile for fp32 storage: scalar arithmetic, up to 4 heads. decode/split_kv/warp_tile.cuh describes the operations.

#include "kernels/cuda/decode/split_kv/warp_tile_outputs.cuh"

namespace nsa::gpu {

/// A lane has one token in multiply_qk(); tokens of neighbouring lanes are 4 apart, so their rows are in different
/// banks (primitives/cp_async_ring.cuh). In multiply_pv() a lane has Dv / 32 columns.
template <int DK, int DV>
struct WarpTileScalar {
  using Type = float;
  using Size = HeadSize<DK, DV, true>;
  static constexpr bool tuned = true;
  static constexpr int k_panels = 1, v_panels = 1, k_columns = DK, v_columns = DV, part_heads = 4,
                       parts = 1;  // as WarpTileMma
  static constexpr int heads = 4, d_k = DK, d_v = DV, k_bytes = DK * 4, v_bytes = DV * 4;
  static constexpr int query_bytes = heads * DK * 4, prob_bytes = tile_rows * heads * 4;
  static constexpr int ctas_per_sm = DK > 64 ? 1 : 2;
  static constexpr int columns = DV / 32;

  const float4* q;  // shared, [heads][Dk / 4]
  float4* prob;     // shared, P of the warp: [tile_rows], one head an element
  float c[heads] = {};
  float o[heads][columns] = {};
  SoftmaxState<Exp2> total[heads], tile[heads];

  static __device__ __forceinline__ void load_queries(char* to, const float* from, Size, int valid_heads, int thread,
                                                      int threads) {
    for (int item = thread; item < heads * DK; item += threads)
      reinterpret_cast<float*>(to)[item] = item < valid_heads * DK ? from[item] : 0.0f;
  }
  static __device__ __forceinline__ void copy_queries_async(unsigned to, const float* from, Size, int valid_heads,
                                                            int thread, int threads) {
    for (int item = thread; item < heads * DK / 4; item += threads) {
      const bool exists = item < valid_heads * DK / 4;
      cp_async_vector(to + item * 16, from + (exists ? item : 0) * 4, exists);
    }
  }
  __device__ __forceinline__ WarpTileScalar(char* queries, char* warp_prob, const LayerShape&)
      : q(reinterpret_cast<const float4*>(queries)), prob(reinterpret_cast<float4*>(warp_prob)) {}

  __device__ __forceinline__ void multiply_qk(unsigned slot, int = 0) {
    const int lane = threadIdx.x % 32;
    float sum[heads] = {};
#pragma unroll 8
    for (int vec = 0; vec < DK / 4; ++vec) {
      const float4 k = load(slot + token() * k_bytes + vec / 8 * 128 + ((vec ^ lane) % 8) * 16);
#pragma unroll
      for (int h = 0; h < heads; ++h) sum[h] = add_dot4(sum[h], q[h * (DK / 4) + vec], k);
    }
#pragma unroll
    for (int h = 0; h < heads; ++h) c[h] = sum[h];
  }

  __device__ __forceinline__ void scale_scores() {
    const float softmax_scale = log2_e / sqrtf(static_cast<float>(DK));
#pragma unroll
    for (int h = 0; h < heads; ++h) c[h] = __fmul_rn(c[h], softmax_scale);
  }
  __device__ __forceinline__ void store_scores(ScoreOutput to, int rows, int valid_heads) const {
#pragma unroll
    for (int h = 0; h < heads; ++h)
      if (token() < rows && h < valid_heads) to.first[h * to.pitch + token()] = c[h];
  }
  __device__ __forceinline__ void store_last_score(const BlockSumOutput& to, int rows) const {
    if (token() == tile_rows - 1 && rows == tile_rows && to.last) store_four(to, to.last, {c[0], c[1], c[2], c[3]});
  }
  __device__ __forceinline__ void store_halo_score(ScoreOutput to, unsigned row, int valid_heads) const {
    const int lane = threadIdx.x % 32;
    const float4 x = halo_scores(row);
    const float of[heads] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int h = 0; h < heads; ++h)
      if (lane < 8 && h < valid_heads) to.first[h * to.pitch + lane - 8] = lane == 7 ? of[h] : 0.0f;
  }
  __device__ __forceinline__ void store_halo_score(float* to, unsigned row) const {
    const float4 x = halo_scores(row);
    if (threadIdx.x % 32 == 0) *reinterpret_cast<float4*>(to) = x;
  }
  __device__ __forceinline__ void online_softmax(int rows, const BlockSumOutput& sums = {}) {
    // Loops without branches, so that the shuffles of all heads overlap.
#pragma unroll
    for (int h = 0; h < heads; ++h) {
      if (token() >= rows) c[h] = -INFINITY;
      tile[h].m = fmaxf(neg_inf, warp_max(c[h]));
      c[h] = exp2_fast(c[h] - tile[h].m);
    }
    if (sums.sums) store_block_sums(sums);
#pragma unroll
    for (int h = 0; h < heads; ++h) {
      tile[h].s = warp_sum(c[h]);
      const TileScale scale = merge_tile_exact(total[h], tile[h]);
      c[h] *= scale.p;
#pragma unroll
      for (int e = 0; e < columns; ++e) o[h][e] *= scale.o;
    }
    __syncwarp();  // P of the previous tile is read
    prob[token()] = {c[0], c[1], c[2], c[3]};
    __syncwarp();
  }

  template <int Panel = 0>
  __device__ __forceinline__ void multiply_pv(unsigned slot) {
    const int lane = threadIdx.x % 32, vec = lane * columns / 4, offset = lane * columns % 4;
#pragma unroll 8
    for (int token = 0; token < slot_rows; ++token) {
      const unsigned at = slot + token * v_bytes + vec / 8 * 128 + ((vec ^ token / 4) % 8) * 16 + offset * 4;
      float v[columns];
      if constexpr (columns == 4) {
        const float4 x = load(at);
        v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
      } else {
        static_assert(columns == 2);
        asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(v[0]), "=f"(v[1]) : "r"(at) : "memory");
      }
      const float4 w = prob[token];
#pragma unroll
      for (int e = 0; e < columns; ++e) {
        o[0][e] += w.x * v[e], o[1][e] += w.y * v[e];
        o[2][e] += w.z * v[e], o[3][e] += w.w * v[e];
      }
    }
  }

  __device__ __forceinline__ void store_tile_max(float* to, const BlockSumOutput& rows) const {
    if (threadIdx.x % 32 == 0) store_four(rows, to, {tile[0].m, tile[1].m, tile[2].m, tile[3].m});
  }
  __device__ __forceinline__ void store_tile_lse(float2* to) const { store_states(to, tile); }
  __device__ __forceinline__ void store_state(float2* to) const { store_states(to, total); }
  template <int Part = 0, class ScaleOf>
  __device__ __forceinline__ void store_scaled_o(float* to, ScaleOf scale_of) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < heads; ++h) {
      const float x = scale_of(h, total[h].m);
#pragma unroll
      for (int e = 0; e < columns; ++e) to[h * (DV + 8) + lane * columns + e] = x * o[h][e];
    }
  }

 private:
  // Scaled scores of the unswizzled halo row at shared address `row`.
  __device__ __forceinline__ float4 halo_scores(unsigned row) const {
    float sum[heads] = {};
#pragma unroll 8
    for (int vec = 0; vec < DK / 4; ++vec) {
      const float4 k = load(row + vec * 16);
#pragma unroll
      for (int h = 0; h < heads; ++h) sum[h] = add_dot4(sum[h], q[h * (DK / 4) + vec], k);
    }
    const float softmax_scale = log2_e / sqrtf(static_cast<float>(DK));
    return {__fmul_rn(sum[0], softmax_scale), __fmul_rn(sum[1], softmax_scale), __fmul_rn(sum[2], softmax_scale),
            __fmul_rn(sum[3], softmax_scale)};
  }
  // Token of this lane in the tile.
  static __device__ __forceinline__ int token() { return threadIdx.x % 8 * 4 + threadIdx.x % 32 / 8; }
  // Sum of the lane-th block, in the first eight lanes.
  static __device__ __forceinline__ float sum_of_block(float e) {
    const int lane = threadIdx.x % 32;
    const auto from = [&](int other) { return __shfl_sync(0xffffffffu, e, other % 32); };
    const float e1 = from(lane + 8), e2 = from(lane + 16), e3 = from(lane + 24), halo = from(lane + 23);
    return block_sum(e, e1, e2, e3, lane == 0 ? 0.0f : halo);
  }
  // c is relative to the maxima of the tile.
  __device__ __forceinline__ void store_block_sums(const BlockSumOutput& to) const {
    const float4 blocks = {sum_of_block(c[0]), sum_of_block(c[1]), sum_of_block(c[2]), sum_of_block(c[3])};
    if (threadIdx.x % 32 < tile_blocks) store_four(to, to.sums + threadIdx.x % 32 * heads, blocks);
  }
  static __device__ __forceinline__ float add_dot4(float sum, float4 x, float4 k) {
    return __fmaf_rn(x.w, k.w, __fmaf_rn(x.z, k.z, __fmaf_rn(x.y, k.y, __fmaf_rn(x.x, k.x, sum))));
  }
  static __device__ __forceinline__ void store_states(float2* to, const SoftmaxState<Exp2> (&sums)[heads]) {
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
