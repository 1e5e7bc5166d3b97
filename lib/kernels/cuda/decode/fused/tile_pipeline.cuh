#pragma once
// KV tiles of one warp in a fused decode step: its tiles of cmp, then its tiles of win or sel, 32 tokens each, from its
// own ring (primitives/cp_async_ring.cuh). Copies run ahead of the computation and from the first branch into the
// second, as far as the tiles are known: all of the window, of sel the blocks that are always selected. So memory stays
// busy while blocks are scored and selected.

#include "kernels/cuda/decode/fused/params.cuh"
#include "kernels/cuda/decode/split_kv/warp_tile.cuh"

namespace nsa::gpu {

/// Shared memory of a CTA of W warps. The epilogue reuses the rings for a part of o, [warp][cmp, second][heads][columns
/// + 8], and (m, sum) of the warps. The CTAs of a work item send to `partials` what this one merges. That memory
/// overlaps block selection, not the rings, because a CTA may send while the rings of another are in use. Where o has
/// two parts it overlaps the queries too: no CTA sends before all are past their KV tiles. CTAs of 4 warps have a work
/// item each.
template <class WarpTile, int W>
struct FusedSharedLayout {
  static constexpr bool after_cmp = W == fused_warps_after_cmp;
  // The o of the warps is longer than their rings: it overlaps all up to the gates.
  static constexpr bool long_epilogue = is_quantised_tile<WarpTile> && W >= fused_warps;
  static constexpr int slot_bytes = DecodeSharedLayout<WarpTile>::slot_bytes,
                       slots = after_cmp       ? (16 << 10) / slot_bytes
                               : long_epilogue ? 4
                                               : DecodeSharedLayout<WarpTile>::slots,
                       ring_bytes = slots * slot_bytes;
  static constexpr bool whole = WarpTile::parts == 1;                        // o
  static constexpr int top = WarpTile::tuned ? warp_top_n : 2 * warp_top_n;  // blocks of a sorted list
  static constexpr int pitch = WarpTile::v_columns + (long_epilogue ? 4 : 8),
                       warp_floats = WarpTile::part_heads * pitch,
                       items = WarpTile::part_heads * (WarpTile::v_columns / 4);
  static constexpr int warp_partials = after_cmp ? 1 : 2;                             // second alone, or cmp, second
  static constexpr int warp_lse = W * warp_partials * warp_floats * 4;                // (m, sum) of the warps
  static constexpr int cta_lse = warp_lse + W * warp_partials * WarpTile::heads * 8,  // (m, sum) of the CTA by branch
      epilogue_end = cta_lse + branches * WarpTile::part_heads * 8;
  static constexpr int queries = W * ring_bytes + (whole ? 0 : 32), prob = queries + WarpTile::query_bytes,
                       ranges = prob + W * WarpTile::prob_bytes, scale_ranges = ranges + W * 2 * 48,
                       scales = scale_ranges + (is_quantised_tile<WarpTile> ? W * 2 * 16 : 0),
                       fixed_end = scales + (is_quantised_tile<WarpTile> ? W * slots * slot_rows : 0);
  static constexpr int gates = long_epilogue ? std::max(epilogue_end, fixed_end + fused_max_cluster * top * 8)
                               : whole       ? fixed_end
                                             : W * ring_bytes,
                       barrier = gates + 16, cta_top = whole && !long_epilogue ? barrier + 16 : fixed_end,
                       top_bytes = W < fused_warps ? 0 : fused_max_cluster * top * 8,
                       select = long_epilogue ? barrier + 16 : cta_top + top_bytes;
  static_assert(long_epilogue || epilogue_end <= W * ring_bytes);
  // A CTA of 4 warps needs partials where ranks merge only; they are behind the warps' o and (m, sum).
  static constexpr int merged_bytes = branches * ((items + 8) * 16 + 40 * 8),
                       partials = W < fused_warps ? cta_lse + branches * WarpTile::part_heads * 8
                                  : whole         ? select
                                                  : queries,
                       partial_bytes = W < fused_warps ? 0 : merged_bytes;
  static_assert(W >= fused_warps || partials + merged_bytes <= W * ring_bytes);
  static_assert((W < fused_warps ? select : partials) + partial_bytes <= 227 << 10, "a CTA has at most 227 KiB");
  // Block selection: the sorted blocks of the warps, LSE buckets, normalisers, probabilities by warp, overlaps.
  static __host__ __device__ int buckets_at() { return select + W * top * 8; }
  static __host__ __device__ int normalisers_at(const LayerShape& s) {
    return buckets_at() + s.lse.buckets * WarpTile::heads * 8;
  }
  static __host__ __device__ int terms_at(const LayerShape& s) {
    const int heads = WarpTile::tuned ? WarpTile::heads : padded_heads(s);
    return (normalisers_at(s) + heads * 8 + 15) / 16 * 16;
  }
  static __host__ __device__ int overlaps_at(const LayerShape& s) {
    return terms_at(s) + W * (max_halo_tokens + round_tokens) * 4;
  }
  /// A rank that holds chunks: a halo row a slot, while cmp is attended, in the place of what selection has later.
  static constexpr int halo_rows = select + W * warp_top_n * 8, halo_bytes = slots * WarpTile::k_bytes;
  static int bytes(const LayerShape& s) {
    const BlockRules& r = s.rules;
    const int overlaps = r.l_sel / r.d + (r.l - 1) / r.d;
    return std::max((W < fused_warps ? select : partials) + partial_bytes,
                    overlaps_at(s) + (overlaps + 4) * 4);  // 4: the compiler loads vectors of four
  }
};

/// Tiles first, first + step, ... below `count`, of spans of `size` rows that begin at multiples of `size`. Valid rows
/// are in [low, high).
struct TileRange {
  const char *k, *v;
  int first, step, count;
  int size, tiles_per_span, first_span, low, high;
};
static_assert(sizeof(TileRange) == 48);
/// Scales of the rows of a range, where the rows are quantised.
struct ScaleRange {
  const std::uint8_t *k, *v;
};
/// The scale of the first row of a plane, or of its rows in the first page.
__device__ __forceinline__ std::uint8_t* first_scale(const KvView& view, std::int64_t plane, int group) {
  return view.scales + (view.pages.pages ? std::int64_t{group} * view.pages.rows
                                         : plane * scales_of_plane(view.plane_stride / view.width));
}

/// Contiguous rows of a tile.
struct TileRows {
  int row, count;
};

/// Issues the copy of a panel of K (of V: `is_v`) of a tile of a plane into a slot.
template <class WarpTile>
__device__ __forceinline__ void copy_tile_panel(unsigned to, const char* plane, bool is_v, int panel,
                                                const TileRows& rows, const LayerShape& s, std::uint64_t policy) {
  if constexpr (!WarpTile::tuned) {
    const int row_bytes = is_v ? v_row_bytes<WarpTile>(s) : k_row_bytes<WarpTile>(s);
    copy_panel<WarpTile>(to, plane + std::int64_t{rows.row} * row_bytes, is_v, panel, rows.count, s, policy);
  } else if (WarpTile::k_bytes == WarpTile::v_bytes) {
    cp_async_tile<WarpTile::k_bytes>(to, plane + std::int64_t{rows.row} * WarpTile::k_bytes, rows.count, policy);
  } else if (is_v) {
    cp_async_tile<WarpTile::v_bytes>(to, plane + std::int64_t{rows.row} * WarpTile::v_bytes, rows.count, policy);
  } else {
    cp_async_tile<WarpTile::k_bytes>(to, plane + std::int64_t{rows.row} * WarpTile::k_bytes, rows.count, policy);
  }
}

/// The tiles of a warp, and which is copied next. Shard: cmp is chunks of one segment each, and K of a chunk begins
/// with a halo row, which is loaded with its first tile and scored for its first block. Wraps: the window is in a ring
/// of whole spans that it does not fill. Paged: cmp and sel may be in pages.
template <class WarpTile, bool Shard, bool Wraps, bool Paged>
struct TileLoads {
  static constexpr bool is_quantised = is_quantised_tile<WarpTile>;
  const LayerShape* shape;
  const TileRange* ranges;         // shared, of this warp: cmp, then the second branch
  const ScaleRange* scale_ranges;  // the same of their scales
  bool scores_only, attends_sel;   // attends_sel: the second branch is sel
  int selected;                    // lane u: the u-th selected block; -1: none
  unsigned ring, scale_ring;       // scale_ring: of quantised rows, slot_rows bytes a slot
  std::uint64_t policy;
  // The next copies are of tile `load_tile` of pass `load_pass`, if below `load_end`.
  TileRows load_rows;
  int load_pass = 0, load_tile, load_end, known_tiles;
  // Shard: rows between chunks; whether the first chunk here has a halo; a row of shared memory beside every slot.
  int chunk_gap = 0;
  bool first_has_halo = false;
  unsigned halo_rows = 0;
  const FusedPages* pages;
  int sequence;         // of the tile
  int window_ring = 0;  // Wraps: its rows
  int cmp_tokens;       // of quantised rows

