#pragma once
// What the clusters of one work item on different ranks send each other between the phases of a step, and which chunks,
// blocks and heads are whose. A cluster's only partners are those of the same work item: it stores into their memory
// and polls its own.
//
// Memory of a rank: the epochs of the work items, then [2][work items] slots. A slot has a part for each of the
// exchanges below. An exchange of step e uses the slots of parity e % 2. Two parities are enough: a rank that starts
// step e + 1 has completed step e, for which it waited for the states of every peer; that peer had then completed step
// e - 1, which used the same slots. Slots depend on the number of ranks alone, so steps of other sizes may follow.

#include <algorithm>

#include "kernels/cuda/decode/fused/from_raw_scores.cuh"
#include "kernels/cuda/decode/sharded/params.cuh"
#include "kernels/cuda/exchange/ll_words.cuh"
#include "kernels/cuda/runtime/clock.cuh"

namespace nsa::gpu {

/// Byte offsets in the slot of a work item, for groups of up to 16 heads, Dv up to 128 and 32 CTAs of all ranks.
struct StepSlot {
  static constexpr int max_heads = 16, max_quads = 32, max_buckets = 24, max_ctas = 32, max_work_items = 264;
  static constexpr int lse = 0, states = lse + max_buckets * max_heads * ll_vector_bytes,
                       candidates = states + max_ctas * branches * max_heads * ll_vector_bytes,
                       candidate_bytes = warp_top_n * ll_vector_bytes,
                       value_bytes = 2 * max_heads * max_quads * ll_vector_bytes;  // both of a rank
  static constexpr int values(int ranks) { return candidates + ranks * candidate_bytes; }
  static constexpr int bytes(int ranks) { return values(ranks) + ranks * value_bytes; }
  static constexpr int first_slot = 4096;
  static_assert(max_work_items * sizeof(std::uint32_t) <= first_slot);
  /// Work items that fit the memory.
  static constexpr int work_items(int ranks) {
    return std::min(max_work_items, (static_cast<int>(step_exchange_bytes) - first_slot) / (2 * bytes(ranks)));
  }
};

struct ShardCoord : FusedCoord {
  const ShardedDecodeParams* p;
  std::uint32_t epoch;
  int all_n;               ///< compressed tokens of all ranks; `n`: those here
  int all_eligible;        ///< blocks of all ranks that begin at or before the position; `eligible`: held ones of them
  int chunks, halo_tiles;  ///< chunks of cmp here; tiles of cmp here that begin at or before token n
  int selected;            ///< lane u: the u-th selected block of all ranks; -1: none

  __device__ __forceinline__ int rank() const { return p->rank; }

  // Chunks.
  /// Chunks of this rank among the first `count` of a sequence.
  __device__ __forceinline__ int held_chunks(int count) const {
    return count > p->rank ? p->by_kv(count - p->rank - 1) + 1 : 0;
  }
  __device__ __forceinline__ bool holds_chunk(int chunk) const { return chunk - p->by_kv(chunk) * p->kv == p->rank; }
  /// From counts of the whole sequence to those of this rank; reads the epoch. After the predecessor.
  __device__ __forceinline__ void start() {
    epoch = *reinterpret_cast<const volatile std::uint32_t*>(epoch_address()) + 1;
    all_n = n;
    const int segment = static_cast<int>(p->shape.lse.segment), per_segment = segment / tile_rows;
    const int last = p->segment(n), rest = n - last * segment, whole = held_chunks(last);  // chunk `last` is not full
    const bool holds_last = holds_chunk(last);
    n = whole * segment + (holds_last ? rest : 0);
    chunks = whole + holds_last;
    halo_tiles = whole * per_segment + (holds_last ? rest / tile_rows + 1 : 0);
    all_eligible = eligible;
    const int last_block_chunk = p->by_chunk_blocks(all_eligible - 1), whole_blocks = held_chunks(last_block_chunk);
    const bool holds_last_block = holds_chunk(last_block_chunk);
    eligible =
        whole_blocks * p->chunk_blocks + (holds_last_block ? all_eligible - last_block_chunk * p->chunk_blocks : 0);
  }
  /// Positions of the selection K and V here, counted without those of other ranks.
  __device__ __forceinline__ int held_positions() const {
    const int last = all_eligible - 1, chunk = p->by_chunk_blocks(last);
    const int missing = chunk - p->by_kv(chunk) * p->kv == p->rank ? (last + 1) * p->shape.rules.l_sel - (t + 1) : 0;
    return eligible * p->shape.rules.l_sel - missing;
  }
  /// The j-th block that this rank holds.
  __device__ __forceinline__ int block_of_held(int j) const {
    const int chunk = p->by_chunk_blocks(j);
    return j + (chunk * (p->kv - 1) + p->rank) * p->chunk_blocks;
  }
  /// Which of the selected blocks this rank holds, by their index here, in the first lanes; -1 in the others. Keeps
  /// their order. `count` lanes have one. All lanes.
  __device__ __forceinline__ int held_of_selected(int& count) const {
    const int lane = threadIdx.x % 32, chunk = p->by_chunk_blocks(max(selected, 0)), round = p->by_kv(chunk);
    const bool held = selected >= 0 && chunk - round * p->kv == p->rank;
    const int index = selected + (round - chunk) * p->chunk_blocks;
    const unsigned mask = __ballot_sync(0xffffffffu, held);
    count = __popc(mask);
    int from = 0, left = lane;  // the lane of the mask's bit `lane`
#pragma unroll
    for (int width = 16; width > 0; width /= 2) {
      const int below = __popc(mask >> from & ((1u << width) - 1));
      if (left >= below) left -= below, from += width;
    }
    const int mine = __shfl_sync(0xffffffffu, index, from % 32);
    return lane < count ? mine : -1;
  }

