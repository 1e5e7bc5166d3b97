#pragma once
// Prefill's selected branch (attend_prefill_sel.cu): what its two sides share, and the side that streams.
//
// The streaming warp walks the union of 12 queries' blocks, which are sorted, and copies each block's K and V once. It
// tells every query that chose the block where it lies, by a letter and a barrier of that query's own: a barrier of the
// slot alone would not do, since a warp that waits for its next block may be more than a round of the ring ahead.

#include <algorithm>

#include "kernels/cuda/prefill.cuh"

namespace nsa::gpu::selected {

constexpr int queries = 12;                  // of an item: warps that multiply
constexpr int threads = 32 * (queries + 4);  // registers change hands between whole warpgroups
constexpr int block_tokens = 64;
constexpr int most_chosen = 32;
constexpr int letters = 8;  // a query's blocks that it has been told of: more than there are slots of K

struct Params {
  CUtensorMap k, v;
  AttendArgs a;
  int box_rows, query_tiles, items;
  // Null: partials are wanted. Else `o` of all branches: this one's, normalised and weighed, added to a.out.o.
  const float* gate;
  void* o;
};

struct Item {
  int sequence, group, first, plane;
  __device__ __forceinline__ Item(const Params& p, int index) {
    const LayerShape& s = p.a.shape;
    first = index % p.query_tiles * queries;
    const int list = index / p.query_tiles;
    sequence = list / s.groups;
    group = list % s.groups;
    plane = (p.a.tile.batch_begin + sequence) * s.groups + group;
  }
  /// Of a query of the item, among the tile's.
  __device__ __forceinline__ std::int64_t row(const Params& p, int query) const {
    return std::int64_t{sequence} * p.a.tile.tokens + first + query;
  }
};

// What the streaming warp tells a query: a block of its own, below 2^25, and the slots and their round where its K and
// V come.
struct Letter {
  std::uint32_t word;
  __device__ __forceinline__ static Letter of(int block, int slot, int phase) {
    return {static_cast<std::uint32_t>(block << 4 | slot << 1 | phase)};
  }
  __device__ __forceinline__ int block() const { return static_cast<int>(word >> 4); }
  __device__ __forceinline__ int slot() const { return word >> 1 & 7; }
  __device__ __forceinline__ int phase() const { return word & 1; }
};

// Shared memory: slots of K, slots of V, barriers, letters, the queries' lists.
template <int DK, int DV>
struct Layout {
  static constexpr int box = block_tokens * 128, key = DK / box_columns * box, value = DV / box_columns * box;
  static constexpr int slots = std::min(7, 224 * 1024 / (key + value));  // of each
  static_assert(slots < letters);
  static constexpr int values = slots * key, barriers = values + slots * value;
  static constexpr int mail = barriers + 8 * (4 * slots + queries * letters), lists = mail + 4 * queries * letters;
  static constexpr int bytes = lists + queries * most_chosen * 4;
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
  __device__ __forceinline__ Letter& letter(int query, int i) const {
    return reinterpret_cast<Letter*>(memory + At::mail)[query * letters + i];
  }
  __device__ __forceinline__ int* lists() const { return reinterpret_cast<int*>(memory + At::lists); }
  __device__ __forceinline__ void open() const {
    for (int i = 0; i < At::slots; ++i) {
      open_barrier(key_full(i), 1);
      open_barrier(key_empty(i), queries);
      open_barrier(value_full(i), 1);
      open_barrier(value_empty(i), queries);
    }
    for (int i = 0; i < queries * letters; ++i) open_barrier(told(0, i), 1);
    barriers_opened();
  }
};

// The streaming warp: lane q has query q's next block; the least of them is the next of the union.
template <int DK, int DV>
struct Streamer {
  using At = Layout<DK, DV>;
  const Params& p;
  const Shared<DK, DV>& shared;
  Turn<At::slots> turn;     // of K's and V's slots
  Turn<letters> mail = {};  // the lane's query's

  __device__ __forceinline__ void copy(const CUtensorMap& from, unsigned to, unsigned barrier, int width, int block,
                                       int plane) const {
    const RowMap& map = p.a.k.map;
    for (int at = 0; at < block_tokens; at += p.box_rows) {
      std::int64_t row = std::int64_t{block} * block_tokens + at;
      int rank = 0;
      if (map.chunk != INT64_MAX) {
        const std::int64_t c = chunk_of(map, row);
        row = row_in_chunk(map, c, row);
        rank = owner_of_chunk(map, c);
      }
      for (int box = 0; box < width / box_columns; ++box)
        copy_box(to + at * 128 + box * At::box, &from, barrier, box * box_columns, static_cast<int>(row), plane, rank);
    }
  }
  // One lane. Who did not choose the block has given its slots back from the start.
  __device__ __forceinline__ void fill(int block, int plane, int others) const {
    const int slot = turn.slot;
    wait_for(shared.key_empty(slot), turn.phase ^ 1);
    arrive_expecting(shared.key_full(slot), At::key);
    copy(p.k, shared.key(slot), shared.key_full(slot), DK, block, plane);
    if (others > 0) arrive_for(shared.key_empty(slot), others);
    wait_for(shared.value_empty(slot), turn.phase ^ 1);
    arrive_expecting(shared.value_full(slot), At::value);
    copy(p.v, shared.value(slot), shared.value_full(slot), DV, block, plane);
    if (others > 0) arrive_for(shared.value_empty(slot), others);
  }
  __device__ __forceinline__ void stream(const Item& item);
};

template <int DK, int DV>
__device__ __forceinline__ void Streamer<DK, DV>::stream(const Item& item) {
  const LayerShape& s = p.a.shape;
  const int lane = threadIdx.x % 32, n = s.rules.n_sel;
  int* lists = shared.lists();
  __syncwarp();
  for (int i = lane; i < queries * n; i += 32) {
    const int query = i / n;
    lists[i] = item.first + query < p.a.tile.tokens
                   ? p.a.selected[(item.row(p, query) * s.groups + item.group) * n + i % n]
                   : -1;
  }
  __syncwarp();
  constexpr int none = INT32_MAX;
  int at = 0;
  const auto next = [&] {
    const int block = lane < queries && at < n ? lists[lane * n + at] : none;
    ++at;
    return block < 0 ? none : block;
  };
  for (int mine = next();;) {
    const int block = __reduce_min_sync(0xffffffffu, mine);
    if (block == none) break;
    const bool is_mine = mine == block;
    const unsigned by = __ballot_sync(0xffffffffu, is_mine);
    if (lane == 0) fill(block, item.plane, queries - __popc(by));
    __syncwarp();  // both are on their way: their barriers' phases are those that the letter names, or the next
    if (is_mine) {
      shared.letter(lane, mail.slot) = Letter::of(block, turn.slot, turn.phase);
      arrive(shared.told(lane, mail.slot));
      mail.next();
      mine = next();
    }
    turn.next();
  }
}

}  // namespace nsa::gpu::selected
