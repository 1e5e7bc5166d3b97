#pragma once
// KV tiles of one warp whose rows are quantised (decode/fused/tile_pipeline.cuh). The ring holds pairs of slots, K and
// V of a tile: what refills the slot of K just read is K again, two or three tiles later. Scales of both are copied
// with K, so that they are there before either is multiplied.

#include <cstddef>

#include "kernels/cuda/decode/fp8/warp_tile.cuh"
#include "kernels/cuda/decode/fused/tile_pipeline.cuh"

namespace nsa::gpu {

/// Copies of K and V of E4M3 rows into the ring.
template <class T, int DK, int DV, int W, bool Paged>
struct TilePipeline<WarpTileFp8<T, DK, DV>, W, false, Paged> : TileLoads<WarpTileFp8<T, DK, DV>, false, false, Paged> {
  using WarpTile = WarpTileFp8<T, DK, DV>;
  using SharedLayout = FusedSharedLayout<WarpTile, W>;
  using Loads = TileLoads<WarpTile, false, false, Paged>;
  using Loads::advance_load;
  using Loads::load_rows, Loads::load_pass, Loads::load_tile, Loads::load_end, Loads::known_tiles;
  using Loads::ranges, Loads::scale_ranges, Loads::scores_only, Loads::ring, Loads::scale_ring, Loads::policy;
  static constexpr int slot_bytes = SharedLayout::slot_bytes, pairs = SharedLayout::slots / 2;
  static_assert(SharedLayout::slots % 2 == 0 && WarpTile::k_bytes == WarpTile::v_bytes);
  int write_pair = 0, read_pair = 0, filled_pairs = 0;
  // Shared addresses: what this lane writes first in the ring; its byte of the scales; the ranges of both passes; where
  // the scales of K begin, for lanes from 8 on those of V.
  unsigned lane_in_ring, lane_in_scales, ranges_at, scale_ranges_at;

  /// In the second pass, tiles below `count_known` are known.
  __device__ __forceinline__ void start(int count_known) {
    known_tiles = count_known;
    const unsigned lane = threadIdx.x % 32;
    ring = kept_in_register(ring), lane_in_ring = kept_in_register(ring + lane * 16);
    lane_in_scales = kept_in_register(scale_ring + lane);
    ranges_at = kept_in_register(shared_address(ranges));
    scale_ranges_at = kept_in_register(shared_address(scale_ranges) + (lane < 8 ? 0 : 8));
    load_tile = ranges[0].first, load_end = ranges[0].count;
    fill_free_pairs();
  }
  /// All tiles of the second pass are known. Called between the two passes.
  __device__ __forceinline__ void release_all_tiles() {
    load_end = ranges[1].count;
    fill_free_pairs();
  }
  /// Waits for the K of the oldest tile, calls use(slot, address of this lane's scale of K), then refills the slot.
  template <class Use>
  __device__ __forceinline__ void consume_keys(Use use) {
    cp_async_wait<SharedLayout::slots - 1>();
    use(ring + read_pair * (2 * slot_bytes), lane_in_scales + read_pair * (2 * slot_rows));
    __syncwarp();
    if (load_tile < load_end) copy_keys();
    cp_async_commit();
  }
  /// The same of its V: use(slot).
  template <class Use>
  __device__ __forceinline__ void consume_values(Use use) {
    cp_async_wait<SharedLayout::slots - 1>();
    use(ring + read_pair * (2 * slot_bytes) + slot_bytes);
    __syncwarp();
    read_pair = next(read_pair);
    --filled_pairs;
    if (load_tile < load_end) {
      copy_values();
      advance_load();
    }
    cp_async_commit();
  }

 private:
  static __device__ __forceinline__ int next(int pair) {
    return pairs == 2 ? pair ^ 1 : pair + 1 == pairs ? 0 : pair + 1;
  }
  // Every pair commits two groups, also without a tile, so that the latest 2 * pairs groups are those of the slots, or
  // older ones.
  __device__ __forceinline__ void fill_free_pairs() {
#pragma unroll 1
    for (int i = pairs - filled_pairs;; --i) {
      advance_load();
      if (i == 0) return;
      const bool has = load_tile < load_end;
      if (has) copy_keys();
      cp_async_commit();
      if (has) copy_values();
      cp_async_commit();
    }
  }
  template <class Pointee>
  static __device__ __forceinline__ Pointee* load_pointer(unsigned at) {
    std::uint64_t address;
    asm volatile("ld.shared.u64 %0, [%1];" : "=l"(address) : "r"(at) : "memory");
    return reinterpret_cast<Pointee*>(address);
  }
  // Issues the copies of K of the next tile and of the scales of its K, by eight lanes, and of its V, by the next
  // eight. What is loaded from shared memory is loaded first: no load can pass the copies.
  __device__ __forceinline__ void copy_keys() const {
    static_assert(sizeof(ScaleRange) == 16 && offsetof(TileRange, k) == 0);
    const unsigned lane = threadIdx.x % 32;
    const auto* scales = load_pointer<const std::uint8_t>(scale_ranges_at + load_pass * sizeof(ScaleRange));
    const auto* keys = load_pointer<const char>(ranges_at + load_pass * sizeof(TileRange));
    if (lane < slot_rows / 2)
      cp_async_word(lane_in_scales + lane * 3 + write_pair * (2 * slot_rows), scales + load_rows.row + lane % 8 * 4,
                    true);
    copy_rows(lane_in_ring + write_pair * (2 * slot_bytes), keys);
  }
  // Issues the copy of V of the next tile, if it is used, and moves on.
  __device__ __forceinline__ void copy_values() {
    const unsigned range = ranges_at + load_pass * unsigned{sizeof(TileRange)};
    const auto* values = load_pointer<const char>(range + offsetof(TileRange, v));
    int step;
    asm volatile("ld.shared.s32 %0, [%1];" : "=r"(step) : "r"(range + unsigned{offsetof(TileRange, step)}) : "memory");
    load_tile += step;
    if (load_pass == 1 || !scores_only) copy_rows(lane_in_ring + write_pair * (2 * slot_bytes) + slot_bytes, values);
    write_pair = next(write_pair);
    ++filled_pairs;
  }
  // cp_async_tile() (primitives/cp_async_ring.cuh), which begins at `to` for this lane.
  __device__ __forceinline__ void copy_rows(unsigned to, const char* plane) const {
    static_assert(WarpTile::k_bytes == 128);
    const char* from = plane + (std::int64_t{load_rows.row} * 8 + threadIdx.x % 32) * 16;
    if (load_rows.count >= slot_rows)
      copy_fours(to, from, slot_rows);
    else
      copy_fours(to, from, load_rows.count);
  }
  // Four rows at a time, of which `rows` exist; the others become zero.
  __device__ __forceinline__ void copy_fours(unsigned to, const char* from, int rows) const {
    const int row0 = threadIdx.x % 32 / 8;
#pragma unroll
    for (int i = 0; i < slot_rows / 4; ++i)
      asm volatile(
          "cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"((to ^ i << 4) + i * 512),
          "l"(from + i * 512), "r"(row0 + i * 4 < rows ? 16 : 0), "l"(policy)
          : "memory");
  }
};

}  // namespace nsa::gpu
