#pragma once
// Warp tile of four warps that multiply together (wgmma): a warp has the 16 heads of one query token, and the four read
// a slot once. Everything but the products is that of WarpTileMma, whose accumulators have the same layout: a warp's 16
// rows of the 64.
//
// A slot is panels of 64 columns, 128 bytes a row under the 128-byte swizzle. Token t of a tile is row 8 (t % 4) + 2
// (t / 4 % 4) + t / 16, so that column n of product j is the token that it is in WarpTileMma.
//
// The products have the same bits as those of mma.sync: sums of 16 terms each, in the same order of sums
// (tests/gpu/test_ragged.cpp compares them).

#include "kernels/cuda/decode/split_kv/warp_tile.cuh"
#include "kernels/cuda/primitives/wgmma.cuh"

namespace nsa::gpu {

/// Issues this warp's quarter of the copy of 32 rows, of which `rows` exist, into a slot of panels. Four warps.
template <int RowBytes>
__device__ __forceinline__ void cp_async_panels(unsigned slot, const char* from, int rows, std::uint64_t policy) {
  constexpr int panel_bytes = slot_rows * 128;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row0 = warp * 8 + lane / 8, vector = lane % 8,
            to_row = lane / 8 * 8 + warp % 2 * 4 + warp / 2;
  const char* source = from + row0 * RowBytes + vector * 16;
  asm("" : "+l"(source));  // one address and offsets from it, not an address a row
  const unsigned first = slot + to_row * 128 + ((vector ^ to_row % 8) << 4);
#pragma unroll
  for (int i = 0; i < 2; ++i) {  // rows 4 apart, two apart in the slot
    const unsigned to = (first ^ i << 5) + i * 256;
    const int bytes = row0 + i * 4 < rows ? 16 : 0;  // 0: nothing is read, 16 zeros are written
#pragma unroll
    for (int c = 0; c < RowBytes / 128; ++c)
      asm volatile(
          "cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(to + c * panel_bytes),
          "l"(source + i * 4 * RowBytes + c * 128), "r"(bytes), "l"(policy)
          : "memory");
  }
}

template <class T, int DK, int DV>
struct WarpgroupTile : WarpTileMma<T, DK, DV> {
  using Base = WarpTileMma<T, DK, DV>;
  static constexpr int ctas_per_sm = DK > 128 ? 2 : 3;  // of four warps
  static constexpr int panel_bytes = slot_rows * 128;
  using Base::Base;

  /// Scores of the rows of K in a slot. All four warps.
  __device__ __forceinline__ void multiply_qk(unsigned slot, int = 0) {
    const unsigned lane = threadIdx.x % 32, row = this->q.at + lane % 16 * (DK * 2) + (lane / 16 ^ lane % 8) * 16;
    std::uint32_t a[DK / 16][4];  // the queries
#pragma unroll
    for (int k = 0; k < DK / 16; ++k) ldmatrix_x4(a[k], (row ^ k % 4 * 32) + k / 4 * 128);
    float(&d)[16] = reinterpret_cast<float(&)[16]>(this->c);
    const std::uint64_t desc = make_desc(slot);
    warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < DK / 16; ++k)
      wgmma_rs(d, a[k], advance_desc(desc, k / 4 * panel_bytes + k % 4 * 32), k > 0, T{});
    warpgroup_commit_batch();
    warpgroup_wait<0>();
    warpgroup_fence_operand(d);
  }
  /// Instead of online_softmax() for a query token that attends no row of the tile.
  __device__ __forceinline__ void clear_scores() {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) this->c[0][j][i] = 0.0f;
  }
  /// Adds P V of the rows of V in a slot. All four warps.
  template <int Panel = 0>
  __device__ __forceinline__ void multiply_pv(unsigned slot) {
    std::uint32_t probabilities[2][4];
#pragma unroll
    for (int step = 0; step < 2; ++step) {  // of 16 tokens
      const float(&x)[4] = this->c[0][2 * step], (&y)[4] = this->c[0][2 * step + 1];
      probabilities[step][0] = pack(x[0], x[1], T{}), probabilities[step][1] = pack(x[2], x[3], T{});
      probabilities[step][2] = pack(y[0], y[1], T{}), probabilities[step][3] = pack(y[2], y[3], T{});
    }
    float(&d)[DV / 2] = reinterpret_cast<float(&)[DV / 2]>(this->o);
    const std::uint64_t desc = make_desc(slot, panel_bytes);
    warpgroup_arrive();
#pragma unroll
    for (int step = 0; step < 2; ++step) wgmma_rs(d, probabilities[step], advance_desc(desc, step * 2048), T{});
    warpgroup_commit_batch();
    warpgroup_wait<0>();
    warpgroup_fence_operand(d);
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
