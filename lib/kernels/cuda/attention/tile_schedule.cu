// The schedule of a ragged step: the running sum of the rows' KV tiles, by branch.
//
// Tiling: one CTA; a thread a row, in rounds. Bytes: the positions once. Bound: the latency of a launch.

#include "kernels/cuda/attention/tile_schedule.cuh"

namespace nsa::gpu {

namespace {

constexpr int threads = 256;

struct ScheduleParams {
  LayerShape shape;
  QueryTile tile;
  RowMap cmp_map, win_map;
  TileSchedules to;
};

// Tiles of the row at position t. Of sel: of the blocks that there are, wherever they lie.
__device__ int tiles_of(const ScheduleParams& p, int branch, std::int64_t t) {
  const LayerShape& s = p.shape;
  if (branch == cmp) return KvTiles<cmp>(s, p.cmp_map, t).count;
  if (branch == win) return KvTiles<win>(s, p.win_map, t).count;
  const std::int64_t blocks = eligible_blocks(s.rules, t);
  return static_cast<int>(blocks < s.rules.n_sel ? blocks : s.rules.n_sel) * tiles_per_span(sel, s);
}

// Sum of x over the threads up to this one, this one included. `sums`: shared, [threads / 32].
__device__ int running_sum(int x, int* sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int step = 1; step < 32; step *= 2) {
    const int below = __shfl_up_sync(0xffffffffu, x, step);
    if (lane >= step) x += below;
  }
  __syncthreads();  // the sums of the round before are read
  if (lane == 31) sums[warp] = x;
  __syncthreads();
  for (int w = 0; w < warp; ++w) x += sums[w];
  return x;
}

__global__ void __launch_bounds__(threads) schedule_kernel(const __grid_constant__ ScheduleParams p) {
  __shared__ int sums[threads / 32];
  __shared__ int last;
  griddep_wait();
  const int rows = static_cast<int>(p.tile.rows());
  for (int branch = 0; branch < branches; ++branch) {
    std::int32_t* to = p.to.tiles_before[branch];
    if (threadIdx.x == 0) to[0] = 0;
    int before = 0;
    for (int row0 = 0; row0 < rows; row0 += threads) {
      const int row = row0 + static_cast<int>(threadIdx.x);
      const int tiles = row < rows ? tiles_of(p, branch, position_of_row(p.tile, row)) : 0;
      const int sum = before + running_sum(tiles, sums);
      if (row < rows) to[row + 1] = sum;
      if (threadIdx.x == threads - 1) last = sum;
      __syncthreads();
      before = last;
    }
  }
}

}  // namespace

void launch_schedules(const LayerShape& s, const QueryTile& tile, const RowMap& cmp_map, const RowMap& win_map,
                      const TileSchedules& to, Stream* stream) {
  launch_pdl(schedule_kernel, dim3(1), threads, 0, stream, 1, ScheduleParams{s, tile, cmp_map, win_map, to});
}

}  // namespace nsa::gpu
