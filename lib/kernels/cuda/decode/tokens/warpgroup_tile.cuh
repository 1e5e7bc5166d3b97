#pragma once
// Warp tile of four warps that multiply together (wgmma): a warp has the 16 heads of one query token, and the four read
// a slot once. It takes two KV tiles at a time, a pair, whose softmax is independent up to the merge into the running
// state: their instructions fill each other's latencies. A warp's accumulators have the layout of WarpTileMma: its 16
// rows of the 64.
//
// A slot is panels of 64 columns, 128 bytes a row under the 128-byte swizzle, with the rows of the first tile, then
// those of the second. Token t of a tile is row 8 (t % 4) + 2 (t / 4 % 4) + t / 16, so that column n of product j is
// the token that it is in WarpTileMma. The queries lie in such panels too.
//
// The products have the same bits as those of mma.sync: sums of 16 terms each, in the same order of sums
// (tests/gpu/test_ragged.cpp compares them).

#include "kernels/cuda/decode/split_kv/warp_tile.cuh"
#include "kernels/cuda/primitives/wgmma.cuh"

namespace nsa::gpu {

constexpr int pair_rows = 2 * slot_rows;

/// Issues this warp's quarter of the copy of a tile's 32 rows, of which [low, high) exist, into its half of a slot of
/// pairs. Four warps.
template <int RowBytes>
__device__ __forceinline__ void cp_async_panels(unsigned half, const char* from, int low, int high,
                                                std::uint64_t policy) {
  constexpr int panel_bytes = pair_rows * 128;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row0 = warp * 8 + lane / 8, vector = lane % 8,
            to_row = lane / 8 * 8 + warp % 2 * 4 + warp / 2;
  const char* source = from + row0 * RowBytes + vector * 16;
  asm("" : "+l"(source));  // one address and offsets from it, not an address a row
  const unsigned first = half + to_row * 128 + ((vector ^ to_row % 8) << 4);
#pragma unroll
  for (int i = 0; i < 2; ++i) {  // rows 4 apart, two apart in the slot
    const unsigned to = (first ^ i << 5) + i * 256;
    const int row = row0 + i * 4, bytes = row >= low && row < high ? 16 : 0;  // 0: nothing is read, zeros are written
#pragma unroll
    for (int c = 0; c < RowBytes / 128; ++c)
      asm volatile(
          "cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(to + c * panel_bytes),
          "l"(source + i * 4 * RowBytes + c * 128), "r"(bytes), "l"(policy)
          : "memory");
  }
}

template <class T, int DK, int DV>
struct WarpgroupTile : WarpTileMma<T, DK, DV, 1, true, QueryRows<DK * 2, 128, 64 * 128>> {
  using Base = WarpTileMma<T, DK, DV, 1, true, QueryRows<DK * 2, 128, 64 * 128>>;
  static constexpr int ctas_per_sm = DK > 128 ? 2 : 3;  // of four warps
  static constexpr int panel_bytes = pair_rows * 128;   // 64 rows of queries too
  float pair[2][4][4] = {};                             // c of the two tiles
  SoftmaxState<Exp2> of_tile[2][2];

  using Base::Base;

