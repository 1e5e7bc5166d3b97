#pragma once
// Prefill's selected branch (attend_prefill_sel.cu): the warp that plans in which turn an item's blocks come.
//
// Blocks by rising index would give one query several in a row while the others, whose blocks wait behind the ring,
// rest. So the lists, which are sorted, are merged into a pool of up to 32 blocks, a lane each, and the next to come is
// always one of the query that was told of the fewest. What a step costs hangs on no list's length: some 300 cycles.

#include "kernels/cuda/attend_prefill_sel.cuh"

namespace nsa::gpu::selected {

// `Most`: blocks a query may have chosen.
template <int DK, int DV, int Most>
struct Planner {
  const Params& p;
  const Shared<DK, DV>& shared;
  Turn<pages> page = {};
  Step written = {};  // the lane's of the page
  int steps = 0;      // of the page that are written
  // The lane's query: its blocks that are left, the first of them first, and of how many it was told.
  int list[Most] = {};
  int told = 0;
  // The lane's block of the pool and who chose it, and the lanes that have one.
  int block = 0;
  unsigned by = 0, used = 0;

  static constexpr unsigned all = 0xffffffffu;
  static constexpr int none = INT32_MAX;

  __device__ __forceinline__ void begin(const Item& item) {
    const int n = p.a.shape.rules.n_sel, lane = threadIdx.x % 32;
    const bool is_there = lane < queries && item.has(p, lane);
    const std::int32_t* from = p.a.selected + (item.row(p, is_there ? lane : 0) * p.a.shape.groups + item.group) * n;
    told = 0;
#pragma unroll
    for (int i = 0; i < Most; ++i) list[i] = is_there && i < n ? from[i] : -1;
#pragma unroll
    for (int i = 0; i < Most; ++i) list[i] = list[i] < 0 ? none : list[i];
  }
  // In registers: a load would hold up all lanes at the next step.
  __device__ __forceinline__ void drop_first(bool does) {
#pragma unroll
    for (int i = 0; i < Most; ++i) list[i] = !does ? list[i] : i + 1 < Most ? list[i + 1] : none;
  }
  __device__ __forceinline__ void put(Step step) {
    const int lane = threadIdx.x % 32;
    if (lane == steps) written = step;
    if (++steps < page_steps) return;
    wait_for(shared.plan_read(page.slot), page.phase ^ 1);
    if (lane < page_steps) shared.step(page.slot, lane) = written;
    __syncwarp();
    if (lane == 0) arrive(shared.planned(page.slot));
    page.next();
    steps = 0;
  }
  __device__ __forceinline__ void keep(int found, unsigned chosen_by) {
    const int free = __ffs(static_cast<int>(~used)) - 1;
    if (threadIdx.x % 32 == free) block = found, by = chosen_by;
    used |= 1u << free;
  }
  // Of a pool that is not empty.
  __device__ __forceinline__ void take(int plane) {
    const int lane = threadIdx.x % 32;
    const bool wants = __reduce_or_sync(all, by) >> lane & 1;
    const int fewest = __reduce_min_sync(all, wants ? told * 32 + lane : none) % 32;
    const int from = __ffs(static_cast<int>(__ballot_sync(all, by >> fewest & 1))) - 1;
    const unsigned taken_by = __shfl_sync(all, by, from);
    put(Step::of(__shfl_sync(all, block, from), taken_by, plane));
    told += taken_by >> lane & 1;
    if (lane == from) by = 0;
    used &= ~(1u << from);
  }
  __device__ __forceinline__ void plan(const Item& item) {
    begin(item);
    for (;;) {
      const int found = __reduce_min_sync(all, list[0]);
      if (found == none) break;
      const unsigned chosen_by = __ballot_sync(all, list[0] == found);
      drop_first(list[0] == found);
      keep(found, chosen_by);
      if (used == all) take(item.plane);
    }
    while (used) take(item.plane);
  }
  __device__ __forceinline__ void run() {
    for (Items items(p); items.more(); items.next()) plan(Item(p, items.index()));
    do put(Step::last());
    while (steps > 0);
  }
};

}  // namespace nsa::gpu::selected
