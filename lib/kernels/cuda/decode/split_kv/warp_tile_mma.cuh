#pragma once
// Warp tile for 16-bit storage: tensor cores, up to 16 or 32 heads. decode/split_kv/warp_tile.cuh describes the
// operations.
//
// Column n of product j of a tile is token 4 (n / 2 + n % 2 * 4) + j, not 8j + n: the four tokens of a selection block
// of l' = 4d, whose sum rank reads, are then in one lane (attention/block_sums.cuh), and the stores of four lanes fill
// whole sectors. Rows that are read together are therefore at least 4 apart and fall into different banks
// (primitives/cp_async_ring.cuh).

#include "kernels/cuda/decode/split_kv/warp_tile_outputs.cuh"
#include "kernels/cuda/primitives/mma.cuh"

namespace nsa::gpu {

/// Queries in shared memory, one row a head, 16-byte vectors swizzled as in a slot (primitives/cp_async_ring.cuh). Rows
/// are Pitch bytes apart, their panels of 64 columns Panel bytes. operator() reads operand A of 16 heads and 16 columns
/// with all lanes: [RowBytes / 32][lane].
template <int RowBytes, int Pitch = RowBytes, int Panel = 128>
struct QueryRows {
  unsigned at;
  /// Byte offset of the item-th 16-byte vector of all heads.
  static __device__ __forceinline__ unsigned offset(unsigned item) {
    constexpr unsigned vecs = RowBytes / 16;
    const unsigned head = item / vecs, vec = item % vecs;
    return head * Pitch + vec / 8 * Panel + ((vec ^ head) % 8) * 16;
  }
  __device__ __forceinline__ uint4 operator()(int head_tile, unsigned item) const {
    const unsigned lane = item % 32, vec = item / 32 * 2 + lane / 16;
    std::uint32_t r[4];
    ldmatrix_x4(r, at + (head_tile * 16 + lane % 16) * Pitch + vec / 8 * Panel + ((vec ^ lane) % 8) * 16);
    return {r[0], r[1], r[2], r[3]};
  }
};

/// m16n8k16 with the heads as M. Lane = 4 * g + quad holds heads g and g + 8 of each of `M` head tiles of 16. The sizes
/// of a tuned tile are its shape's, those of a padded one upper bounds (decode/split_kv/instances.cuh). A slot has up
/// to 128 columns of a padded tile's rows, a panel.
template <class T, int DK, int DV, int M = 1, bool Tuned = true, class Queries = QueryRows<DK * 2>>
struct WarpTileMma {
  using Type = T;
  using Size = HeadSize<DK, DV, Tuned>;
  static constexpr bool tuned = Tuned;
  static constexpr int k_columns = Tuned || DK < 128 ? DK : 128, v_columns = Tuned || DV < 128 ? DV : 128;  // of a slot
  static constexpr int heads = 16 * M, d_k = DK, d_v = DV, k_bytes = k_columns * 2, v_bytes = v_columns * 2;
  static constexpr int k_panels = DK / k_columns, v_panels = DV / v_columns;
  static constexpr int part_heads = 16, parts = M * v_panels;  // of o: 16 heads times v_columns columns
  static constexpr int query_bytes = heads * DK * 2, prob_bytes = 0;
  static constexpr int ctas_per_sm = Tuned && DK > 128 ? 1 : 2;

  Queries q;  // shared, as operand A: [Dk / 16][lane]
  Size size;
  float softmax_scale;
  float c[M][4][4] = {};  // tokens 4 quad + j, + 16 of heads g (two), g + 8 (two)
  float o[M][DV / 8][4] = {};
  SoftmaxState<Exp2> total[M][2], tile[M][2];