  /// Bytes from the queries of a warp to those of the next.
  static constexpr int warp_queries = 16 * 128;
  /// Scores of the rows of K in a slot. All four warps.
  __device__ __forceinline__ void multiply_qk(unsigned slot) {
    float(&d)[32] = reinterpret_cast<float(&)[32]>(pair);
    const std::uint64_t queries = make_desc(this->q.at - threadIdx.x / 32 * warp_queries), keys = make_desc(slot);
    warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < DK / 16; ++k) {
      const unsigned at = k / 4 * panel_bytes + k % 4 * 32;
      wgmma_ss(d, advance_desc(queries, at), advance_desc(keys, at), k > 0, T{});
    }
    warpgroup_commit_batch();
    warpgroup_wait<0>();
    warpgroup_fence_operand(d);
  }
  __device__ __forceinline__ void scale_scores() {
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) pair[t][j][i] = __fmul_rn(pair[t][j][i], this->softmax_scale);
  }
  /// Removes the tokens of a tile outside [low, high).
  __device__ __forceinline__ void mask(int t, int low, int high) {
    const int quad = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = 4 * quad + 16 * i + j;
        if (token < low || token >= high) pair[t][j][i] = pair[t][j][i + 2] = -INFINITY;
      }
  }
  /// Scaled scores to exponentials relative to the maximum of their tile, whose (m, sum) it forms.
  __device__ __forceinline__ void softmax_of_tiles() {
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        SoftmaxState<Exp2>& now = of_tile[t][half] = {};
#pragma unroll
        for (int j = 0; j < 4; ++j) now.m = fmaxf(now.m, fmaxf(pair[t][j][half * 2], pair[t][j][half * 2 + 1]));
        now.m = quad_max(now.m);
      }
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        SoftmaxState<Exp2>& now = of_tile[t][half];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float &a = pair[t][j][half * 2], &b = pair[t][j][half * 2 + 1];
          a = exp2_fast(a - now.m), b = exp2_fast(b - now.m);
          now.s += a + b;
        }
        now.s = quad_sum(now.s);
      }
  }
  /// Merges the tiles into the running state: exponentials to P.
  __device__ __forceinline__ void merge_tiles() {
    this->raise_reference(0, {fmaxf(of_tile[0][0].m, of_tile[1][0].m), fmaxf(of_tile[0][1].m, of_tile[1][1].m)});
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      SoftmaxState<Exp2>& total = this->total[0][half];
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const float scale = exp2_fast(of_tile[t][half].m - total.m);
        total.s += of_tile[t][half].s * scale;
#pragma unroll
        for (int j = 0; j < 4; ++j) pair[t][j][half * 2] *= scale, pair[t][j][half * 2 + 1] *= scale;
      }
    }
  }
  /// Online softmax of unscaled scores where nobody reads (m, sum) of the tiles, as in WarpTileMma.
  __device__ __forceinline__ void softmax_to_reference() {
    float maxima[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x = -INFINITY;
#pragma unroll
      for (int t = 0; t < 2; ++t)
#pragma unroll
        for (int j = 0; j < 4; ++j) x = fmaxf(x, fmaxf(pair[t][j][half * 2], pair[t][j][half * 2 + 1]));
      maxima[half] = quad_max(x) * this->softmax_scale;
    }
    this->raise_reference(0, maxima);
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int t = 0; t < 2; ++t)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          SoftmaxState<Exp2>& total = this->total[0][half];
          float &a = pair[t][j][half * 2], &b = pair[t][j][half * 2 + 1];
          a = exp2_fast(a * this->softmax_scale - total.m), b = exp2_fast(b * this->softmax_scale - total.m);
          total.s += a + b;
        }
  }
  /// Adds P V of the rows of V in a slot. All four warps.
  __device__ __forceinline__ void multiply_pv(unsigned slot) {
    std::uint32_t probabilities[4][4];
#pragma unroll
    for (int step = 0; step < 4; ++step) {  // of 16 tokens
      const float(&x)[4] = pair[step / 2][step % 2 * 2], (&y)[4] = pair[step / 2][step % 2 * 2 + 1];
      probabilities[step][0] = pack(x[0], x[1], T{}), probabilities[step][1] = pack(x[2], x[3], T{});
      probabilities[step][2] = pack(y[0], y[1], T{}), probabilities[step][3] = pack(y[2], y[3], T{});
    }
    float(&d)[DV / 2] = reinterpret_cast<float(&)[DV / 2]>(this->o);
    const std::uint64_t desc = make_desc(slot, panel_bytes);
    warpgroup_arrive();
#pragma unroll
    for (int step = 0; step < 4; ++step) wgmma_rs(d, probabilities[step], advance_desc(desc, step * 2048), T{});
    warpgroup_commit_batch();
    warpgroup_wait<0>();
    warpgroup_fence_operand(d);
  }

  // What rank reads of a tile, as WarpTileMma stores it. Before the exponentials: raw scores of `count` tokens.
  __device__ __forceinline__ void store_scores_of(int t, const ScoreOutput& to, int count, int valid_heads) {
    take_scores(t);
    this->store_scores(to, count, valid_heads);
  }
  __device__ __forceinline__ void store_last_score_of(int t, const BlockSumOutput& to, int count) {
    take_scores(t);
    this->store_last_score(to, count);
  }
  // After them.
  __device__ __forceinline__ void store_block_sums_of(int t, const BlockSumOutput& to) {
    take_scores(t);
    this->store_block_sums(to, 0, 0);
    this->store_block_sums(to, 0, 1);
  }
  /// The state of the tile and head whose lane of four this is: tile quad / 2, head g + 8 (quad % 2).
  __device__ __forceinline__ SoftmaxState<Exp2> state_of_lane(int lane) const {
    const int quad = lane % 4;
    const SoftmaxState<Exp2> first = quad % 2 == 0 ? of_tile[0][0] : of_tile[0][1],
                             second = quad % 2 == 0 ? of_tile[1][0] : of_tile[1][1];
    return quad < 2 ? first : second;
  }
  /// Stores (m, sum) and, if wanted, o as a partial.
  __device__ __forceinline__ void store_partial(float* to, int valid_heads, bool with_o) const {
    const int g = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
    this->store_state(reinterpret_cast<float2*>(to + Base::heads * DV));
    if (!with_o) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (g + half * 8 >= valid_heads) break;
      float* row = to + (g + half * 8) * DV + quad * 2;
#pragma unroll
      for (int j = 0; j < DV / 8; ++j)
        *reinterpret_cast<float2*>(row + j * 8) = make_float2(this->o[0][j][half * 2], this->o[0][j][half * 2 + 1]);
    }
  }
  /// Starts another branch.
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int half = 0; half < 2; ++half) this->total[0][half] = {};
#pragma unroll
    for (int j = 0; j < DV / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) this->o[0][j][i] = 0.0f;
  }

 private:
  __device__ __forceinline__ void take_scores(int t) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) this->c[0][j][i] = pair[t][j][i];
  }
};

/// The tile of four warps together that does what a warp tile does; void: there is none, or the build has no such
/// products.
template <class WarpTile>
struct Together {
  using Tile = void;
};
#ifndef NSA_NO_SM90A
template <class T, int DK, int DV>
struct Together<WarpTileMma<T, DK, DV, 1, true>> {
  using Tile = WarpgroupTile<T, DK, DV>;
};
#endif

}  // namespace nsa::gpu
