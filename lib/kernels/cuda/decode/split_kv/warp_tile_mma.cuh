#pragma once
// A decode warp's engine for 16-bit storage: tensor cores, up to 16 heads. decode/split_kv/warp_tile.cuh says what an
// engine does.
//
// Of a tile's 32 tokens column n of product j is token 4 (n / 2 + n % 2 * 4) + j, not 8j + n: so the four tokens of a
// selection block of l' = 4d, which rank wants added up, are one lane's (attention/block_sums.cuh), and what four lanes
// store fills sectors. Rows that are read together are therefore 4 apart or more, and lie in different banks
// (primitives/cp_async_ring.cuh).

#include "kernels/cuda/decode/split_kv/warp_tile_outputs.cuh"
#include "kernels/cuda/primitives/mma.cuh"

namespace nsa::gpu {

/// 16 heads' queries in shared memory: a row a head, its pieces of 16 bytes where a slot's are
/// (primitives/cp_async_ring.cuh). All lanes read operand A of 16 columns at once: [RowBytes / 32][lane].
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
    ldmatrix_x4(r, at + lane % 16 * RowBytes + piece / 8 * 128 + ((piece ^ lane) % 8) * 16);
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
  float c[4][4] = {};   // tokens 4 quad + j, + 16 of heads g (two), g + 8 (two)
  float o[DV / 8][4] = {};
  Sum2 total[2], tile[2];

  static __device__ __forceinline__ void fill_queries(char* to, const T* from, int present, int thread, int threads) {
    for (int item = thread; item < heads * DK / 8; item += threads)
      *reinterpret_cast<uint4*>(to + QueryRows<DK * 2>::place(item)) =
          item < present * DK / 8 ? reinterpret_cast<const uint4*>(from)[item] : uint4{};
  }
  /// The same as copies (primitives/cp_async_ring.cuh) that the caller waits for.
  static __device__ __forceinline__ void copy_queries(unsigned to, const T* from, int present, int thread,
                                                      int threads) {
#pragma unroll 1
    for (int item = thread; item < heads * DK / 8; item += threads) {
      const bool exists = item < present * DK / 8;
      cp_async_vector(to + QueryRows<DK * 2>::place(item), from + (exists ? item : 0) * 8, exists);
    }
  }
  __device__ __forceinline__ TensorCores(char* queries, char*) : q{shared_address(queries)} {}

  __device__ __forceinline__ void scores(unsigned slot) {
    const int lane = threadIdx.x % 32, block = block_of_column(lane % 8), piece = lane / 8;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[j][i] = 0.0f;
#pragma unroll
    for (int k = 0; k < DK / 32; ++k) {
      const uint4 even = q[2 * k * 32 + lane], odd = q[(2 * k + 1) * 32 + lane];
      const unsigned at = slot + block * 4 * k_bytes + k / 2 * 128 + ((k % 2 * 4 + piece) ^ block) * 16;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        std::uint32_t b[4];
        ldmatrix_x4(b, at + j * k_bytes);
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
    const bool fours = rows == tile_rows && reinterpret_cast<std::uintptr_t>(to.first) % 16 == 0;
    float* row = to.first + g * to.pitch + quad * 4;
    const auto put = [&](auto put_at) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (g + half * 8 >= present) break;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = half * 2 + i;
          put_at(row + half * 8 * to.pitch + i * 16, quad * 4 + i * 16,
                 make_float4(c[0][at], c[1][at], c[2][at], c[3][at]));
        }
      }
    };
    if (fours && to.keep)
      put([&](float* at, int, float4 x) { keep_four(at, x, to.policy); });
    else if (fours)
      put([](float* at, int, float4 x) { *reinterpret_cast<float4*>(at) = x; });
    else
      put([&](float* at, int token, float4 x) {
        if (token < rows) at[0] = x.x;
        if (token + 1 < rows) at[1] = x.y;
        if (token + 2 < rows) at[2] = x.z;
        if (token + 3 < rows) at[3] = x.w;
      });
  }
  /// The scaled score of the tile's last token, if there is one.
  __device__ __forceinline__ void put_last(const SumRows& to, int rows) const {
    const int g = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
    if (quad < 3 || rows < tile_rows || !to.last) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) put_word(to, to.last + g + half * 8, c[3][half * 2 + 1]);
  }
  /// Scaled scores of the row in front of the tile, which lies at `row` unswizzled: every lane of heads g, g + 8.
  __device__ __forceinline__ float2 front(unsigned row) const {
    const int lane = threadIdx.x % 32;
    float f[4] = {};  // every column the same
#pragma unroll
    for (int k = 0; k < DK / 32; ++k) {
      const uint4 even = q[2 * k * 32 + lane], odd = q[(2 * k + 1) * 32 + lane];
      std::uint32_t b[4];
      ldmatrix_x4(b, row + (k * 4 + lane / 8) * 16);
      mma(f, even.x, even.y, even.z, even.w, b[0], b[1], T{});
      mma(f, odd.x, odd.y, odd.z, odd.w, b[2], b[3], T{});
    }
    const float factor = log2_e / sqrtf(static_cast<float>(DK));
    return {__fmul_rn(f[0], factor), __fmul_rn(f[2], factor)};
  }
  /// Among raw scores: the last of the 8 columns before the tile's, the others are zero.
  __device__ __forceinline__ void put_front(ScoreRows to, unsigned row, int present) const {
    const int lane = threadIdx.x % 32, g = lane / 4, quad = lane % 4;
    const float2 x = front(row);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (g + half * 8 < present)
        put_pair(to, to.first + (g + half * 8) * to.pitch + quad * 2 - 8, 0.0f,
                 quad < 3    ? 0.0f
                 : half == 0 ? x.x
                             : x.y);
  }
  /// In front of a tile's sums: all heads side by side.
  __device__ __forceinline__ void put_front(float* to, unsigned row) const {
    const int lane = threadIdx.x % 32;
    const float2 x = front(row);
    if (lane % 4 == 0) to[lane / 4] = x.x, to[lane / 4 + 8] = x.y;
  }
  /// Scaled scores to weights; those past the tile's tokens are 0. On the way the sums of its blocks.
  __device__ __forceinline__ void soften(int rows, const SumRows& sums = {}) {
    const int quad = threadIdx.x % 4;
    if (rows < tile_rows) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (4 * quad + 16 * i + j >= rows) c[j][i] = c[j][i + 2] = -INFINITY;
    }
    float old[2];
    const bool first = total[0].m == neg_inf;  // o is zero; all heads see the same tiles
    // Loops without a branch in them: what the halves shuffle is under way side by side.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Sum2& now = tile[half] = {};
