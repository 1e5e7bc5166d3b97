#pragma once
// How the KV tiles of a branch of a ragged batch are dealt to the CTAs of a launch: by the lengths of the sequences.
// The tiles of all (row, group), one after the other, are cut into equal shares of consecutive tiles, one a CTA, so
// that no CTA waits for the longest sequence. A share may begin and end within a (row, group); where CTA c has
// tiles of the k-th (row, group), the two have a partial, number c + k: no other pair has that number, and those of one
// (row, group) follow one another.

#include "kernels/cuda/attention/kv_tiles.cuh"

namespace nsa::gpu {

struct TileSchedule {
  /// [rows + 1], of one group: the tiles of the rows before. Written on the device at the beginning of a step. Null:
  /// tiles are not dealt by length.
  const std::int32_t* tiles_before = nullptr;
  int ctas = 0;

  /// Tiles of a CTA, a multiple of `warps`.
  __device__ __forceinline__ int share(int total, int warps) const {
    return max(1, (total + ctas * warps - 1) / (ctas * warps)) * warps;
  }
};

/// Partials [first, first + count) are those of a (row, group).
struct PartialRange {
  int first, count;
};
__device__ __forceinline__ PartialRange partials_of(const TileSchedule& schedule, int rows, int groups, int row_group,
                                                    int warps) {
  const std::int32_t* before = schedule.tiles_before + row_group / groups;
  const int share = schedule.share(schedule.tiles_before[rows] * groups, warps), tiles = before[1] - before[0],
            begin = before[0] * groups + row_group % groups * tiles;
  if (tiles == 0) return {0, 0};
  const int first = begin / share, last = (begin + tiles - 1) / share;
  return {first + row_group, last - first + 1};
}

/// Partials of a launch at most, of one head tile.
inline std::int64_t max_partials(std::int64_t ctas, std::int64_t row_groups) { return ctas + row_groups; }

/// TileSchedule::tiles_before of every branch, in scratch.
struct TileSchedules {
  std::int32_t* tiles_before[branches];
};
inline TileSchedules schedules_at(float* scratch, const QueryTile& tile) {
  auto* first = reinterpret_cast<std::int32_t*>(scratch);
  return {{first, first + tile.rows() + 1, first + 2 * (tile.rows() + 1)}};
}

/// Queues the writing of the schedules, of caches with these maps. attention/tile_schedule.cu
void launch_schedules(const LayerShape& s, const QueryTile& tile, const RowMap& cmp_map, const RowMap& win_map,
                      const TileSchedules& to, Stream* stream);

}  // namespace nsa::gpu
