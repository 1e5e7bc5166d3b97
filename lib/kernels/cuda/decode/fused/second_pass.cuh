#pragma once
// KV tiles of one warp in a step whose cmp has had a launch of its own: those of sel, or of win. Where a tile lies is
// found for up to 32 tiles of the warp at once, a lane a tile, and shuffled when it is due, so that the main loop has
// little to do beside products and exponentials.

#include "kernels/cuda/decode/fused/tile_pipeline.cuh"

namespace nsa::gpu {

template <class WarpTile, int W, bool Paged>
struct SecondPassPipeline : TileLoads<WarpTile, false, true, Paged> {
  using SharedLayout = FusedSharedLayout<WarpTile, W>;
  using Loads = TileLoads<WarpTile, false, true, Paged>;
  using Loads::ranges, Loads::shape;

  int known = 0;                       // tiles of this warp that are known
  int first = 0;                       // the first of the 32 tiles of this warp that are found
  TileRows rows{};                     // of tile first + lane
  unsigned to_copy = 0u, to_use = 0u;  // bit i: tile first + i has rows, and its copy, its use is still to begin
  TileRows copied_tile{};              // the tile of the latest copy
  int panel = 0;                       // its next panel, of K, then of V; 0: the next tile
  int write_slot = 0, read_slot = 0, filled_slots = 0;
  const char *k = nullptr, *v = nullptr;  // plane

  // Finds the tiles from the at-th on.
  __device__ __forceinline__ void find(int at) {
    const TileRange& c = ranges[1];
    const int i = at + static_cast<int>(threadIdx.x) % 32;
    first = at;
    rows = this->memory_rows_of(1, c.first + i * c.step);
    to_copy = to_use = __ballot_sync(0xffffffffu, i < known && rows.count > 0);
  }
  // Tiles of this warp among the first `tiles` of the branch.
  __device__ __forceinline__ int own_tiles(int tiles) const {
    const TileRange& c = ranges[1];
    return tiles <= c.first ? 0 : (tiles - c.first + c.step - 1) / c.step;
  }

  static __device__ __forceinline__ int lowest(unsigned bits) { return __ffs(static_cast<int>(bits)) - 1; }

  /// Issues the next copy, if a tile is found, into the oldest free slot. It always commits a group, so that the latest
  /// `slots` groups are those of the slots, or older ones.
  __device__ __forceinline__ void issue_copy() {
    const int of_k = k_panels<WarpTile>(*shape), panels = of_k + v_panels<WarpTile>(*shape);
    if (panel > 0 || to_copy != 0u) {
      if (panel == 0) {
        const int lane = lowest(to_copy);
        copied_tile = {__shfl_sync(0xffffffffu, rows.row, lane), __shfl_sync(0xffffffffu, rows.count, lane)};
        to_copy &= to_copy - 1u;
      }
      const bool is_v = panel >= of_k;
      copy_tile_panel<WarpTile>(this->ring + write_slot * SharedLayout::slot_bytes, is_v ? v : k, is_v,
                                is_v ? panel - of_k : panel, copied_tile, *shape, this->policy);
      panel = panel + 1 == panels ? 0 : panel + 1;
      write_slot = write_slot + 1 == SharedLayout::slots ? 0 : write_slot + 1;
      ++filled_slots;
    }
    cp_async_commit();
  }
  __device__ __forceinline__ void fill_free_slots() {
#pragma unroll 1
    for (int i = SharedLayout::slots - filled_slots; i > 0; --i) issue_copy();
  }
  /// Starts to copy; the first `tiles_known` tiles of the branch are known.
  __device__ __forceinline__ void start(int tiles_known) {
    k = ranges[1].k, v = ranges[1].v;
    known = own_tiles(tiles_known);
    find(0);
    fill_free_slots();
  }
  /// All tiles are known. Those whose copies have begun were the first.
  __device__ __forceinline__ void release_all_tiles() {
    const unsigned begun = to_use & ~to_copy;
    known = own_tiles(ranges[1].count);
    find(0);
    to_copy &= ~begun;
    fill_free_slots();
  }
  /// Waits for the oldest slot, uses it, then refills it.
  template <class Use>
  __device__ __forceinline__ void consume(Use use) {
    cp_async_wait<SharedLayout::slots - 1>();
    use(this->ring + read_slot * SharedLayout::slot_bytes);
    __syncwarp();
    read_slot = read_slot + 1 == SharedLayout::slots ? 0 : read_slot + 1;
    --filled_slots;
    issue_copy();
  }
  /// Calls attend(tokens of a tile) for the tiles with tokens.
  template <class Attend>
  __device__ __forceinline__ void for_each_tile(Attend attend) {
#pragma unroll 1
    while (true) {
#pragma unroll 1
      for (; to_use != 0u; to_use &= to_use - 1u) attend(__shfl_sync(0xffffffffu, rows.count, lowest(to_use)));
      if (first + 32 >= known) return;
      find(first + 32);
      fill_free_slots();
    }
  }
};

}  // namespace nsa::gpu
