#pragma once
// Prefill's selected branch (attend_prefill_sel.cu): what its two sides share, and the side that streams.
//
// A warp walks the union of 12 queries' blocks, which are sorted, and copies each block's K once. It tells every query
// that chose the block where it lies, by a letter and a barrier of that query's own: a barrier of the slot alone would
// not do, since a warp that waits for its next block may be more than a round of the ring ahead. By another letter it
// tells the warp beside it, which copies V: K's slots are free sooner than V's, so the next block's K is on its way,
// and its scores are formed, while its V still waits for a slot.

#include <algorithm>

#include "kernels/cuda/prefill.cuh"

namespace nsa::gpu::selected {

constexpr int queries = 12;                  // of an item: warps that multiply
constexpr int threads = 32 * (queries + 4);  // registers change hands between whole warpgroups
constexpr int block_tokens = 64;
constexpr int most_chosen = 32;
constexpr int letters = 8;  // that a query, or the warp that streams V, may have before it: more than there are slots

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

// What the warp that streams K tells the one that streams V: a block, below 2^25, and how many queries did not choose
// it. No block: there are no more.
struct ValueLetter {
  int word, plane;
  __device__ __forceinline__ static ValueLetter of(int block, int others, int plane) {
    return {block << 4 | others, plane};
  }
  __device__ __forceinline__ static ValueLetter last() { return {-1, 0}; }
  __device__ __forceinline__ bool is_last() const { return word < 0; }
  __device__ __forceinline__ int block() const { return word >> 4; }
  __device__ __forceinline__ int others() const { return word & 15; }
};

// Shared memory: slots of K, slots of V, barriers, letters, the queries' lists.
template <int DK, int DV>
struct Layout {
  static constexpr int box = block_tokens * 128, key = DK / box_columns * box, value = DV / box_columns * box;
  static constexpr int slots = std::min(7, 224 * 1024 / (key + value));  // of each
  static_assert(slots < letters);
  static constexpr int values = slots * key, barriers = values + slots * value;
  static constexpr int mail = barriers + 8 * (4 * slots + (queries + 1) * letters);
  static constexpr int value_mail = mail + 4 * queries * letters, lists = value_mail + 8 * letters;
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
  // A warp; one lane reads, that which gives the letter's slots back: so the next letter's writer has waited for it.
  __device__ __forceinline__ Letter read_letter(int query, int i) const {
    std::uint32_t word = 0;
    if (threadIdx.x % 32 == 0) word = letter(query, i).word;
    return {__shfl_sync(0xffffffffu, word, 0)};
  }
  // The query's list begins at another bank than its neighbours'.
  __device__ __forceinline__ int& chosen(int query, int i) const {
    return reinterpret_cast<int*>(memory + At::lists)[query * most_chosen + (i + query) % most_chosen];
  }
  __device__ __forceinline__ unsigned value_told(int i) const { return told(queries, i); }
  __device__ __forceinline__ ValueLetter& value_letter(int i) const {
    return reinterpret_cast<ValueLetter*>(memory + At::value_mail)[i];
  }
  __device__ __forceinline__ void open() const {
    for (int i = 0; i < At::slots; ++i) {
      open_barrier(key_full(i), 1);
      open_barrier(key_empty(i), queries);
      open_barrier(value_full(i), 1);
      open_barrier(value_empty(i), queries);
    }
    for (int i = 0; i < (queries + 1) * letters; ++i) open_barrier(told(0, i), 1);
    barriers_opened();
  }
};

// The warp that streams K: lane q has query q's next block; the least of them is the next of the union. A lane of the
// next warp streams V.
template <int DK, int DV>
struct Streamer {
  using At = Layout<DK, DV>;
  const Params& p;
  const Shared<DK, DV>& shared;
  Turn<At::slots> turn;     // of K's and V's slots
  Turn<letters> mail = {};  // the lane's query's
  Turn<letters> value_mail = {};

  __device__ __forceinline__ void copy(const CUtensorMap& from, unsigned to, unsigned barrier, int width, int block,
                                       int plane) const {
    for (int at = 0; at < block_tokens; at += p.box_rows) {
      const Place place = place_of(p.a.k.map, block * block_tokens + at);
      for (int box = 0; box < width / box_columns; ++box)
        copy_box(to + at * 128 + box * At::box, &from, barrier, box * box_columns, place.row, plane, place.rank);
    }
  }
  // One lane, of an empty slot. Who did not choose the block has given its slots back from the start. A block's V is
  // told of once that of the block a round before has come: so a barrier of V's is never more than a phase behind a
  // letter.
  __device__ __forceinline__ void fill_keys(int block, int plane, int others) {
    const int slot = turn.slot;
    arrive_expecting(shared.key_full(slot), At::key);
    copy(p.k, shared.key(slot), shared.key_full(slot), DK, block, plane);
    if (others > 0) arrive_for(shared.key_empty(slot), others);
    wait_for(shared.value_full(slot), turn.phase ^ 1);
    tell_values(ValueLetter::of(block, others, plane));
  }
  __device__ __forceinline__ void tell_values(ValueLetter letter) {
    shared.value_letter(value_mail.slot) = letter;
    arrive(shared.value_told(value_mail.slot));
    value_mail.next();
  }
  __device__ __forceinline__ void end() {
    if (threadIdx.x % 32 == 0) tell_values(ValueLetter::last());
  }
  // One lane of a warp of its own: V of every block it is told of.
  __device__ __forceinline__ void stream_values() {
    for (;; value_mail.next(), turn.next()) {
      wait_for(shared.value_told(value_mail.slot), value_mail.phase);
      const ValueLetter letter = shared.value_letter(value_mail.slot);
      if (letter.is_last()) return;
      const int slot = turn.slot;
      wait_for(shared.value_empty(slot), turn.phase ^ 1);
      arrive_expecting(shared.value_full(slot), At::value);
      copy(p.v, shared.value(slot), shared.value_full(slot), DV, letter.block(), letter.plane);
      if (letter.others() > 0) arrive_for(shared.value_empty(slot), letter.others());
    }
  }
  __device__ __forceinline__ void stream(const Item& item);
};

template <int DK, int DV>
__device__ __forceinline__ void Streamer<DK, DV>::stream(const Item& item) {
  const LayerShape& s = p.a.shape;
  const int lane = threadIdx.x % 32, n = s.rules.n_sel;
  const auto list_of = [&](int query) { return item.row(p, query) * s.groups + item.group; };
  const auto is_there = [&](int query) { return item.first + query < p.a.tile.tokens; };
  int chosen[queries];
#pragma unroll
  for (int query = 0; query < queries; ++query)
    chosen[query] = lane < n && is_there(query) ? p.a.selected[list_of(query) * n + lane] : -1;
  __syncwarp();
#pragma unroll
  for (int query = 0; query < queries; ++query)
    if (lane < n) shared.chosen(query, lane) = chosen[query];
  __syncwarp();
  constexpr int none = INT32_MAX;
  int at = 0;
  const auto next = [&] {
    const int block = lane < queries && at < n ? shared.chosen(lane, at) : none;
    ++at;
    return block < 0 ? none : block;
  };
  for (int mine = next();;) {
    const int block = __reduce_min_sync(0xffffffffu, mine);
    if (block == none) break;
    const bool is_mine = mine == block;
    const unsigned by = __ballot_sync(0xffffffffu, is_mine);
    wait_for(shared.key_empty(turn.slot), turn.phase ^ 1);  // every lane: letters of that round have been read
    if (lane == 0) fill_keys(block, item.plane, queries - __popc(by));
    __syncwarp();  // K is on its way: its barrier's phase is the one that the letter names, or the next
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