  // Readings of clocks by the first thread of the work item, where they are wanted.
  __device__ __forceinline__ void read_clock(int index) const {
    if (p->readings && cta == 0 && threadIdx.x == 0) {
      std::int64_t* to = p->readings + work_item * step_readings;
      to[index] = clock64();
      if (index == 0) to[step_phase_count + 1] = device_nanoseconds();
      if (index == step_phase_count) to[step_phase_count + 2] = device_nanoseconds();
    }
  }
  __device__ __forceinline__ void end_phase(StepPhase phase) const { read_clock(static_cast<int>(phase) + 1); }

  // Exchanges.
  __device__ __forceinline__ std::byte* memory(int owner) const {
    return p->peers.memory[owner] + step_exchange_offset;
  }
  __device__ __forceinline__ std::uint32_t* epoch_address() const {
    return reinterpret_cast<std::uint32_t*>(memory(p->rank)) + work_item;
  }
  __device__ __forceinline__ std::byte* slot(int owner) const {
    return memory(owner) + StepSlot::first_slot +
           (static_cast<int>(epoch % 2) * p->slots + work_item) * std::int64_t{p->slot_bytes};
  }
  template <class Use>
  __device__ __forceinline__ void for_each_peer(Use use) const {
    if (!p->exchanges) return;
#pragma unroll 1
    for (int i = 1; i < p->kv; ++i) use(p->rank + i < p->kv ? p->rank + i : p->rank + i - p->kv);
  }
  /// One thread at the end of a step: all threads of the cluster have read the epoch.
  __device__ __forceinline__ void finish() const {
    if (p->exchanges) *epoch_address() = epoch;
  }

  /// (m, sum) of a head of the bucket-th bucket of this rank, for all ranks. Each CTA of the cluster sends a share.
  __device__ __forceinline__ void send_bucket(float2* buckets, int bucket, int head, int heads, float2 x) const {
    const int to = (bucket * p->kv + p->rank) * heads + head;
    buckets[to] = x;
    if (to - p->by_cluster(to) * p->cluster != cta) return;
    for_each_peer([&](int peer) {
      ll_store(slot(peer) + StepSlot::lse + to * ll_vector_bytes, __float_as_uint(x.x), __float_as_uint(x.y), epoch);
    });
  }
  /// The buckets of the other ranks. By `threads` threads.
  __device__ __forceinline__ void receive_buckets(float4* buckets, int pairs, int threads) const {
    const std::byte* from = slot(p->rank) + StepSlot::lse;
#pragma unroll 1
    for (int item = threadIdx.x; item < p->shape.lse.buckets * pairs; item += threads) {
      const int bucket = item / pairs;
      if (bucket - p->by_kv(bucket) * p->kv == p->rank) continue;
      uint2 x[2] = {{__float_as_uint(-INFINITY), 0}, {__float_as_uint(-INFINITY), 0}};
      const std::byte* at = from + item * 2 * ll_vector_bytes;
      if (p->exchanges) ll_wait({at, at + ll_vector_bytes}, epoch, p->peers.abort_flag, x);
      buckets[item] = {__uint_as_float(x[0].x), __uint_as_float(x[0].y), __uint_as_float(x[1].x),
                       __uint_as_float(x[1].y)};
    }
  }

