#pragma once
// Prefill's selected branch (prefill/selected/kernel.cu): parameters, work items, shared memory.
//
// A CTA takes 12 queries of a group, or 12 times as many as fill the rows of a product (warp_queries). One warp
// schedules the blocks that they selected (prefill/selected/scheduler.cuh, shared_scheduler.cuh). One warp loads K, one
// loads V, and one notifies each consumer warp of its blocks (prefill/selected/producer.cuh). A consumer warp computes
// for its query, or queries (prefill/selected/consumer.cuh). It has a mailbox of notifications, each with its own full
// barrier. The barriers of the KV slots alone are not enough: a warp that waits for its next block may be more than a
// round of the ring ahead of it.

#include <algorithm>
#include <cstddef>

#include "kernels/cuda/prefill/prefill.cuh"

namespace nsa::gpu::selected {

constexpr int consumer_warps = 12;
constexpr int threads = 32 * (consumer_warps + 4);     // whole warpgroups, which exchange registers
constexpr int block_tokens = selected_block_tokens;    // of a KV slot: a selection block
constexpr int max_blocks = 32, max_blocks_small = 16;  // of 64 tokens of a query: two instances of TileScheduler
constexpr int mailbox_slots = 8;                       // of a consumer warp: more than KV slots
constexpr int schedule_slots = 4, slot_blocks = 8;     // of the schedule ring, and scheduled blocks in each
constexpr int pool_blocks = 8;                         // of SharedSelectionScheduler
constexpr std::int64_t max_schedulable_positions = std::int64_t{block_tokens}
                                                   << 19;  // ScheduledBlock::block() has 19 bits

struct SelectedParams {
  CUtensorMap k, v;
  AttendArgs a;  // q and out from the part's first head and column on; reads: null where another part counts them
  int box_rows, query_tiles, items;
  // Not read by tuned instances: queries of a consumer warp, 1, 2, 4, 8 or 16, and whether SharedSelectionScheduler
  // runs, which is for several, or for many blocks.
  int warp_queries;
  bool merges_selections;
  bool interleave_planes;  // items of all planes alternate, late queries first; otherwise plane after plane
  bool pairs_blocks;       // a selection block is two blocks of 64 tokens, not one
  // Null: stores partials. Otherwise `o` of all branches is stored: this branch's, normalised and gated, plus a.out.o.
  const float* gate;
  void* o;
  PrefillPart part;  // the last member: prefill/dense/producer.cuh
};

// The i-th block of 64 tokens of a query at position t, given its selection block; -1: none. Where blocks come in pairs
// that is the one with index i / 2, and it may have blocks past t.
__device__ __forceinline__ int block_of_selection(const SelectedParams& p, int selected, int i, int t) {
  const int block = p.pairs_blocks ? 2 * selected + i % 2 : selected;
  return selected >= 0 && block * block_tokens <= t ? block : -1;
}

struct WorkItem {
  int sequence, group, first_query, plane;
  __device__ __forceinline__ WorkItem(const SelectedParams& p, int index, int warp_queries) {
    const LayerShape& s = p.a.shape;
    const int planes = p.items / p.query_tiles;
    const int tile_plane = p.interleave_planes ? index % planes : index / p.query_tiles;
    const int tile = p.interleave_planes ? p.query_tiles - 1 - index / planes : index % p.query_tiles;
    first_query = tile * consumer_warps * warp_queries;
    sequence = tile_plane / s.groups;
    group = tile_plane % s.groups;
    plane = (p.a.tile.batch_begin + sequence) * s.groups + group;
  }
  __device__ __forceinline__ bool has(const SelectedParams& p, int query) const {
    return first_query + query < p.a.tile.tokens;
  }
  /// Row of a query of the item, among the tile's.
  __device__ __forceinline__ std::int64_t row(const SelectedParams& p, int query) const {
    return std::int64_t{sequence} * p.a.tile.tokens + first_query + query;
  }
};

// The work items of a CTA: one of every gridDim.x. Interleaved planes: in alternating direction, so that no CTA has the
// longest item of every round.
struct WorkItems {
  const SelectedParams& p;
  int round = 0;
  __device__ __forceinline__ explicit WorkItems(const SelectedParams& params) : p(params) {}
  __device__ __forceinline__ int index() const {
    const int cta = p.interleave_planes && round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    return round * gridDim.x + cta;
  }
  __device__ __forceinline__ bool more() const { return index() < p.items; }
  __device__ __forceinline__ void next() { ++round; }
};

// What the schedule holds: a block, below 2^19, and the mask of the consumer warps whose queries selected it.
struct ScheduledBlock {
  int word, plane;
  __device__ __forceinline__ static ScheduledBlock of(int block, unsigned warps, int plane) {
    return {block << consumer_warps | static_cast<int>(warps), plane};
  }
  __device__ __forceinline__ static ScheduledBlock last() { return {-1, 0}; }
  __device__ __forceinline__ bool is_last() const { return word < 0; }
  __device__ __forceinline__ int block() const { return word >> consumer_warps; }
  __device__ __forceinline__ unsigned warps() const { return word & ((1u << consumer_warps) - 1); }
};

// What a consumer warp reads from its mailbox: one of its blocks, and the KV slot and phase of the block's K and V.
struct Notification {
  std::uint32_t word;
  __device__ __forceinline__ static Notification of(int block, int slot, int phase) {
    return {static_cast<std::uint32_t>(block << 4 | slot << 1 | phase)};
  }
  __device__ __forceinline__ int block() const { return static_cast<int>(word >> 4); }
  __device__ __forceinline__ int slot() const { return word >> 1 & 7; }
  __device__ __forceinline__ int phase() const { return word & 1; }
};

// Barriers of a CTA's shared memory. `key_` and `value_`: full and empty slots of K and V.
template <int KvSlots>
struct SharedBarriers {
  MbarrierWord key_full[KvSlots], key_empty[KvSlots], value_full[KvSlots], value_empty[KvSlots];
  MbarrierWord mailbox_full[consumer_warps][mailbox_slots];
  // Of a scheduled block. They need no empty barriers: each is waited for before its next arrival, mailbox_slots >
  // KvSlots blocks later. K of block i + mailbox_slots of the schedule is issued once its slot is empty, so after the
  // queries of a later block than i were notified, so after the notifying warp has waited for key_issued of block i.
  // Queries of block i + mailbox_slots are notified once V of a later block than i has arrived, so after the warp that
  // loads V has waited for notified of block i.
  MbarrierWord key_issued[mailbox_slots];  // the copy of its K is issued
  MbarrierWord notified[mailbox_slots];    // its queries are notified, and V of one round before has arrived
  MbarrierWord schedule_full[schedule_slots], schedule_empty[schedule_slots];
};

// Shared memory of a CTA, at a multiple of 1024 bytes. Queries of more than 128 columns do not fit the registers.
template <int DK, int DV>
struct SharedStorage {
  static constexpr int box = block_tokens * 128, key_bytes = DK / box_columns * box,
                       value_bytes = DV / box_columns * box;
  static constexpr bool keeps_queries = DK > 128;
  static constexpr int query_bytes = keeps_queries ? consumer_warps * (DK / 16) * 32 * 16 : 0;
  static constexpr int kv_slots = std::min(7, (224 * 1024 - query_bytes) / (key_bytes + value_bytes));
  static_assert(kv_slots < mailbox_slots);
  char keys[kv_slots][key_bytes];
  char values[kv_slots][value_bytes];
  SharedBarriers<kv_slots> barriers;
  Notification mailboxes[consumer_warps][mailbox_slots];
  ScheduledBlock schedule[schedule_slots][slot_blocks];
  // Where warps have several queries: which of a warp's selected the block, a bit each. Of blocks in the pool of the
  // scheduler, in the schedule, and in mailboxes.
  std::uint16_t pool_queries[pool_blocks][consumer_warps];
  std::uint16_t scheduled_queries[schedule_slots][slot_blocks][consumer_warps];
  std::uint16_t mailbox_queries[consumer_warps][mailbox_slots];
  uint4 queries[keeps_queries ? consumer_warps : 1][keeps_queries ? DK / 16 * 32 : 1];  // operand A: [Dk / 16][lane]
};

// A CTA's shared memory by its addresses.
template <int DK, int DV>
struct Shared {
  using Storage = SharedStorage<DK, DV>;
  using Barriers = decltype(Storage::barriers);
  static constexpr int kv_slots = Storage::kv_slots, bytes = sizeof(Storage);
  static_assert(bytes <= 227 * 1024);
  char* memory;
  unsigned base;
  __device__ __forceinline__ explicit Shared(char* given) : memory(given), base(shared_address(given)) {}
  __device__ __forceinline__ unsigned at(std::size_t offset) const { return base + static_cast<unsigned>(offset); }
  // Barrier first + i of those at `Offset` in Barriers.
  template <std::size_t Offset>
  __device__ __forceinline__ unsigned barrier(int i, int first = 0) const {
    return at(offsetof(Storage, barriers)) + 8 * (static_cast<int>(Offset / 8) + first + i);
  }
  __device__ __forceinline__ unsigned key(int i) const { return at(offsetof(Storage, keys)) + i * Storage::key_bytes; }
  __device__ __forceinline__ unsigned value(int i) const {
    return at(offsetof(Storage, values)) + i * Storage::value_bytes;
  }
  __device__ __forceinline__ unsigned key_full(int i) const { return barrier<offsetof(Barriers, key_full)>(i); }
  __device__ __forceinline__ unsigned key_empty(int i) const { return barrier<offsetof(Barriers, key_empty)>(i); }
  __device__ __forceinline__ unsigned value_full(int i) const { return barrier<offsetof(Barriers, value_full)>(i); }
  __device__ __forceinline__ unsigned value_empty(int i) const { return barrier<offsetof(Barriers, value_empty)>(i); }
  __device__ __forceinline__ unsigned mailbox_full(int query, int i) const {
    return barrier<offsetof(Barriers, mailbox_full)>(i, query * mailbox_slots);
  }
  __device__ __forceinline__ unsigned key_issued(int i) const { return barrier<offsetof(Barriers, key_issued)>(i); }
  __device__ __forceinline__ unsigned notified(int i) const { return barrier<offsetof(Barriers, notified)>(i); }
  __device__ __forceinline__ unsigned schedule_full(int i) const {
    return barrier<offsetof(Barriers, schedule_full)>(i);
  }
  __device__ __forceinline__ unsigned schedule_empty(int i) const {
    return barrier<offsetof(Barriers, schedule_empty)>(i);
  }
  __device__ __forceinline__ Notification& mailbox(int query, int i) const {
    return reinterpret_cast<Notification*>(memory + offsetof(Storage, mailboxes))[query * mailbox_slots + i];
  }
  __device__ __forceinline__ std::uint16_t& pool_queries(int i, int warp) const {
    return reinterpret_cast<std::uint16_t*>(memory + offsetof(Storage, pool_queries))[i * consumer_warps + warp];
  }
  __device__ __forceinline__ std::uint16_t& scheduled_queries(int slot, int i, int warp) const {
    return reinterpret_cast<std::uint16_t*>(
        memory + offsetof(Storage, scheduled_queries))[(slot * slot_blocks + i) * consumer_warps + warp];
  }
  __device__ __forceinline__ std::uint16_t& mailbox_queries(int warp, int i) const {
    return reinterpret_cast<std::uint16_t*>(memory + offsetof(Storage, mailbox_queries))[warp * mailbox_slots + i];
  }
  // As read_mailbox().
  __device__ __forceinline__ unsigned read_mailbox_queries(int warp, int i) const {
    unsigned queries = 0;
    if (threadIdx.x % 32 == 0) queries = mailbox_queries(warp, i);
    return __shfl_sync(0xffffffffu, queries, 0);
  }
  // A warp. Only lane 0 reads, which also releases the notification's KV slots: the next writer of this mailbox slot
  // comes after that release, so the mailbox needs no empty barriers.
  __device__ __forceinline__ Notification read_mailbox(int query, int i) const {
    std::uint32_t word = 0;
    if (threadIdx.x % 32 == 0) word = mailbox(query, i).word;
    return {__shfl_sync(0xffffffffu, word, 0)};
  }
  __device__ __forceinline__ uint4& query(int warp, int step) const {
    return reinterpret_cast<uint4*>(memory +
                                    offsetof(Storage, queries))[(warp * (DK / 16) + step) * 32 + threadIdx.x % 32];
  }
  __device__ __forceinline__ ScheduledBlock& scheduled(int slot, int i) const {
    return reinterpret_cast<ScheduledBlock*>(memory + offsetof(Storage, schedule))[slot * slot_blocks + i];
  }
  // One thread, before a __syncthreads. `schedulers`: lanes that write a slot of the schedule.
  __device__ __forceinline__ void init_barriers(int schedulers) const {
    for (int i = 0; i < kv_slots; ++i) {
      mbarrier_init(key_full(i), 1);
      mbarrier_init(key_empty(i), consumer_warps);
      mbarrier_init(value_full(i), 1);
      mbarrier_init(value_empty(i), consumer_warps);
    }
    // mailbox_full, and key_issued and notified after it.
    for (int i = 0; i < (consumer_warps + 2) * mailbox_slots; ++i) mbarrier_init(mailbox_full(0, i), 1);
    for (int i = 0; i < schedule_slots; ++i) {
      mbarrier_init(schedule_full(i), schedulers);
      mbarrier_init(schedule_empty(i), 2 + 32);  // the threads that load K and V, and all lanes of the notifying warp
    }
    fence_mbarrier_init();
  }
};

}  // namespace nsa::gpu::selected