  // The item-th 16-byte vector of the queries of a head tile: its first element in memory.
  struct QueryVector {
    int at;
    bool exists;
  };
  static __device__ __forceinline__ QueryVector query_vector(Size size, int valid_heads, int item) {
    if (Tuned) return {item * 8, item < valid_heads * DK / 8};
    const int head = item / (DK / 8), column = item % (DK / 8) * 8;
    return {head * size.d_k + column, head < valid_heads && column < size.d_k};
  }
  static __device__ __forceinline__ void load_queries(char* to, const T* from, Size size, int valid_heads, int thread,
                                                      int threads) {
    for (int item = thread; item < heads * DK / 8; item += threads) {
      const QueryVector x = query_vector(size, valid_heads, item);
      *reinterpret_cast<uint4*>(to + Queries::offset(item)) =
          x.exists ? *reinterpret_cast<const uint4*>(from + x.at) : uint4{};
    }
  }
  /// The same with asynchronous copies (primitives/cp_async_ring.cuh), for which the caller waits.
  static __device__ __forceinline__ void copy_queries_async(unsigned to, const T* from, Size size, int valid_heads,
                                                            int thread, int threads) {
#pragma unroll 1
    for (int item = thread; item < heads * DK / 8; item += threads) {
      const QueryVector x = query_vector(size, valid_heads, item);
      cp_async_vector(to + Queries::offset(item), from + (x.exists ? x.at : 0), x.exists);
    }
  }
  __device__ __forceinline__ WarpTileMma(char* queries, char*, const LayerShape& s)
      : q{shared_address(queries)}, size(s), softmax_scale(log2_e / sqrtf(static_cast<float>(size.d_k))) {}