  __device__ __forceinline__ TileRows rows_of(int pass, int i) const {
    if constexpr (is_quantised)  // without loads: spans of cmp are whole tiles
      if (pass == 0) return {i * tile_rows, min(tile_rows, cmp_tokens - i * tile_rows)};
    const TileRange& c = ranges[pass];
    const int u = c.tiles_per_span == 2 ? i / 2 : i / c.tiles_per_span, at = (i - u * c.tiles_per_span) * tile_rows;
    int span = c.first_span + u;
    if (pass == 1 && attends_sel) span = __shfl_sync(0xffffffffu, selected, u);
    const int from = span * c.size, begin = max(c.low, from), end = min(from + c.size, c.high);
    const int gaps = Shard && pass == 0 ? span * chunk_gap : 0;
    if constexpr (Wraps)
      if (pass == 1 && !attends_sel && window_ring > 0)
        return {(begin + at) % window_ring, min(tile_rows, end - begin - at)};
    return {begin + at + gaps, min(tile_rows, end - begin - at)};
  }
  // The same where they lie in memory. Rows without tokens may have no page.
  __device__ __forceinline__ TileRows memory_rows_of(int pass, int i) const {
    TileRows rows = rows_of(pass, i);
    if (!Paged || !pages->table[0] || (pass == 1 && !attends_sel)) return rows;
    const TileRange& c = ranges[pass];
    const int u = c.tiles_per_span == 2 ? i / 2 : i / c.tiles_per_span;
    int entry = u;
    if (pass == 1) entry = pages->by_blocks(max(0, __shfl_sync(0xffffffffu, selected, u)));
    if (rows.count > 0 || has_halo(pass, i)) rows.row = pages->row(pass, sequence, entry, rows.row);
    return rows;
  }
  // Whether tile i of cmp comes with a halo row. A chunk may have a halo and no token yet.
  __device__ __forceinline__ bool has_halo(int pass, int i) const {
    if constexpr (!Shard) return false;
    const int per_span = ranges[0].tiles_per_span;
    return pass == 0 && (per_span == 2 ? i % 2 : i % per_span) == 0 && (i > 0 || first_has_halo);
  }
  // To the first tile from `load_tile` on that has tokens.
  __device__ __forceinline__ void advance_load() {
#pragma unroll 1
    while (true) {
      if (load_tile < load_end) {
        load_rows = memory_rows_of(load_pass, load_tile);
        if (load_rows.count > 0 || has_halo(load_pass, load_tile)) return;
        load_tile += ranges[load_pass].step;
      } else if (load_pass == 0) {
        load_pass = 1, load_tile = ranges[1].first, load_end = known_tiles;
      } else {
        return;
      }
    }
  }
};

/// Copies of K and V, panel by panel, into the ring. Of quantised rows: decode/fp8/tile_pipeline.cuh.
template <class WarpTile, int W, bool Shard = false, bool Paged = true>
struct TilePipeline : TileLoads<WarpTile, Shard, false, Paged> {
  using SharedLayout = FusedSharedLayout<WarpTile, W>;
  using Loads = TileLoads<WarpTile, Shard, false, Paged>;
  using Loads::advance_load, Loads::has_halo;
  using Loads::load_rows, Loads::load_pass, Loads::load_tile, Loads::load_end, Loads::known_tiles;
  using Loads::shape, Loads::ranges, Loads::scores_only, Loads::ring, Loads::policy, Loads::halo_rows;
  // The next copy is V (`load_v`) or K.
  int load_panel = 0, write_slot = 0, read_slot = 0, filled_slots = 0;
  bool load_v = false;

