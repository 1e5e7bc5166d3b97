#pragma once
// Prefill's selected branch (prefill/selected/kernel.cu): the warp that plans in which turn an item's blocks come.
//
// Blocks by rising index would give one query several in a row while the others, whose blocks wait behind the ring,
// rest. So the lists, which are sorted, are merged into a pool of up to 32 blocks, a lane each, and the next to come is
// always one of the query that was told of the fewest. A step costs some 500 cycles.

#include "kernels/cuda/prefill/selected/shared_memory.cuh"

namespace nsa::gpu::selected {

// `Most`: blocks a query may have chosen.
template <int DK, int DV, int Most>
struct Planner {
  const Params& p;
  const Shared<DK, DV>& shared;
  Turn<pages> page = {};
  Step written = {};  // the lane's of the page
  int steps = 0;      // of the page that are written
  // The lane's query: its blocks that are left, the first of them first, of how many it was told, and how many are in
  // the pool.
  int list[Most] = {};
  int told = 0, waiting = 0;
  // The lane's block of the pool, as a step's word; 0: none. And the lanes that have one.
  int word = 0;
  unsigned used = 0;

  static constexpr unsigned all = 0xffffffffu;
  static constexpr int none = INT32_MAX;

  __device__ __forceinline__ void begin(const Item& item) {
    const int n = p.a.shape.rules.n_sel, lane = threadIdx.x % 32;
    const bool is_there = lane < queries && item.has(p, lane);
    const std::int32_t* from = p.a.selected + (item.row(p, is_there ? lane : 0) * p.a.shape.groups + item.group) * n;
    told = waiting = 0;
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
    if (lane < page_steps) {
      shared.step(page.slot, lane) = written;
      arrive(shared.planned(page.slot));
    }
    page.next();
    steps = 0;
  }
  // Whether a step's block is one of the lane's query.
  __device__ __forceinline__ int mine(Step step) const { return step.by() >> threadIdx.x % 32 & 1; }
  __device__ __forceinline__ void keep(Step step) {
    const int free = __ffs(static_cast<int>(~used)) - 1;
    if (threadIdx.x % 32 == free) word = step.word;
    used |= 1u << free;
    waiting += mine(step);
  }
  // Of a pool that is not empty.
  __device__ __forceinline__ void take(int plane) {
    const int lane = threadIdx.x % 32;
    const int fewest = __reduce_min_sync(all, waiting > 0 ? told * 32 + lane : none) % 32;
    const int from = __ffs(static_cast<int>(__ballot_sync(all, word >> fewest & 1))) - 1;
    const Step step{__shfl_sync(all, word, from), plane};
    put(step);
    told += mine(step);
    waiting -= mine(step);
    if (lane == from) word = 0;
    used &= ~(1u << from);
  }
  __device__ __forceinline__ void plan(const Item& item) {
    begin(item);
    for (;;) {
      const int found = __reduce_min_sync(all, list[0]);
      if (found == none) break;
      const unsigned chosen_by = __ballot_sync(all, list[0] == found);
      drop_first(list[0] == found);
      keep(Step::of(found, chosen_by, item.plane));
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
