#pragma once
// What a decode warp computes on a KV tile of 32 rows of one work item: WarpTileMma (tensor cores, 16-bit storage, 16
// heads) or WarpTileScalar (fp32, 4 heads). Both keep o and the running (m, sum) of their heads in registers until the
// warps of the CTA merge.
//
// multiply_qk(slot) forms scores from the K rows in a slot; scale_scores() and online_softmax() turn them into P
// relative to the running maximum; store_scores() stores scaled scores, online_softmax() and store_last_score() store
// block sums instead (attention/block_sums.cuh); multiply_pv(slot) adds P V. One warp forms the (m, sum) of a tile in
// one order, before the running maximum enters, so that of an LSE segment does not depend on which warp reads it or on
// what it read before. Roundings that affect block selection are explicit, so every kernel produces the same bits.

#include <algorithm>

#include "kernels/cuda/decode/split_kv/warp_tile_mma.cuh"
#include "kernels/cuda/decode/split_kv/warp_tile_scalar.cuh"

namespace nsa::gpu {

/// Shared memory of a CTA: the rings of the warps, the queries, P of scalar warps, halo rows, the selected blocks. The
/// epilogue reuses the rings for o [heads][d_v + 8] and (m, sum) of every warp.
template <class WarpTile>
struct DecodeSharedLayout {
  static constexpr int slot_bytes = slot_rows * std::max(WarpTile::k_bytes, WarpTile::v_bytes);
  static constexpr int slots = std::max(2, (24 << 10) / slot_bytes);
  static constexpr int ring_bytes = slots * slot_bytes;
  static constexpr int queries = decode_warps * ring_bytes, prob = queries + WarpTile::query_bytes,
                       halo_rows = prob + decode_warps * WarpTile::prob_bytes,  // [warp][slot], one row of K each
      selected = halo_rows + decode_warps * slots * WarpTile::k_bytes;
  static constexpr int merge_bytes = decode_warps * WarpTile::heads * (WarpTile::d_v + 8 + 2) * 4;
  static_assert(merge_bytes <= queries);
  static std::size_t bytes(const LayerShape& s) { return selected + s.rules.n_sel * sizeof(std::int32_t); }
};

}  // namespace nsa::gpu
