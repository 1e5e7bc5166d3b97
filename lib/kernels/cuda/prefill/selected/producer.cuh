#pragma once
// Prefill's selected branch (prefill/selected/kernel.cu): the warps that stream K and V and tell of them, step by step
// of the plan.
//
// K's slots are free sooner than V's; with a warp each the next block's K is on its way, and its scores are formed,
// while its V still waits for a slot. Whatever passes through shared memory queues behind the ldmatrix of twelve warps,
// so a step is to have little of that.

#include "kernels/cuda/prefill/selected/shared_memory.cuh"

namespace nsa::gpu::selected {

template <int DK, int DV>
struct Streamer {
  using At = Layout<DK, DV>;
  const Params& p;
  const Shared<DK, DV>& shared;
  Turn<At::slots> turn = {};  // of K's or V's slots
  Turn<pages> page = {};
  int step_of_page = 0;
  Turn<letters> mail = {};   // the lane's query's
  Turn<letters> steps = {};  // the step's place among `filled` and `passed`

  // One lane, of an empty slot. Who did not choose the block has given the slot back from the start.
  __device__ __forceinline__ void fill(const Step& step, const CUtensorMap& from, int width, unsigned to, unsigned full,
                                       unsigned empty) const {
    arrive_expecting(full, width / box_columns * At::box);
    for (int at = 0; at < block_tokens; at += p.box_rows) {
      const Place place = place_of(p.a.k.map, step.block() * block_tokens + at);
      for (int box = 0; box < width / box_columns; ++box)
        copy_box(to + at * 128 + box * At::box, &from, full, box * box_columns, place.row, step.plane, place.rank);
    }
    const int others = queries - __popc(step.by());
    if (others > 0) arrive_for(empty, others);
  }
  __device__ __forceinline__ Step next_step() {
    if (step_of_page == 0) wait_for(shared.planned(page.slot), page.phase);
    return shared.step(page.slot, step_of_page);
  }
  // By every lane that has read the step.
  __device__ __forceinline__ void step_read() {
    if (++step_of_page < page_steps) return;
    arrive(shared.plan_read(page.slot));
    step_of_page = 0;
    page.next();
  }
  // One lane of a warp of its own, as that of V.
  __device__ __forceinline__ void stream_keys() {
    for (Step step = next_step(); !step.is_last(); step = next_step()) {
      const int slot = turn.slot;
      wait_for(shared.key_empty(slot), turn.phase ^ 1);
      fill(step, p.k, DK, shared.key(slot), shared.key_full(slot), shared.key_empty(slot));
      arrive(shared.filled(steps.slot));
      step_read();
      steps.next();
      turn.next();
    }
  }
  __device__ __forceinline__ void stream_values() {
    for (Step step = next_step(); !step.is_last(); step = next_step()) {
      const int slot = turn.slot;
      wait_for(shared.passed(steps.slot), steps.phase);
      wait_for(shared.value_empty(slot), turn.phase ^ 1);
      fill(step, p.v, DV, shared.value(slot), shared.value_full(slot), shared.value_empty(slot));
      step_read();
      steps.next();
      turn.next();
    }
  }
  // A warp; lane q tells query q. K is on its way: its barrier's phase is the one that the letter names, or the next,
  // and the letter of eight before has been read. A letter is sent once V of the block a round before has come, and the
  // next V waits for that: so a barrier of V's is never more than a phase behind a letter, nor before it.
  __device__ __forceinline__ void tell() {
    const int lane = threadIdx.x % 32;
    for (Step step = next_step(); !step.is_last(); step = next_step()) {
      wait_for(shared.filled(steps.slot), steps.phase);
      wait_for(shared.value_full(turn.slot), turn.phase ^ 1);
      if (step.by() >> lane & 1) {
        shared.letter(lane, mail.slot) = Letter::of(step.block(), turn.slot, turn.phase);
        arrive(shared.told(lane, mail.slot));
        mail.next();
      }
      __syncwarp();
      if (lane == 0) arrive(shared.passed(steps.slot));
      step_read();
      steps.next();
      turn.next();
    }
  }
};

}  // namespace nsa::gpu::selected
