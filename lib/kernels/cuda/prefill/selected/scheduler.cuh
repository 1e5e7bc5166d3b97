#pragma once
// Prefill's selected branch (prefill/selected/kernel.cu): the warp that schedules the blocks of a work item.
//
// In order of rising index one query would get several blocks in a row while the others, whose blocks are not in the
// ring yet, wait. So the queries' sorted selections are merged into a pool of up to 32 blocks, a lane each, and the
// next block is always one of the query that has got the fewest. Scheduling a block takes some 500 cycles.

#include "kernels/cuda/prefill/selected/shared_memory.cuh"

namespace nsa::gpu::selected {

// `MaxBlocks`: blocks of 64 tokens that a query selects.
template <int DK, int DV, bool Tuned, int MaxBlocks>
struct TileScheduler {
  const SelectedParams& p;
  const Shared<DK, DV>& shared;
  PipelineState<schedule_slots> schedule = {};
  ScheduledBlock lane_block = {};  // of the schedule slot
  int in_slot = 0;                 // blocks of the schedule slot that are set
  // The lane's query: its blocks that are not in the pool yet, in rising order; how many of its blocks are scheduled;
  // how many are in the pool.
  int blocks[MaxBlocks] = {};
  int scheduled = 0, pooled = 0;
  // The lane's block of the pool, as ScheduledBlock::word; 0: none. And the mask of lanes that have one.
  int word = 0;
  unsigned used = 0;

  static constexpr unsigned all = 0xffffffffu;
  static constexpr int none = INT32_MAX;

  __device__ __forceinline__ void load_selection(const WorkItem& item) {
    const int n = p.a.shape.rules.n_sel, lane = threadIdx.x % 32;
    const bool has_query = lane < consumer_warps && item.has(p, lane);
    const std::int32_t* from = p.a.selected + (item.row(p, has_query ? lane : 0) * p.a.shape.groups + item.group) * n;
    scheduled = pooled = 0;
#pragma unroll
    for (int i = 0; i < MaxBlocks; ++i) blocks[i] = has_query && i < n ? from[i] : -1;
    if constexpr (!Tuned) split_blocks(static_cast<int>(*p.a.tile.first_position) + item.first_query + lane);
#pragma unroll
    for (int i = 0; i < MaxBlocks; ++i) blocks[i] = blocks[i] < 0 ? none : blocks[i];
  }
  // Selection blocks to their blocks of 64 tokens, for a query at position t. From the last on: a selection block is
  // read before these take its place.
  __device__ __forceinline__ void split_blocks(int t) {
#pragma unroll
    for (int i = MaxBlocks - 1; i >= 0; --i)
      blocks[i] = block_of_selection(p, p.pairs_blocks ? blocks[i / 2] : blocks[i], i, t);
  }
  // In registers: a load would delay all lanes at the next block.
  __device__ __forceinline__ void pop_first(bool pops) {
#pragma unroll
    for (int i = 0; i < MaxBlocks; ++i) blocks[i] = !pops ? blocks[i] : i + 1 < MaxBlocks ? blocks[i + 1] : none;
  }
  // Sets the next scheduled block; stores the schedule slot when all its blocks are set.
  __device__ __forceinline__ void store_scheduled(ScheduledBlock next) {
    const int lane = threadIdx.x % 32;
    if (lane == in_slot) lane_block = next;
    if (++in_slot < slot_blocks) return;
    mbarrier_wait(shared.schedule_empty(schedule.slot), schedule.phase ^ 1);
    if (lane < slot_blocks) {
      shared.scheduled(schedule.slot, lane) = lane_block;
      mbarrier_arrive(shared.schedule_full(schedule.slot));
    }
    schedule.advance();
    in_slot = 0;
  }
  // Whether the lane's query selected the block.
  __device__ __forceinline__ int selected(ScheduledBlock pool_block) const {
    return pool_block.warps() >> threadIdx.x % 32 & 1;
  }
  __device__ __forceinline__ void add_to_pool(ScheduledBlock added) {
    const int free = __ffs(static_cast<int>(~used)) - 1;
    if (threadIdx.x % 32 == free) word = added.word;
    used |= 1u << free;
    pooled += selected(added);
  }
  // The pool must not be empty.
  __device__ __forceinline__ void schedule_from_pool(int plane) {
    const int lane = threadIdx.x % 32;
    const int fewest = __reduce_min_sync(all, pooled > 0 ? scheduled * 32 + lane : none) % 32;
    const int from = __ffs(static_cast<int>(__ballot_sync(all, word >> fewest & 1))) - 1;
    const ScheduledBlock next{__shfl_sync(all, word, from), plane};
    store_scheduled(next);
    scheduled += selected(next);
    pooled -= selected(next);
    if (lane == from) word = 0;
    used &= ~(1u << from);
  }
  __device__ __forceinline__ void schedule_item(const WorkItem& item) {
    load_selection(item);
    for (;;) {
      const int block = __reduce_min_sync(all, blocks[0]);
      if (block == none) break;
      const unsigned queries = __ballot_sync(all, blocks[0] == block);
      pop_first(blocks[0] == block);
      add_to_pool(ScheduledBlock::of(block, queries, item.plane));
      if (used == all) schedule_from_pool(item.plane);
    }
    while (used) schedule_from_pool(item.plane);
  }
  __device__ __forceinline__ void run() {
    for (WorkItems items(p); items.more(); items.next()) schedule_item(WorkItem(p, items.index(), 1));
    do store_scheduled(ScheduledBlock::last());  // fills the last slot of the schedule, which is handed over whole
    while (in_slot > 0);
  }
};

}  // namespace nsa::gpu::selected