#pragma unroll
      for (int j = 0; j < 4; ++j) now.m = fmaxf(now.m, fmaxf(c[j][half * 2], c[j][half * 2 + 1]));
      now.m = quad_max(now.m);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        c[j][half * 2] = exp2_fast(c[j][half * 2] - now.m);
        c[j][half * 2 + 1] = exp2_fast(c[j][half * 2 + 1] - now.m);
        now.s += c[j][half * 2] + c[j][half * 2 + 1];
      }
    }
    if (sums.sums) {
      put_block_sums(sums, 0);
      put_block_sums(sums, 1);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Sum2& now = tile[half];
      now.s = quad_sum(now.s);
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
    const int lane = threadIdx.x % 32, row = block_of_column(lane % 8) * 4 + lane % 16 / 8, piece = lane / 16;
#pragma unroll
    for (int step = 0; step < 2; ++step) {  // of 16 tokens
      const float(&p)[4] = c[2 * step], (&r)[4] = c[2 * step + 1];
      const std::uint32_t a[4] = {pack(p[0], p[1], T{}), pack(p[2], p[3], T{}), pack(r[0], r[1], T{}),
                                  pack(r[2], r[3], T{})};
#pragma unroll
      for (int j = 0; j < DV / 16; ++j) {
        std::uint32_t b[4];
        ldmatrix_x4_trans(b, slot + (step * 2 + row) * v_bytes + j / 4 * 128 + ((j % 4 * 2 + piece) ^ row / 4) * 16);
        mma(o[2 * j], a[0], a[1], a[2], a[3], b[0], b[1], T{});
        mma(o[2 * j + 1], a[0], a[1], a[2], a[3], b[2], b[3], T{});
      }
    }
  }

  /// The tile's maxima.
  __device__ __forceinline__ void put_maxima(float* to, const SumRows& rows) const {
    const int lane = threadIdx.x % 32;
    if (lane % 4 != 0) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) put_word(rows, to + lane / 4 + half * 8, tile[half].m);
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
  static __device__ __forceinline__ int block_of_column(int n) { return n / 2 + n % 2 * 4; }
  // Of heads g + 8 half; c is relative to the tile's maximum.
  __device__ __forceinline__ void put_block_sums(const SumRows& to, int half) const {
    const int lane = threadIdx.x % 32, g = lane / 4, quad = lane % 4, at = half * 2,
              left = lane / 4 * 4 + (quad + 3) % 4;
    const float before = __shfl_sync(0xffffffffu, c[3][at], left), later = __shfl_sync(0xffffffffu, c[3][at + 1], left);
    float* first = to.sums + (half * 2 + g / 4) * tile_blocks * 4 + quad * 4 + g % 4;
    put_word(to, first, block_sum(c[0][at], c[1][at], c[2][at], c[3][at], quad == 0 ? 0.0f : before));
    put_word(to, first + 16,
             block_sum(c[0][at + 1], c[1][at + 1], c[2][at + 1], c[3][at + 1], quad == 0 ? before : later));
  }
  static __device__ __forceinline__ void put_sums(float2* to, const Sum2 (&sums)[2]) {
    const int lane = threadIdx.x % 32;
    if (lane % 4 != 0) return;
    to[lane / 4] = make_float2(sums[0].m, sums[0].s);
    to[lane / 4 + 8] = make_float2(sums[1].m, sums[1].s);
  }
};

}  // namespace nsa::gpu
