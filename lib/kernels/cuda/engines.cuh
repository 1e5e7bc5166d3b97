#pragma once
// What a decode warp does with a tile of 32 tokens of one list: tensor cores for 16-bit storage and 16 heads, scalar
// arithmetic for fp32 and 4 heads. Both keep o and the running (m, sum) of their heads to themselves until the CTA's
// warps meet.
//
// scores(slot) multiplies q with the rows of a slot; scale() and soften() turn the scores into weights relative to the
// running maximum; put_scores() leaves scaled scores behind; add(slot) adds the weighted values. The (m, sum) of a tile
// is formed by one warp in one order, before the running maximum takes part, so a leaf's does not depend on who reads
// it after what. Roundings that the choice of blocks hangs on are spelled out, so that every kernel leaves the same
// bits.

#include <algorithm>

#include "kernels/cuda/decode.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/units.cuh"
#include "kernels/cuda/warp_ring.cuh"

namespace nsa::gpu {

static_assert(tile_rows == slot_rows);

/// Shared memory of a CTA: the warps' rings, the queries, the weights of scalar warps, rows in front of tiles, the
/// chosen blocks behind them.
/// When the rings are empty, o of every warp [heads][d_v + 8] and (m, sum) lie in their place.
template <class E>
struct DecodeLayout {
  static constexpr int slot_bytes = slot_rows * std::max(E::k_bytes, E::v_bytes);
  static constexpr int slots = std::max(2, (24 << 10) / slot_bytes);
  static constexpr int ring_bytes = slots * slot_bytes;
  static constexpr int queries = decode_warps * ring_bytes, weights = queries + E::query_bytes,
                       fronts = weights + decode_warps * E::weight_bytes,  // [warp][slot], a row of K each
      blocks = fronts + decode_warps * slots * E::k_bytes;
  static constexpr int merge_bytes = decode_warps * E::heads * (E::d_v + 8 + 2) * 4;
  static_assert(merge_bytes <= queries);
  static std::size_t bytes(const LayerShape& s) { return blocks + s.rules.n_sel * sizeof(std::int32_t); }
};

/// Where the raw scores of a tile go: row of the first head, elements between heads, first column.
struct ScoreRows {
  float* first = nullptr;
  std::int64_t pitch = 0;
  bool keep = false;  ///< in the L2, with `policy`
  std::uint64_t policy = 0;
};
__device__ __forceinline__ void keep_pair(float* to, float x, float y, std::uint64_t policy) {
  asm volatile("st.global.L2::cache_hint.v2.f32 [%0], {%1, %2}, %3;" ::"l"(to), "f"(x), "f"(y), "l"(policy) : "memory");
}
__device__ __forceinline__ void put_pair(const ScoreRows& rows, float* to, float x, float y) {
  if (rows.keep)
    keep_pair(to, x, y, rows.policy);
  else
    *reinterpret_cast<float2*>(to) = make_float2(x, y);
}

/// 16 heads' queries in shared memory: a row a head, its pieces of 16 bytes where a slot's are (warp_ring.cuh). All
/// lanes read operand A of 16 columns at once: [RowBytes / 32][lane].
template <int RowBytes>
struct QueryRows {
  unsigned at;
  /// Of the item-th piece of all heads'.
  static __device__ __forceinline__ unsigned place(unsigned item) {
    constexpr unsigned pieces = RowBytes / 16;
    const unsigned head = item / pieces, piece = item % pieces;
    return head * RowBytes + piece / 8 * 128 + ((piece ^ head) % 8) * 16;
  }
  __device__ __forceinline__ uint4 operator[](unsigned item) const {
    const unsigned lane = item % 32, piece = item / 32 * 2 + lane / 16;
    std::uint32_t r[4];
    load_matrices(r, at + lane % 16 * RowBytes + piece / 8 * 128 + ((piece ^ lane) % 8) * 16);
    return {r[0], r[1], r[2], r[3]};
  }
};

/// m16n8k16: the heads are M. Lane = 4 * g + quad holds heads g and g + 8.
template <class T, int DK, int DV>
struct TensorCores {
  using Type = T;
  static constexpr int heads = 16, d_k = DK, d_v = DV, k_bytes = DK * 2, v_bytes = DV * 2;
  static constexpr int query_bytes = DK / 16 * 32 * 16, weight_bytes = 0;
  static constexpr int ctas = DK > 128 ? 1 : 2;  // an SM

