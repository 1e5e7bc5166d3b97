#pragma once
// What a decode warp computes on a KV tile of 32 rows of one work item: WarpTileMma (tensor cores, 16-bit storage, 16
// or 32 heads) or WarpTileScalar (fp32, 4 heads). Both keep o and the running (m, sum) of their heads in registers
// until the warps of the CTA merge.
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

/// Bytes of an element of K and V in memory: of a tile whose rows are quantised its own
/// (decode/fp8/warp_tile.cuh).
template <class WarpTile>
constexpr int element_bytes = [] {
  if constexpr (requires { WarpTile::element_bytes; })
    return WarpTile::element_bytes;
  else
    return static_cast<int>(sizeof(typename WarpTile::Type));
}();
/// Whether the rows are quantised: then every slot has scales of its rows.
template <class WarpTile>
constexpr bool is_quantised_tile = requires {
  WarpTile::element_bytes;
};

/// Bytes of a row of K or V in memory.
template <class WarpTile>
__device__ __forceinline__ int k_row_bytes(const LayerShape& s) {
  return typename WarpTile::Size(s).d_k * element_bytes<WarpTile>;
}
template <class WarpTile>
__device__ __forceinline__ int v_row_bytes(const LayerShape& s) {
  return typename WarpTile::Size(s).d_v * element_bytes<WarpTile>;
}
/// Slots that the rows of a KV tile fill: panels of K, or of V.
template <class WarpTile>
__device__ __forceinline__ int k_panels(const LayerShape& s) {
  return WarpTile::k_panels == 1 ? 1 : (s.d_k + WarpTile::k_columns - 1) / WarpTile::k_columns;
}
template <class WarpTile>
__device__ __forceinline__ int v_panels(const LayerShape& s) {
  return WarpTile::v_panels == 1 ? 1 : (s.d_v + WarpTile::v_columns - 1) / WarpTile::v_columns;
}

/// Issues the copy of a panel of K (of V: `is_v`) of the KV tile that begins at `from` into a slot.
template <class WarpTile>
__device__ __forceinline__ void copy_panel(unsigned slot, const char* from, bool is_v, int panel, int rows,
                                           const LayerShape& s, std::uint64_t policy) {
  static_assert(WarpTile::k_bytes == WarpTile::v_bytes);
  const int row_bytes = is_v ? v_row_bytes<WarpTile>(s) : k_row_bytes<WarpTile>(s), first = panel * WarpTile::k_bytes;
  cp_async_panel<WarpTile::k_bytes>(slot, from + first, row_bytes, (row_bytes - first) / 16, rows, policy);
}

/// Calls f(std::integral_constant<int, part>{}) for the parts of o that the shape has columns of.
template <class WarpTile, class F>
__device__ __forceinline__ void for_each_part(const LayerShape& s, F f) {
  f(std::integral_constant<int, 0>{});
  static_assert(WarpTile::parts <= 2);
  if constexpr (WarpTile::parts == 2)
    if (WarpTile::v_panels == 1 || s.d_v > WarpTile::v_columns) f(std::integral_constant<int, 1>{});
}

/// Whether a tile of pass 0 of the fused step waits in local memory while pass 1 runs, so that the main loop has its
/// registers: in padded instances of 16 heads, and of FP8 rows. With 32 heads the compiler's own choice is measured.
template <class WarpTile>
constexpr bool parks_tile = (!WarpTile::tuned && WarpTile::heads <= 16) || is_quantised_tile<WarpTile>;

/// That tile, in registers or in local memory.
template <class WarpTile, bool Parks = parks_tile<WarpTile>>
struct ParkedTile {
  WarpTile tile;
  __device__ __forceinline__ explicit ParkedTile(const WarpTile& empty) : tile(empty) {}
  __device__ __forceinline__ void park(const WarpTile& from) { tile = from; }
  /// The tile with a part of its o; what is the same in all tiles comes from `second`.
  template <int Part>
  __device__ __forceinline__ const WarpTile& unpark(const WarpTile&) const {
    return tile;
  }
};
template <class WarpTile>
struct ParkedTile<WarpTile, true> {
  __align__(16) float memory[WarpTile::parked_floats];
  __device__ __forceinline__ explicit ParkedTile(const WarpTile&) {}
  __device__ __forceinline__ void park(const WarpTile& from) { from.park(memory); }
  template <int Part>
  __device__ __forceinline__ WarpTile unpark(const WarpTile& second) const {
    WarpTile tile = second;
    tile.template unpark<Part>(memory);
    return tile;
  }
};

/// Shared memory of a CTA: the rings of the warps, the queries, P of scalar warps, halo rows, the selected blocks. The
/// epilogue reuses the rings for a part of o, [heads][columns + 8], and (m, sum) of every warp.
template <class WarpTile>
struct DecodeSharedLayout {
  static constexpr int slot_bytes = slot_rows * std::max(WarpTile::k_bytes, WarpTile::v_bytes);
  static constexpr int slots = std::max(2, (24 << 10) / slot_bytes);
  static constexpr int ring_bytes = slots * slot_bytes;
  static constexpr int queries = decode_warps * ring_bytes, prob = queries + WarpTile::query_bytes,
                       halo_rows = prob + decode_warps * WarpTile::prob_bytes,  // [warp][slot], one row of K each
      row_bytes = WarpTile::k_panels * WarpTile::k_bytes, selected = halo_rows + decode_warps * slots * row_bytes;
  static constexpr int merge_bytes = decode_warps * WarpTile::heads * (WarpTile::v_columns + 8 + 2) * 4;
  static_assert(merge_bytes <= queries);
  static std::size_t bytes(const LayerShape& s) { return selected + s.rules.n_sel * sizeof(std::int32_t); }
};

}  // namespace nsa::gpu