  /// Adds the scores of a panel of columns of K.
  __device__ __forceinline__ void multiply_qk(unsigned slot, int panel = 0) {
    const int lane = threadIdx.x % 32, block = block_of_column(lane % 8), vec = lane / 8;
    if (panel == 0)
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) c[m][j][i] = 0.0f;
#pragma unroll
    for (int k = 0; k < k_columns / 32; ++k) {
      const int step = panel * (k_columns / 32) + k;  // of 32 columns
      if (!Tuned && k % 2 == 0 && step * 32 >= size.d_k) break;
      uint4 even[M], odd[M];
#pragma unroll
      for (int m = 0; m < M; ++m) even[m] = q(m, 2 * step * 32 + lane), odd[m] = q(m, (2 * step + 1) * 32 + lane);
      const unsigned at = slot + block * 4 * k_bytes + k / 2 * 128 + ((k % 2 * 4 + vec) ^ block) * 16;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        std::uint32_t b[4];
        ldmatrix_x4(b, at + j * k_bytes);
#pragma unroll
        for (int m = 0; m < M; ++m) {
          mma(c[m][j], even[m].x, even[m].y, even[m].z, even[m].w, b[0], b[1], T{});
          mma(c[m][j], odd[m].x, odd[m].y, odd[m].z, odd[m].w, b[2], b[3], T{});
        }
      }
    }
  }

  __device__ __forceinline__ void scale_scores() {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) c[m][j][i] = __fmul_rn(c[m][j][i], softmax_scale);
  }
  /// Stores the scaled scores of `rows` tokens and `valid_heads` heads.
  __device__ __forceinline__ void store_scores(ScoreOutput to, int rows, int valid_heads) const {
    const int g = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
    const bool whole_vectors = rows == tile_rows && reinterpret_cast<std::uintptr_t>(to.first) % 16 == 0;
    float* row = to.first + g * to.pitch + quad * 4;
    const auto store_with = [&](auto store_at) {
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (g + m * 16 + half * 8 >= valid_heads) break;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int at = half * 2 + i;
            store_at(row + (m * 16 + half * 8) * to.pitch + i * 16, quad * 4 + i * 16,
                     make_float4(c[m][0][at], c[m][1][at], c[m][2][at], c[m][3][at]));
          }
        }
    };
    if (whole_vectors && to.keep)
      store_with([&](float* at, int, float4 x) { store_four_with_policy(at, x, to.policy); });
    else if (whole_vectors)
      store_with([](float* at, int, float4 x) { *reinterpret_cast<float4*>(at) = x; });
    else
      store_with([&](float* at, int token, float4 x) {
        if (token < rows) at[0] = x.x;
        if (token + 1 < rows) at[1] = x.y;
        if (token + 2 < rows) at[2] = x.z;
        if (token + 3 < rows) at[3] = x.w;
      });
  }
  /// Stores the scaled score of the last token of a full tile.
  __device__ __forceinline__ void store_last_score(const BlockSumOutput& to, int rows) const {
    const int g = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
    if (quad < 3 || rows < tile_rows || !to.last) return;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) store_word(to, to.last + m * 16 + g + half * 8, c[m][3][half * 2 + 1]);
  }
  /// Scaled scores of the halo row at shared address `row`, unswizzled. Every lane gets those of heads g and g + 8.
  __device__ __forceinline__ float2 halo_scores(unsigned row) const {
    static_assert(M == 1, "the split-KV kernel has tiles of 16 heads");
    const int lane = threadIdx.x % 32;
    float f[4] = {};  // every column the same
#pragma unroll
    for (int k = 0; k < DK / 32; ++k) {
      if (!Tuned && k * 32 >= size.d_k) break;
      const uint4 even = q(0, 2 * k * 32 + lane), odd = q(0, (2 * k + 1) * 32 + lane);
      std::uint32_t b[4];
      ldmatrix_x4(b, row + (k * 4 + lane / 8) * 16);
      mma(f, even.x, even.y, even.z, even.w, b[0], b[1], T{});
      if (Tuned || k * 32 + 16 < size.d_k) mma(f, odd.x, odd.y, odd.z, odd.w, b[2], b[3], T{});
    }
    return {__fmul_rn(f[0], softmax_scale), __fmul_rn(f[2], softmax_scale)};
  }
  /// Halo among raw scores: the last of the 8 columns before the tile; the others become zero.
  __device__ __forceinline__ void store_halo_score(ScoreOutput to, unsigned row, int valid_heads) const {
    const int lane = threadIdx.x % 32, g = lane / 4, quad = lane % 4;
    const float2 x = halo_scores(row);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (g + half * 8 < valid_heads)
        store_pair(to, to.first + (g + half * 8) * to.pitch + quad * 2 - 8, 0.0f,
                   quad < 3    ? 0.0f
                   : half == 0 ? x.x
                               : x.y);
  }
  /// Halo among block sums: [heads].
  __device__ __forceinline__ void store_halo_score(float* to, unsigned row) const {
    const int lane = threadIdx.x % 32;
    const float2 x = halo_scores(row);
    if (lane % 4 == 0) to[lane / 4] = x.x, to[lane / 4 + 8] = x.y;
  }
  /// Makes the scores from row `rows` of the tile on -infinity, so that their P is 0.
  __device__ __forceinline__ void mask_rows(int rows) {
    const int quad = threadIdx.x % 4;
    if (rows < tile_rows) {
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            if (4 * quad + 16 * i + j >= rows) c[m][j][i] = c[m][j][i + 2] = -INFINITY;
    }
  }
  /// Online softmax: scaled scores to P, 0 past the last token; stores block sums if wanted; rescales o.
  __device__ __forceinline__ void online_softmax(int rows, const BlockSumOutput& sums = {}) {
    mask_rows(rows);
    // On the first tile o is zero; all heads have the same tiles.
    const bool first = total[0][0].m == neg_inf;
#pragma unroll
    for (int m = 0; m < M; ++m) softmax_of_head_tile(m, first, sums);
  }

  /// o and the running sum are relative to a reference: where (m, sum) of tiles decide nothing, the running maximum or
  /// up to so much below it, in powers of two, so that o is seldom rescaled.
  static constexpr float slack = 8.0f;
  /// Online softmax of unscaled scores where nobody reads (m, sum) of the tile: P, 0 past the last token; rescales o. A
  /// lane has the sum of its own tokens until sum_lanes().
  __device__ __forceinline__ void softmax_to_reference(int rows) {
    mask_rows(rows);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      float maxima[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x = fmaxf(c[m][0][half * 2], c[m][0][half * 2 + 1]);
#pragma unroll
        for (int j = 1; j < 4; ++j) x = fmaxf(x, fmaxf(c[m][j][half * 2], c[m][j][half * 2 + 1]));
        maxima[half] = quad_max(x) * softmax_scale;
      }
      raise_reference(m, maxima);
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float &a = c[m][j][half * 2], &b = c[m][j][half * 2 + 1];
          a = exp2_fast(a * softmax_scale - total[m][half].m), b = exp2_fast(b * softmax_scale - total[m][half].m);
          total[m][half].s += a + b;
        }
    }
  }
  __device__ __forceinline__ void sum_lanes() {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) total[m][half].s = quad_sum(total[m][half].s);
  }

  /// Adds P V for a panel of columns of V.
  template <int Panel = 0>
  __device__ __forceinline__ void multiply_pv(unsigned slot) {
    const int lane = threadIdx.x % 32, row = block_of_column(lane % 8) * 4 + lane % 16 / 8, vec = lane / 16;
#pragma unroll
    for (int step = 0; step < 2; ++step) {  // of 16 tokens
      std::uint32_t a[M][4];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const float(&p)[4] = c[m][2 * step], (&r)[4] = c[m][2 * step + 1];
        a[m][0] = pack(p[0], p[1], T{}), a[m][1] = pack(p[2], p[3], T{});
        a[m][2] = pack(r[0], r[1], T{}), a[m][3] = pack(r[2], r[3], T{});
      }
#pragma unroll
      for (int j = 0; j < v_columns / 16; ++j) {
        if (!Tuned && j % 4 == 0 && Panel * v_columns + j * 16 >= size.d_v) break;
        std::uint32_t b[4];
        ldmatrix_x4_trans(b, slot + (step * 2 + row) * v_bytes + j / 4 * 128 + ((j % 4 * 2 + vec) ^ row / 4) * 16);
#pragma unroll
        for (int m = 0; m < M; ++m) {
          float(&low)[4] = o[m][Panel * (v_columns / 8) + 2 * j],
          (&high)[4] = o[m][Panel * (v_columns / 8) + 2 * j + 1];
          mma(low, a[m][0], a[m][1], a[m][2], a[m][3], b[0], b[1], T{});
          mma(high, a[m][0], a[m][1], a[m][2], a[m][3], b[2], b[3], T{});
        }
      }
    }
  }

  // multiply_qk() and multiply_pv() of a tile in one panel, with the operands of four products ahead under way, for
  // kernels whose registers suffice: else each product waits for its own.
  static constexpr bool loads_ahead = Tuned && M == 1 && k_panels == 1 && v_panels == 1;
  __device__ __forceinline__ void multiply_qk_ahead(unsigned slot) {
    static_assert(loads_ahead);
    constexpr int steps = DK / 32;
    const int lane = threadIdx.x % 32, block = block_of_column(lane % 8), vec = lane / 8;
    uint4 a[2][2];
    std::uint32_t b[2][4][4];
    const auto load = [&](int k) {
      const unsigned at = slot + block * 4 * k_bytes + k / 2 * 128 + ((k % 2 * 4 + vec) ^ block) * 16;
#pragma unroll
      for (int i = 0; i < 2; ++i) a[k % 2][i] = q(0, (2 * k + i) * 32 + lane);
#pragma unroll
      for (int j = 0; j < 4; ++j) ldmatrix_x4(b[k % 2][j], at + j * k_bytes);
    };
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[0][j][i] = 0.0f;
    load(0);
#pragma unroll
    for (int k = 0; k < steps; ++k) {
      if (k + 1 < steps) load(k + 1);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 x = a[k % 2][i];
#pragma unroll
        for (int j = 0; j < 4; ++j) mma(c[0][j], x.x, x.y, x.z, x.w, b[k % 2][j][2 * i], b[k % 2][j][2 * i + 1], T{});
      }
    }
  }
  __device__ __forceinline__ void multiply_pv_ahead(unsigned slot) {
    static_assert(loads_ahead);
    constexpr int columns = DV / 16, ahead = 4, loads = 2 * columns;  // a load is 16 columns of 16 tokens
    const int lane = threadIdx.x % 32, row = block_of_column(lane % 8) * 4 + lane % 16 / 8, vec = lane / 16;
    std::uint32_t a[2][4], b[2 * ahead][4];
#pragma unroll
    for (int step = 0; step < 2; ++step) {  // of 16 tokens
      const float(&p)[4] = c[0][2 * step], (&r)[4] = c[0][2 * step + 1];
      a[step][0] = pack(p[0], p[1], T{}), a[step][1] = pack(p[2], p[3], T{});
      a[step][2] = pack(r[0], r[1], T{}), a[step][3] = pack(r[2], r[3], T{});
    }
    const auto load = [&](int i) {
      const int step = i / columns, j = i % columns;
      ldmatrix_x4_trans(b[i % (2 * ahead)],
                        slot + (step * 2 + row) * v_bytes + j / 4 * 128 + ((j % 4 * 2 + vec) ^ row / 4) * 16);
    };
#pragma unroll
    for (int i = 0; i < ahead; ++i) load(i);
#pragma unroll
    for (int i = 0; i < loads; ++i) {
      if (i % ahead == 0)
#pragma unroll
        for (int next = i + ahead; next < i + 2 * ahead; ++next)
          if (next < loads) load(next);
      const std::uint32_t(&x)[4] = a[i / columns], (&y)[4] = b[i % (2 * ahead)];
      const int j = i % columns;
      mma(o[0][2 * j], x[0], x[1], x[2], x[3], y[0], y[1], T{});
      mma(o[0][2 * j + 1], x[0], x[1], x[2], x[3], y[2], y[3], T{});
    }
  }

  /// Stores the maxima of the tile.
  __device__ __forceinline__ void store_tile_max(float* to, const BlockSumOutput& rows) const {
    const int lane = threadIdx.x % 32;
    if (lane % 4 != 0) return;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) store_word(rows, to + m * 16 + lane / 4 + half * 8, tile[m][half].m);
  }
  /// Floats of park(): o and the states of a lane.
  static constexpr int parked_floats = M * (DV / 2 + 4);
  /// Stores o and the states to local memory, by a pointer that keeps them out of registers. unpark() loads the states
  /// and a part of o.
  __device__ __forceinline__ void park(float* to) const {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int j = 0; j < DV / 8; ++j) store_local(to + (m * (DV / 8) + j) * 4, o[m][j]);
      store_local(to + M * (DV / 2) + m * 4, {total[m][0].m, total[m][0].s, total[m][1].m, total[m][1].s});
    }
  }
  template <int Part>
  __device__ __forceinline__ void unpark(const float* from) {
    constexpr int m = Part / v_panels, first = Part % v_panels * (v_columns / 8);
#pragma unroll
    for (int j = first; j < first + v_columns / 8; ++j) load_local(from + (m * (DV / 8) + j) * 4, o[m][j]);
#pragma unroll
    for (int i = 0; i < M; ++i) {
      float states[4];
      load_local(from + M * (DV / 2) + i * 4, states);
      total[i][0] = {states[0], states[1]}, total[i][1] = {states[2], states[3]};
    }
  }
  /// Stores the (m, sum) of the tile alone.
  __device__ __forceinline__ void store_tile_lse(float2* to) const { store_states(to, tile); }
  __device__ __forceinline__ void store_state(float2* to) const { store_states(to, total); }
  /// Stores o * scale_of(head, m) of a part to [16][v_columns + 8].
  template <int Part = 0, class ScaleOf>
  __device__ __forceinline__ void store_scaled_o(float* to, ScaleOf scale_of) const {
    constexpr int m = Part / v_panels, first = Part % v_panels * (v_columns / 8);
    const int g = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float x = scale_of(m * 16 + g + half * 8, total[m][half].m);
      float* row = to + (g + half * 8) * (v_columns + 8) + quad * 2;
#pragma unroll
      for (int j = 0; j < v_columns / 8; ++j)
        *reinterpret_cast<float2*>(row + j * 8) =
            make_float2(x * o[m][first + j][half * 2], x * o[m][first + j][half * 2 + 1]);
    }
  }

 protected:
  static __device__ __forceinline__ void store_local(float* to, const float (&x)[4]) {
    asm volatile("st.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]) : "memory");
  }
  static __device__ __forceinline__ void load_local(const float* from, float (&x)[4]) {
    asm volatile("ld.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
                 : "l"(from)
                 : "memory");
  }
  static __device__ __forceinline__ int block_of_column(int n) { return n / 2 + n % 2 * 4; }
  // To the maxima of heads g and g + 8 of a head tile, where one of them has risen by more than `slack`.
  __device__ __forceinline__ void raise_reference(int m, const float (&maxima)[2]) {
    const bool rises[2] = {maxima[0] > total[m][0].m + slack, maxima[1] > total[m][1].m + slack};
    if (!__any_sync(0xffffffffu, rises[0] || rises[1])) return;
    float scale[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float reference = rises[half] ? maxima[half] : total[m][half].m;
      scale[half] = exp2_fast(total[m][half].m - reference);
      total[m][half] = {reference, total[m][half].s * scale[half]};
    }
#pragma unroll
    for (int j = 0; j < DV / 8; ++j) {
      o[m][j][0] *= scale[0], o[m][j][1] *= scale[0];
      o[m][j][2] *= scale[1], o[m][j][3] *= scale[1];
    }
  }
  // Loops without branches, so that the shuffles of both halves overlap.
  __device__ __forceinline__ void softmax_of_head_tile(int m, bool first, const BlockSumOutput& sums) {
    float scale_prev[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      SoftmaxState<Exp2>& now = tile[m][half] = {};
#pragma unroll
      for (int j = 0; j < 4; ++j) now.m = fmaxf(now.m, fmaxf(c[m][j][half * 2], c[m][j][half * 2 + 1]));
      now.m = quad_max(now.m);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        c[m][j][half * 2] = exp2_fast(c[m][j][half * 2] - now.m);
        c[m][j][half * 2 + 1] = exp2_fast(c[m][j][half * 2 + 1] - now.m);
        now.s += c[m][j][half * 2] + c[m][j][half * 2 + 1];
      }
    }
    if (sums.sums) {
      store_block_sums(sums, m, 0);
      store_block_sums(sums, m, 1);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      SoftmaxState<Exp2>& now = tile[m][half];
      now.s = quad_sum(now.s);
      const TileScale scale = merge_tile_exact(total[m][half], now);
      scale_prev[half] = scale.o;
#pragma unroll
      for (int j = 0; j < 4; ++j) c[m][j][half * 2] *= scale.p, c[m][j][half * 2 + 1] *= scale.p;
    }
    if (!__any_sync(0xffffffffu, !first && (scale_prev[0] != 1.0f || scale_prev[1] != 1.0f))) return;
#pragma unroll
    for (int j = 0; j < DV / 8; ++j) {
      o[m][j][0] *= scale_prev[0], o[m][j][1] *= scale_prev[0];
      o[m][j][2] *= scale_prev[1], o[m][j][3] *= scale_prev[1];
    }
  }
  // Block sums of heads g + 8 half of a head tile; c is relative to the maximum of the tile.
  __device__ __forceinline__ void store_block_sums(const BlockSumOutput& to, int m, int half) const {
    const int lane = threadIdx.x % 32, g = lane / 4, quad = lane % 4, at = half * 2,
              left = lane / 4 * 4 + (quad + 3) % 4;
    const float(&e)[4][4] = c[m];
    const float halo = __shfl_sync(0xffffffffu, e[3][at], left), later = __shfl_sync(0xffffffffu, e[3][at + 1], left);
    float* first = to.sums + (m * 4 + half * 2 + g / 4) * tile_blocks * 4 + quad * 4 + g % 4;
    store_word(to, first, block_sum(e[0][at], e[1][at], e[2][at], e[3][at], quad == 0 ? 0.0f : halo));
    store_word(to, first + 16,
               block_sum(e[0][at + 1], e[1][at + 1], e[2][at + 1], e[3][at + 1], quad == 0 ? halo : later));
  }
  static __device__ __forceinline__ void store_states(float2* to, const SoftmaxState<Exp2> (&states)[M][2]) {
    const int lane = threadIdx.x % 32;
    if (lane % 4 != 0) return;
#pragma unroll
    for (int m = 0; m < M; ++m) {
      to[m * 16 + lane / 4] = make_float2(states[m][0].m, states[m][0].s);
      to[m * 16 + lane / 4 + 8] = make_float2(states[m][1].m, states[m][1].s);
    }
  }
};

}  // namespace nsa::gpu