  /// While a slot is consumed.
  __device__ __forceinline__ unsigned halo_row() const { return halo_rows + read_slot * WarpTile::k_bytes; }
  // Issues the copy of a panel of the rows to load.
  __device__ __forceinline__ void copy_rows(unsigned to, const TileRange& c, const LayerShape& s) const {
    copy_tile_panel<WarpTile>(to, load_v ? c.v : c.k, load_v, load_panel, load_rows, s, policy);
  }
  // To the next panel, the V of this tile, or the next tile.
  __device__ __forceinline__ void advance_copy(const TileRange& c, const LayerShape& s) {
    if (WarpTile::k_panels > 1 || WarpTile::v_panels > 1) {
      if (++load_panel < (load_v ? v_panels<WarpTile>(s) : k_panels<WarpTile>(s))) return;
      load_panel = 0;
    }
    load_v = !load_v && (load_pass == 1 || !scores_only);
    if (load_v) return;
    load_tile += c.step;
    advance_load();
  }
  // Issues the next copy, if a tile is known, into the oldest free slot. It always commits a group, so that the latest
  // `slots` groups are those of the slots, or older ones.
  __device__ __forceinline__ void issue_copy() {
    if (load_tile < load_end) {
      const TileRange& c = ranges[load_pass];
      if constexpr (Shard)
        if (!load_v && has_halo(load_pass, load_tile))
          cp_async_row(halo_rows + write_slot * WarpTile::k_bytes,
                       c.k + std::int64_t{load_rows.row - 1} * WarpTile::k_bytes, WarpTile::k_bytes);
      copy_rows(ring + write_slot * SharedLayout::slot_bytes, c, *shape);
      write_slot = write_slot + 1 == SharedLayout::slots ? 0 : write_slot + 1;
      ++filled_slots;
      advance_copy(c, *shape);
    }
    cp_async_commit();
  }
  // In the second pass, tiles below `count_known` are known.
  __device__ __forceinline__ void start(int count_known) {
    known_tiles = count_known;
    load_tile = ranges[0].first, load_end = ranges[0].count;
    advance_load();
    fill_free_slots();
  }
  // All tiles of the second pass are known. Called between the two passes.
  __device__ __forceinline__ void release_all_tiles() {
    load_end = ranges[1].count;
    advance_load();
    fill_free_slots();
  }
  __device__ __forceinline__ void fill_free_slots() {
#pragma unroll 1
    for (int i = SharedLayout::slots - filled_slots; i > 0; --i) issue_copy();
  }
  // Waits for the oldest slot, uses it, then refills it.
  template <class Use>
  __device__ __forceinline__ void consume(Use use) {
    cp_async_wait<SharedLayout::slots - 1>();
    use(ring + read_slot * SharedLayout::slot_bytes);
    __syncwarp();
    read_slot = read_slot + 1 == SharedLayout::slots ? 0 : read_slot + 1;
    --filled_slots;
    issue_copy();
  }
};

}  // namespace nsa::gpu