  /// The best 16 of all ranks, from those of this one. Every scoring warp of the cluster; its first warp sends.
  __device__ __forceinline__ Entry top16_of_ranks(Entry best) const {
    const int lane = threadIdx.x % 32;
    const auto offset = [&](int source) {
      return StepSlot::candidates + (source * warp_top_n + lane % warp_top_n) * ll_vector_bytes;
    };
    if (warp_in_cluster == 0 && lane < warp_top_n)
      for_each_peer([&](int peer) {
        ll_store(slot(peer) + offset(p->rank), static_cast<unsigned>(best), static_cast<unsigned>(best >> 32), epoch);
      });
    for_each_peer([&](int peer) {
      uint2 x[1];
      ll_wait({slot(p->rank) + offset(peer)}, epoch, p->peers.abort_flag, x);
      __syncwarp();
      best = top16_of_two(best, Entry{x[0].y} << 32 | x[0].x);
    });
    return best;
  }

  /// (m, sum) of the branches and heads of this CTA, [branch][head], to all ranks.
  __device__ __forceinline__ static int state_offset(int cta_of_ranks, int b, int head) {
    return StepSlot::states + ((cta_of_ranks * branches + b) * StepSlot::max_heads + head) * ll_vector_bytes;
  }
  __device__ __forceinline__ void send_states(const float2* states, int heads) const {
    if (static_cast<int>(threadIdx.x) >= branches * heads) return;
    const int b = static_cast<int>(threadIdx.x) / heads, head = static_cast<int>(threadIdx.x) % heads;
    if (p->leave_out[b]) return;
    const float2 x = states[threadIdx.x];
    const int offset = state_offset(p->rank * p->cluster + cta, b, head);
    for_each_peer([&](int peer) { ll_store(slot(peer) + offset, __float_as_uint(x.x), __float_as_uint(x.y), epoch); });
  }
  __device__ __forceinline__ float2 receive_state(int cta_of_ranks, int b, int head) const {
    uint2 x[1] = {{__float_as_uint(neg_inf), 0}};
    if (p->exchanges) ll_wait({slot(p->rank) + state_offset(cta_of_ranks, b, head)}, epoch, p->peers.abort_flag, x);
    return {__uint_as_float(x[0].x), __uint_as_float(x[0].y)};
  }

  /// The rank that finishes a head of this work item: finished_heads().
  __device__ __forceinline__ int finisher(int head) const {
    return p->by_heads((group * p->shape.heads_per_group + head + 1) * p->kv - 1);
  }
  /// Four columns of this rank's part of o, to the rank that finishes their head: [rank][half][item].
  __device__ __forceinline__ int value_offset(int source, int item) const {
    return StepSlot::values(p->kv) + source * StepSlot::value_bytes + item * ll_vector_bytes;
  }
  __device__ __forceinline__ void send_value(int to, int item, float4 x) const {
    if (!p->exchanges) return;
    std::byte* at = slot(to) + value_offset(p->rank, item);
    ll_store(at, __float_as_uint(x.x), __float_as_uint(x.y), epoch);
    ll_store(at + StepSlot::value_bytes / 2, __float_as_uint(x.z), __float_as_uint(x.w), epoch);
  }
  __device__ __forceinline__ float4 receive_value(int source, int item) const {
    const std::byte* at = slot(p->rank) + value_offset(source, item);
    uint2 x[2] = {};
    if (p->exchanges) ll_wait({at, at + StepSlot::value_bytes / 2}, epoch, p->peers.abort_flag, x);
    return {__uint_as_float(x[0].x), __uint_as_float(x[0].y), __uint_as_float(x[1].x), __uint_as_float(x[1].y)};
  }
};

}  // namespace nsa::gpu