  QueryRows<DK * 2> q;  // shared, as operand A: [Dk / 16][lane]
  float c[4][4] = {};   // tokens 8j + 2 quad, + 1 of heads g (two), g + 8 (two)
  float o[DV / 8][4] = {};
  Sum2 total[2], tile[2];

  static __device__ __forceinline__ void fill_queries(char* to, const T* from, int present, int thread, int threads) {
    for (int item = thread; item < heads * DK / 8; item += threads)
      *reinterpret_cast<uint4*>(to + QueryRows<DK * 2>::place(item)) =
          item < present * DK / 8 ? reinterpret_cast<const uint4*>(from)[item] : uint4{};
  }
  /// The same as copies (warp_ring.cuh) that the caller waits for.
  static __device__ __forceinline__ void copy_queries(unsigned to, const T* from, int present, int thread,
                                                      int threads) {
#pragma unroll 1
    for (int item = thread; item < heads * DK / 8; item += threads) {
      const bool exists = item < present * DK / 8;
      copy_piece(to + QueryRows<DK * 2>::place(item), from + (exists ? item : 0) * 8, exists);
    }
  }
  __device__ __forceinline__ TensorCores(char* queries, char*) : q{shared_address(queries)} {}

  __device__ __forceinline__ void scores(unsigned slot) {
    const int lane = threadIdx.x % 32, row = lane % 8, piece = lane / 8;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[j][i] = 0.0f;
#pragma unroll
    for (int k = 0; k < DK / 32; ++k) {
      const uint4 even = q[2 * k * 32 + lane], odd = q[(2 * k + 1) * 32 + lane];
      const unsigned at = slot + row * k_bytes + k / 2 * 128 + ((k % 2 * 4 + piece) ^ row) * 16;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        std::uint32_t b[4];
        load_matrices(b, at + j * 8 * k_bytes);
        mma(c[j], even.x, even.y, even.z, even.w, b[0], b[1], T{});
        mma(c[j], odd.x, odd.y, odd.z, odd.w, b[2], b[3], T{});
      }
    }
  }

