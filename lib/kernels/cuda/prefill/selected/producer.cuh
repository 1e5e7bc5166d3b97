#pragma once
// Prefill's selected branch (prefill/selected/kernel.cu): the warps that load K and V and notify the queries, step by
// step of the schedule.
//
// K's slots are empty sooner than V's. With one warp for each, the next block's K is in flight and its scores are
// computed while its V still waits for a slot. Accesses to shared memory queue behind the ldmatrix of twelve warps, so
// a step has few of them.

#include "kernels/cuda/prefill/selected/shared_memory.cuh"

namespace nsa::gpu::selected {

template <int DK, int DV>
struct Producer {
  using Storage = SharedStorage<DK, DV>;
  const SelectedParams& p;
  const Shared<DK, DV>& shared;
  PipelineState<Storage::kv_slots> kv = {};  // of K's or V's slots
  PipelineState<schedule_slots> schedule = {};
  int slot_step = 0;                          // of the schedule slot
  PipelineState<mailbox_slots> mailbox = {};  // of the lane's query
  PipelineState<mailbox_slots> steps = {};    // of the step's `key_issued` and `notified`

  // One lane: K or V of a block to an empty slot. Arrives at `empty` for the queries that did not select the block.
  __device__ __forceinline__ void load_block(const Step& step, const CUtensorMap& map, int width, unsigned to,
                                             unsigned full, unsigned empty) const {
    mbarrier_arrive_expect_tx(full, width / box_columns * Storage::box);
    for (int at = 0; at < block_tokens; at += p.box_rows) {
      const RowCoordinate from = row_coordinate(p.a.k.map, step.block() * block_tokens + at);
      for (int box = 0; box < width / box_columns; ++box)
        tma_load(to + at * 128 + box * Storage::box, &map, full, box * box_columns, from.row, step.plane, from.rank);
    }
    const int others = item_queries - __popc(step.queries());
    if (others > 0) mbarrier_arrive(empty, others);
  }
  __device__ __forceinline__ Step wait_step() {
    if (slot_step == 0) mbarrier_wait(shared.schedule_full(schedule.slot), schedule.phase);
    return shared.step(schedule.slot, slot_step);
  }
  // Every lane that has read the step.
  __device__ __forceinline__ void release_step() {
    if (++slot_step < slot_steps) return;
    mbarrier_arrive(shared.schedule_empty(schedule.slot));
    slot_step = 0;
    schedule.advance();
  }
  // One lane of its own warp, as load_values().
  __device__ __forceinline__ void load_keys() {
    for (Step step = wait_step(); !step.is_last(); step = wait_step()) {
      const int slot = kv.slot;
      mbarrier_wait(shared.key_empty(slot), kv.phase ^ 1);
      load_block(step, p.k, DK, shared.key(slot), shared.key_full(slot), shared.key_empty(slot));
      mbarrier_arrive(shared.key_issued(steps.slot));
      release_step();
      steps.advance();
      kv.advance();
    }
  }
  __device__ __forceinline__ void load_values() {
    for (Step step = wait_step(); !step.is_last(); step = wait_step()) {
      const int slot = kv.slot;
      mbarrier_wait(shared.notified(steps.slot), steps.phase);
      mbarrier_wait(shared.value_empty(slot), kv.phase ^ 1);
      load_block(step, p.v, DV, shared.value(slot), shared.value_full(slot), shared.value_empty(slot));
      release_step();
      steps.advance();
      kv.advance();
    }
  }
  // A warp; lane q notifies query q. It waits for two facts. K's copy is issued: so K's full barrier is in the phase
  // that the notification names, or in the next one, and the notification of 8 blocks before has been read. V of one
  // round before has arrived; the next V waits for `notified`: so V's full barrier is at most one phase behind a
  // notification, and never ahead of it.
  __device__ __forceinline__ void notify_queries() {
    const int lane = threadIdx.x % 32;
    for (Step step = wait_step(); !step.is_last(); step = wait_step()) {
      mbarrier_wait(shared.key_issued(steps.slot), steps.phase);
      mbarrier_wait(shared.value_full(kv.slot), kv.phase ^ 1);
      if (step.queries() >> lane & 1) {
        shared.mailbox(lane, mailbox.slot) = Notification::of(step.block(), kv.slot, kv.phase);
        mbarrier_arrive(shared.mailbox_full(lane, mailbox.slot));
        mailbox.advance();
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(shared.notified(steps.slot));
      release_step();
      steps.advance();
      kv.advance();
    }
  }
};

}  // namespace nsa::gpu::selected
