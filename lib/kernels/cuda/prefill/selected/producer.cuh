#pragma once
// Prefill's selected branch (prefill/selected/kernel.cu): the warps that load K and V and notify the queries, block
// by scheduled block.
//
// K's slots are empty sooner than V's. With one warp for each, the next block's K is in flight and its scores are
// computed while its V still waits for a slot. Accesses to shared memory queue behind the ldmatrix of twelve warps, so
// a scheduled block has few of them.

#include "kernels/cuda/prefill/selected/shared_memory.cuh"

namespace nsa::gpu::selected {

template <int DK, int DV>
struct Producer {
  using Storage = SharedStorage<DK, DV>;
  const SelectedParams& p;
  const Shared<DK, DV>& shared;
  PipelineState<Storage::kv_slots> kv = {};  // of K's or V's slots
  PipelineState<schedule_slots> schedule = {};
  int in_slot = 0;                             // blocks of the schedule slot that are done
  PipelineState<mailbox_slots> mailbox = {};   // of the lane's warp
  PipelineState<mailbox_slots> progress = {};  // of the scheduled block's `key_issued` and `notified`

  // One lane: K or V of a block to an empty slot. Arrives at `empty` for the warps that do not want the block.
  __device__ __forceinline__ void load_block(const ScheduledBlock& scheduled, const CUtensorMap& map, int width,
                                             unsigned to, unsigned full, unsigned empty) const {
    mbarrier_arrive_expect_tx(full, width / box_columns * Storage::box);
    for (int at = 0; at < block_tokens; at += p.box_rows) {
      const RowCoordinate from = row_coordinate(p.a.k.map, scheduled.block() * block_tokens + at);
      for (int box = 0; box < width / box_columns; ++box)
        tma_load(to + at * 128 + box * Storage::box, &map, full, box * box_columns, from.row, scheduled.plane,
                 from.rank);
    }
    const int others = consumer_warps - __popc(scheduled.warps());
    if (others > 0) mbarrier_arrive(empty, others);
  }
  __device__ __forceinline__ ScheduledBlock wait_scheduled() {
    if (in_slot == 0) mbarrier_wait(shared.schedule_full(schedule.slot), schedule.phase);
    return shared.scheduled(schedule.slot, in_slot);
  }
  // Every lane that has read the scheduled block.
  __device__ __forceinline__ void release_scheduled() {
    if (++in_slot < slot_blocks) return;
    mbarrier_arrive(shared.schedule_empty(schedule.slot));
    in_slot = 0;
    schedule.advance();
  }
  // One lane of its own warp, as load_values().
  __device__ __forceinline__ void load_keys() {
    for (ScheduledBlock scheduled = wait_scheduled(); !scheduled.is_last(); scheduled = wait_scheduled()) {
      const int slot = kv.slot;
      mbarrier_wait(shared.key_empty(slot), kv.phase ^ 1);
      load_block(scheduled, p.k, DK, shared.key(slot), shared.key_full(slot), shared.key_empty(slot));
      mbarrier_arrive(shared.key_issued(progress.slot));
      release_scheduled();
      progress.advance();
      kv.advance();
    }
  }
  __device__ __forceinline__ void load_values() {
    for (ScheduledBlock scheduled = wait_scheduled(); !scheduled.is_last(); scheduled = wait_scheduled()) {
      const int slot = kv.slot;
      mbarrier_wait(shared.notified(progress.slot), progress.phase);
      mbarrier_wait(shared.value_empty(slot), kv.phase ^ 1);
      load_block(scheduled, p.v, DV, shared.value(slot), shared.value_full(slot), shared.value_empty(slot));
      release_scheduled();
      progress.advance();
      kv.advance();
    }
  }
  // A warp; lane w notifies consumer warp w. It waits for two facts. K's copy is issued: so K's full barrier is in the
  // phase that the notification names, or in the next one, and the notification of 8 blocks before has been read. V of
  // one round before has arrived; the next V waits for `notified`: so V's full barrier is at most one phase behind a
  // notification, and never ahead of it.
  template <bool Tuned>
  __device__ __forceinline__ void notify_warps() {
    const int lane = threadIdx.x % 32;
    for (ScheduledBlock scheduled = wait_scheduled(); !scheduled.is_last(); scheduled = wait_scheduled()) {
      mbarrier_wait(shared.key_issued(progress.slot), progress.phase);
      mbarrier_wait(shared.value_full(kv.slot), kv.phase ^ 1);
      if (scheduled.warps() >> lane & 1) {
        shared.mailbox(lane, mailbox.slot) = Notification::of(scheduled.block(), kv.slot, kv.phase);
        if (!Tuned && p.merges_selections)
          shared.mailbox_queries(lane, mailbox.slot) = shared.scheduled_queries(schedule.slot, in_slot, lane);
        mbarrier_arrive(shared.mailbox_full(lane, mailbox.slot));
        mailbox.advance();
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(shared.notified(progress.slot));
      release_scheduled();
      progress.advance();
      kv.advance();
    }
  }
};

}  // namespace nsa::gpu::selected