  __device__ __forceinline__ void scale() {
    const float factor = log2_e / sqrtf(static_cast<float>(DK));
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[j][i] = __fmul_rn(c[j][i], factor);
  }
  /// Scaled scores of `rows` tokens and `present` heads.
  __device__ __forceinline__ void put_scores(ScoreRows to, int rows, int present) const {
    const int g = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
    const bool pairs = rows == tile_rows && reinterpret_cast<std::uintptr_t>(to.first) % 8 == 0;
    float* row = to.first + g * to.pitch + quad * 2;
    const auto put = [&](auto put_two) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (g + half * 8 >= present) break;
#pragma unroll
        for (int j = 0; j < 4; ++j)
          put_two(row + half * 8 * to.pitch + j * 8, j * 8 + quad * 2, c[j][half * 2], c[j][half * 2 + 1]);
      }
    };
    if (pairs && to.keep)
      put([&](float* at, int, float x, float y) { keep_pair(at, x, y, to.policy); });
    else if (pairs)
      put([](float* at, int, float x, float y) { *reinterpret_cast<float2*>(at) = make_float2(x, y); });
    else
      put([&](float* at, int token, float x, float y) {
        if (token < rows) at[0] = x;
        if (token + 1 < rows) at[1] = y;
      });
  }
  /// Scaled scores of the row in front of the tile, which lies at `row` unswizzled: the last of the 8 columns before
  /// the tile's, the others are zero.
  __device__ __forceinline__ void put_front(ScoreRows to, unsigned row, int present) const {
    const int lane = threadIdx.x % 32, g = lane / 4, quad = lane % 4;
    float f[4] = {};  // every column the same
#pragma unroll
    for (int k = 0; k < DK / 32; ++k) {
      const uint4 even = q[2 * k * 32 + lane], odd = q[(2 * k + 1) * 32 + lane];
      std::uint32_t b[4];
      load_matrices(b, row + (k * 4 + lane / 8) * 16);
      mma(f, even.x, even.y, even.z, even.w, b[0], b[1], T{});
      mma(f, odd.x, odd.y, odd.z, odd.w, b[2], b[3], T{});
    }
    const float factor = log2_e / sqrtf(static_cast<float>(DK));
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (g + half * 8 < present)
        put_pair(to, to.first + (g + half * 8) * to.pitch + quad * 2 - 8, 0.0f,
                 quad == 3 ? __fmul_rn(f[half * 2], factor) : 0.0f);
  }
  /// Scaled scores to weights; those past the tile's tokens are 0.
  __device__ __forceinline__ void soften(int rows) {
    const int quad = threadIdx.x % 4;
    if (rows < tile_rows) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (8 * j + quad * 2 + i >= rows) c[j][i] = c[j][i + 2] = -INFINITY;
    }
    float old[2];
    const bool first = total[0].m == lowest;  // o is zero; all heads see the same tiles
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Sum2 now;
#pragma unroll
      for (int j = 0; j < 4; ++j) now.m = fmaxf(now.m, fmaxf(c[j][half * 2], c[j][half * 2 + 1]));
      now.m = quad_max(now.m);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        c[j][half * 2] = exp2_fast(c[j][half * 2] - now.m);
        c[j][half * 2 + 1] = exp2_fast(c[j][half * 2 + 1] - now.m);
        now.s += c[j][half * 2] + c[j][half * 2 + 1];
      }
      now.s = quad_sum(now.s);
      tile[half] = now;
      const float m = fmaxf(total[half].m, now.m), factor = exp2_fast(now.m - m);
      old[half] = exp2_fast(total[half].m - m);
      total[half] = {m, total[half].s * old[half] + now.s * factor};
#pragma unroll
      for (int j = 0; j < 4; ++j) c[j][half * 2] *= factor, c[j][half * 2 + 1] *= factor;
    }
    if (!__any_sync(0xffffffffu, !first && (old[0] != 1.0f || old[1] != 1.0f))) return;
#pragma unroll
    for (int j = 0; j < DV / 8; ++j) {
      o[j][0] *= old[0], o[j][1] *= old[0];
      o[j][2] *= old[1], o[j][3] *= old[1];
    }
  }

  __device__ __forceinline__ void add(unsigned slot) {
    const int lane = threadIdx.x % 32, row = lane % 16, piece = lane / 16;
#pragma unroll
    for (int step = 0; step < 2; ++step) {  // of 16 tokens
      const float(&p)[4] = c[2 * step], (&r)[4] = c[2 * step + 1];
      const std::uint32_t a[4] = {pack(p[0], p[1], T{}), pack(p[2], p[3], T{}), pack(r[0], r[1], T{}),
                                  pack(r[2], r[3], T{})};
#pragma unroll
      for (int j = 0; j < DV / 16; ++j) {
        std::uint32_t b[4];
        load_transposed(b, slot + (step * 16 + row) * v_bytes + j / 4 * 128 + ((j % 4 * 2 + piece) ^ (row % 8)) * 16);
        mma(o[2 * j], a[0], a[1], a[2], a[3], b[0], b[1], T{});
        mma(o[2 * j + 1], a[0], a[1], a[2], a[3], b[2], b[3], T{});
      }
    }
  }

  /// (m, sum) of the tile alone.
  __device__ __forceinline__ void put_tile(float2* to) const { put_sums(to, tile); }
  __device__ __forceinline__ void put_total(float2* to) const { put_sums(to, total); }
  /// o times weight(head) to [heads][DV + 8].
  template <class Weight>
  __device__ __forceinline__ void put_values(float* to, Weight weight) const {
    const int g = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float x = weight(g + half * 8, total[half].m);
      float* row = to + (g + half * 8) * (DV + 8) + quad * 2;
#pragma unroll
      for (int j = 0; j < DV / 8; ++j)
        *reinterpret_cast<float2*>(row + j * 8) = make_float2(x * o[j][half * 2], x * o[j][half * 2 + 1]);
    }
  }

 private:
  static __device__ __forceinline__ void put_sums(float2* to, const Sum2 (&sums)[2]) {
    const int lane = threadIdx.x % 32;
    if (lane % 4 != 0) return;
    to[lane / 4] = make_float2(sums[0].m, sums[0].s);
    to[lane / 4 + 8] = make_float2(sums[1].m, sums[1].s);
  }
};

