#pragma once
// What a decode warp does with a tile of 32 tokens of one list: tensor cores for 16-bit storage and 16 heads, scalar
// arithmetic for fp32 and 4 heads. Both keep o and the running (m, sum) of their heads to themselves until the CTA's
// warps meet.
//
// scores(slot) multiplies q with the rows of a slot; scale() and soften() turn the scores into weights relative to the
// running maximum; put_scores() leaves scaled scores behind, soften() and put_last() the sums of blocks instead
// (attention/block_sums.cuh); add(slot) adds the weighted values. The (m, sum) of a tile is formed by one warp in one
// order, before the running maximum takes part, so a leaf's does not depend on who reads it after what. Roundings that
// the choice of blocks hangs on are spelled out, so that every kernel leaves the same bits.

#include <algorithm>

#include "kernels/cuda/decode/split_kv/warp_tile_mma.cuh"
#include "kernels/cuda/decode/split_kv/warp_tile_scalar.cuh"

namespace nsa::gpu {

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

}  // namespace nsa::gpu
