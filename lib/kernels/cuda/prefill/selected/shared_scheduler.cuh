#pragma once
// Prefill's selected branch (prefill/selected/kernel.cu): the warp that schedules the blocks of a work item whose
// consumer warps have several queries each, or whose queries have more than 32 blocks.
//
// A CTA has up to 192 queries. A lane merges the sorted selections of up to 6 of them. Their next block and what
// follows it are in registers, and the load of the latter is not used before the next block is popped. Blocks come in
// rising order. Where a warp has few queries, and so wants few of the blocks, they pass through a pool of 8, from which
// the next is one of the warp that has got the fewest.

#include "kernels/cuda/prefill/selected/shared_memory.cuh"

namespace nsa::gpu::selected {

template <int DK, int DV>
struct SharedSelectionScheduler {
  static constexpr int lane_lists = consumer_warps * heads_per_tile / 32;
  static constexpr unsigned all = 0xffffffffu, full_pool = (1u << pool_blocks) - 1;
  static constexpr int none = INT32_MAX;
  const SelectedParams& p;
  const Shared<DK, DV>& shared;
  PipelineState<schedule_slots> schedule = {};
  ScheduledBlock lane_block = {};  // of the schedule slot
  int in_slot = 0;                 // blocks of the schedule slot that are set
  // Of the work item: the selection of its first query, that of each next one `stride` further; how many queries it
  // has; the position of the first.
  const std::int32_t* selected = nullptr;
  int stride = 0, queries = 0, first_t = 0;
  // Query k * 32 + lane: its first block that is not scheduled or in the pool yet, what block `index` of it is selected
  // from, and `index`.
  int blocks[lane_lists], following[lane_lists], index[lane_lists];
  // Lane w: how many blocks of consumer warp w are scheduled, and in the pool.
  int scheduled = 0, pooled = 0;
  // The lane's block of the pool, as ScheduledBlock::word; 0: none. And the mask of lanes that have one.
  int word = 0;
  unsigned used = 0;

  // Block i of query `query` is one of this selection block; -1: it has fewer.
  __device__ __forceinline__ int load(int query, int i) const {
    const int selection = p.pairs_blocks ? i / 2 : i;
    return query < queries && selection < p.a.shape.rules.n_sel ? selected[query * stride + selection] : -1;
  }
  __device__ __forceinline__ int block_at(int query, int selection_block, int i) const {
    const int block = block_of_selection(p, selection_block, i, first_t + query);
    return block < 0 ? none : block;
  }
  __device__ __forceinline__ void load_selections(const WorkItem& item) {
    stride = p.a.shape.groups * p.a.shape.rules.n_sel;
    selected = p.a.selected + (item.row(p, 0) * p.a.shape.groups + item.group) * p.a.shape.rules.n_sel;
    queries = min(consumer_warps * p.warp_queries, p.a.tile.tokens - item.first_query);
    first_t = static_cast<int>(*p.a.tile.first_position) + item.first_query;
    scheduled = pooled = 0;
    int first[lane_lists];
#pragma unroll
    for (int k = 0; k < lane_lists; ++k) {
      first[k] = load(k * 32 + threadIdx.x % 32, 0);
      following[k] = load(k * 32 + threadIdx.x % 32, 1);
      index[k] = 1;
    }
#pragma unroll
    for (int k = 0; k < lane_lists; ++k) blocks[k] = block_at(k * 32 + threadIdx.x % 32, first[k], 0);
  }
  // Moves on the queries that selected the block. Returns, in lane w, which of consumer warp w did, a bit each.
  __device__ __forceinline__ unsigned pop(int block) {
    const int lane = threadIdx.x % 32, first = lane * p.warp_queries;
    unsigned mine = 0;
#pragma unroll
    for (int k = 0; k < lane_lists; ++k) {
      if (k * 32 >= consumer_warps * p.warp_queries) break;
      const bool selects = blocks[k] == block;
      const unsigned lanes = __ballot_sync(all, selects);
      if (first / 32 == k) mine = lanes >> first % 32 & ((1u << p.warp_queries) - 1);
      if (!selects) continue;
      blocks[k] = block_at(k * 32 + lane, following[k], index[k]);
      following[k] = load(k * 32 + lane, ++index[k]);
    }
    return lane < consumer_warps ? mine : 0;
  }
  // Lane w: `of_warp`, the queries of consumer warp w that selected the block.
  __device__ __forceinline__ void add_to_pool(ScheduledBlock added, unsigned of_warp) {
    const int lane = threadIdx.x % 32, free = __ffs(static_cast<int>(~used)) - 1;
    if (lane == free) word = added.word;
    if (lane < consumer_warps) shared.pool_queries(free, lane) = static_cast<std::uint16_t>(of_warp);
    used |= 1u << free;
    pooled += of_warp != 0;
  }
  // The pool must not be empty.
  __device__ __forceinline__ void schedule_from_pool(int plane) {
    const int lane = threadIdx.x % 32;
    const int fewest = __reduce_min_sync(all, pooled > 0 ? scheduled * 32 + lane : none) % 32;
    const int from = __ffs(static_cast<int>(__ballot_sync(all, word >> fewest & 1))) - 1;
    const ScheduledBlock next{__shfl_sync(all, word, from), plane};
    store_scheduled(next, lane < consumer_warps ? shared.pool_queries(from, lane) : 0);
    const int selected = next.warps() >> lane & 1;
    scheduled += selected;
    pooled -= selected;
    if (lane == from) word = 0;
    used &= ~(1u << from);
  }
  // Sets the next scheduled block; hands over the schedule slot when all its blocks are set. Every lane that writes the
  // slot arrives.
  __device__ __forceinline__ void store_scheduled(ScheduledBlock next, unsigned of_warp) {
    const int lane = threadIdx.x % 32;
    if (in_slot == 0) mbarrier_wait(shared.schedule_empty(schedule.slot), schedule.phase ^ 1);
    if (lane < consumer_warps)
      shared.scheduled_queries(schedule.slot, in_slot, lane) = static_cast<std::uint16_t>(of_warp);
    if (lane == in_slot) lane_block = next;
    if (++in_slot < slot_blocks) return;
    if (lane < slot_blocks) shared.scheduled(schedule.slot, lane) = lane_block;
    if (lane < consumer_warps) mbarrier_arrive(shared.schedule_full(schedule.slot));
    schedule.advance();
    in_slot = 0;
  }
  __device__ __forceinline__ void schedule_item(const WorkItem& item) {
    load_selections(item);
    for (;;) {
      int first = none;
#pragma unroll
      for (int k = 0; k < lane_lists; ++k) first = min(first, blocks[k]);
      const int block = __reduce_min_sync(all, first);
      if (block == none) break;
      const unsigned of_warp = pop(block);
      const ScheduledBlock next = ScheduledBlock::of(block, __ballot_sync(all, of_warp != 0), item.plane);
      if (p.warp_queries > 4) {
        store_scheduled(next, of_warp);
        continue;
      }
      add_to_pool(next, of_warp);
      if (used == full_pool) schedule_from_pool(item.plane);
    }
    while (used) schedule_from_pool(item.plane);
  }
  __device__ __forceinline__ void run() {
    for (WorkItems items(p); items.more(); items.next()) schedule_item(WorkItem(p, items.index(), p.warp_queries));
    do store_scheduled(ScheduledBlock::last(), 0);  // fills the last slot of the schedule, which is handed over whole
    while (in_slot > 0);
  }
};

}  // namespace nsa::gpu::selected