/// fp32: a lane a token in scores(), a lane Dv / 32 columns in add().
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
      copy_piece(to + item * 16, from + (exists ? item : 0) * 4, exists);
    }
  }
  __device__ __forceinline__ Scalars(char* queries, char* warp_weights)
      : q(reinterpret_cast<const float4*>(queries)), weights(reinterpret_cast<float4*>(warp_weights)) {}

  __device__ __forceinline__ void scores(unsigned slot) {
    const int lane = threadIdx.x % 32;
    float sum[heads] = {};
#pragma unroll 8
    for (int piece = 0; piece < DK / 4; ++piece) {
      const float4 k = load(slot + lane * k_bytes + piece / 8 * 128 + ((piece ^ lane) % 8) * 16);
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
    const int token = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < heads; ++h)
      if (token < rows && h < present) to.first[h * to.pitch + token] = c[h];
  }
  __device__ __forceinline__ void put_front(ScoreRows to, unsigned row, int present) const {
    const int lane = threadIdx.x % 32;
    float sum[heads] = {};
#pragma unroll 8
    for (int piece = 0; piece < DK / 4; ++piece) {
      const float4 k = load(row + piece * 16);
#pragma unroll
      for (int h = 0; h < heads; ++h) sum[h] = added(sum[h], q[h * (DK / 4) + piece], k);
    }
    const float factor = log2_e / sqrtf(static_cast<float>(DK));
#pragma unroll
    for (int h = 0; h < heads; ++h)
      if (lane < 8 && h < present) to.first[h * to.pitch + lane - 8] = lane == 7 ? __fmul_rn(sum[h], factor) : 0.0f;
  }
  __device__ __forceinline__ void soften(int rows) {
    const int lane = threadIdx.x % 32;
    float old[heads];
#pragma unroll
    for (int h = 0; h < heads; ++h) {
      if (lane >= rows) c[h] = -INFINITY;
      Sum2 now;
      now.m = fmaxf(lowest, warp_max(c[h]));
      c[h] = exp2_fast(c[h] - now.m);
      now.s = warp_sum(c[h]);
      tile[h] = now;
      const float m = fmaxf(total[h].m, now.m), factor = exp2_fast(now.m - m);
      old[h] = exp2_fast(total[h].m - m);
      total[h] = {m, total[h].s * old[h] + now.s * factor};
      c[h] *= factor;
#pragma unroll
      for (int e = 0; e < columns; ++e) o[h][e] *= old[h];
    }
    __syncwarp();  // the last tile's weights are read
    weights[lane] = {c[0], c[1], c[2], c[3]};
    __syncwarp();
  }

  __device__ __forceinline__ void add(unsigned slot) {
    const int lane = threadIdx.x % 32, piece = lane * columns / 4, within = lane * columns % 4;
#pragma unroll 8
    for (int token = 0; token < slot_rows; ++token) {
      const unsigned at = slot + token * v_bytes + piece / 8 * 128 + ((piece ^ token) % 8) * 16 + within * 4;
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
