#pragma once
// Prefill's selected branch (prefill/selected/kernel.cu): what its sides share.
//
// A CTA takes 12 queries of a group. A warp plans in which turn the blocks come that they chose
// (prefill/selected/scheduler.cuh), one streams K, one V, one tells every query that chose a block where it lies
// (prefill/selected/producer.cuh), and a warp a query multiplies. A query is told by a letter and a barrier of its own:
// a barrier of the slot alone would not do, since a warp that waits for its next block may be more than a round of the
// ring ahead.

#include <algorithm>

#include "kernels/cuda/prefill/prefill.cuh"

namespace nsa::gpu::selected {

constexpr int queries = 12;                  // of an item: warps that multiply
constexpr int threads = 32 * (queries + 4);  // registers change hands between whole warpgroups
constexpr int block_tokens = 64;
constexpr int most_chosen = 32, few_chosen = 16;  // blocks of a query: what the plan has room for
constexpr int letters = 8;                        // that a query may have before it: more than there are slots
constexpr int pages = 4, page_steps = 8;          // of the plan
constexpr std::int64_t most_positions = std::int64_t{block_tokens} << 19;  // of a step's word

struct Params {
  CUtensorMap k, v;
  AttendArgs a;
  int box_rows, query_tiles, items;
  bool side_by_side;  // all planes' items by turns, late queries first, instead of plane after plane
  // Null: partials are wanted. Else `o` of all branches: this one's, normalised and weighed, added to a.out.o.
  const float* gate;
  void* o;
};

struct Item {
  int sequence, group, first, plane;
  __device__ __forceinline__ Item(const Params& p, int index) {
    const LayerShape& s = p.a.shape;
    const int lists = p.items / p.query_tiles;
    const int list = p.side_by_side ? index % lists : index / p.query_tiles;
    const int tile = p.side_by_side ? p.query_tiles - 1 - index / lists : index % p.query_tiles;
    first = tile * queries;
    sequence = list / s.groups;
    group = list % s.groups;
    plane = (p.a.tile.batch_begin + sequence) * s.groups + group;
  }
  __device__ __forceinline__ bool has(const Params& p, int query) const { return first + query < p.a.tile.tokens; }
  /// Of a query of the item, among the tile's.
  __device__ __forceinline__ std::int64_t row(const Params& p, int query) const {
    return std::int64_t{sequence} * p.a.tile.tokens + first + query;
  }
};

// The items of a CTA: one of every gridDim.x. Side by side to and fro, so that none has the longest of every round.
struct Items {
  const Params& p;
  int round = 0;
  __device__ __forceinline__ explicit Items(const Params& params) : p(params) {}
  __device__ __forceinline__ int index() const {
    const int place = p.side_by_side && round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    return round * gridDim.x + place;
  }
  __device__ __forceinline__ bool more() const { return index() < p.items; }
  __device__ __forceinline__ void next() { ++round; }
};

// A step of the plan: a block, below 2^19, and the queries that chose it.
struct Step {
  int word, plane;
  __device__ __forceinline__ static Step of(int block, unsigned by, int plane) {
    return {block << queries | static_cast<int>(by), plane};
  }
  __device__ __forceinline__ static Step last() { return {-1, 0}; }
  __device__ __forceinline__ bool is_last() const { return word < 0; }
  __device__ __forceinline__ int block() const { return word >> queries; }
  __device__ __forceinline__ unsigned by() const { return word & ((1u << queries) - 1); }
};

// What a query is told: a block of its own and the slots and their round where its K and V come.
struct Letter {
  std::uint32_t word;
  __device__ __forceinline__ static Letter of(int block, int slot, int phase) {
    return {static_cast<std::uint32_t>(block << 4 | slot << 1 | phase)};
  }
  __device__ __forceinline__ int block() const { return static_cast<int>(word >> 4); }
  __device__ __forceinline__ int slot() const { return word >> 1 & 7; }
  __device__ __forceinline__ int phase() const { return word & 1; }
};

// Shared memory: slots of K, slots of V, barriers, letters, the plan.
template <int DK, int DV>
struct Layout {
  static constexpr int box = block_tokens * 128, key = DK / box_columns * box, value = DV / box_columns * box;
  static constexpr int slots = std::min(7, 224 * 1024 / (key + value));  // of each
  static_assert(slots < letters);
  static constexpr int values = slots * key, barriers = values + slots * value;
  static constexpr int mail = barriers + 8 * (4 * slots + (queries + 2) * letters + 2 * pages);
  static constexpr int plan = mail + 4 * queries * letters, bytes = plan + 8 * pages * page_steps;
  static_assert(bytes <= 227 * 1024);
};

template <int DK, int DV>
struct Shared {
  using At = Layout<DK, DV>;
  char* memory;
  unsigned base;
  __device__ __forceinline__ explicit Shared(char* given) : memory(given), base(shared_address(given)) {}
  __device__ __forceinline__ unsigned key(int i) const { return base + i * At::key; }
  __device__ __forceinline__ unsigned value(int i) const { return base + At::values + i * At::value; }
  __device__ __forceinline__ unsigned barrier(int i) const { return base + At::barriers + 8 * i; }
  __device__ __forceinline__ unsigned key_full(int i) const { return barrier(i); }
  __device__ __forceinline__ unsigned key_empty(int i) const { return barrier(At::slots + i); }
  __device__ __forceinline__ unsigned value_full(int i) const { return barrier(2 * At::slots + i); }
  __device__ __forceinline__ unsigned value_empty(int i) const { return barrier(3 * At::slots + i); }
  __device__ __forceinline__ unsigned told(int query, int i) const {
    return barrier(4 * At::slots + query * letters + i);
  }
  /// Of a step: its K is on its way; and V of the block a round before has come, so its V may.
  __device__ __forceinline__ unsigned filled(int i) const { return told(queries, i); }
  __device__ __forceinline__ unsigned passed(int i) const { return told(queries + 1, i); }
  __device__ __forceinline__ unsigned planned(int page) const { return told(queries + 2, page); }
  __device__ __forceinline__ unsigned plan_read(int page) const { return planned(pages + page); }
  __device__ __forceinline__ Letter& letter(int query, int i) const {
    return reinterpret_cast<Letter*>(memory + At::mail)[query * letters + i];
  }
  // A warp; one lane reads, that which gives the letter's slots back: so the next letter's writer has waited for it.
  __device__ __forceinline__ Letter read_letter(int query, int i) const {
    std::uint32_t word = 0;
    if (threadIdx.x % 32 == 0) word = letter(query, i).word;
    return {__shfl_sync(0xffffffffu, word, 0)};
  }
  __device__ __forceinline__ Step& step(int page, int i) const {
    return reinterpret_cast<Step*>(memory + At::plan)[page * page_steps + i];
  }
  __device__ __forceinline__ void open() const {
    for (int i = 0; i < At::slots; ++i) {
      open_barrier(key_full(i), 1);
      open_barrier(key_empty(i), queries);
      open_barrier(value_full(i), 1);
      open_barrier(value_empty(i), queries);
    }
    for (int i = 0; i < (queries + 2) * letters; ++i) open_barrier(told(0, i), 1);
    for (int i = 0; i < pages; ++i) {
      open_barrier(planned(i), page_steps);  // a lane a step
      open_barrier(plan_read(i), 2 + 32);    // those that stream K and V, and all lanes of the warp that tells
    }
    barriers_opened();
  }
};

}  // namespace nsa::gpu::selected
