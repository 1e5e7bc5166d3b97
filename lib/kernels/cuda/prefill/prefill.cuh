#pragma once
// What the tiled prefill kernels share (capability 9.0): which shapes they take, and how dense tiles are walked.
//
// A warp has one query: its (up to 16) heads are the 16 rows of its part of a product. A CTA of the dense kernels has
// some warpgroups of 4 queries that read the same K (and V) tiles of 128 tokens, and one more that streams them in
// through a ring. CTAs stay: each takes every gridDim-th item, so that the next item's first tiles are on their way
// while this one's results are written.

#include "kernels/cuda/attention/split_kv.cuh"
#include "kernels/cuda/primitives/mma.cuh"
#include "kernels/cuda/primitives/tma.cuh"
#include "kernels/cuda/primitives/wgmma.cuh"
#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu {

constexpr int group_queries = 4;   ///< of a warpgroup
constexpr int dense_tokens = 128;  ///< of a K or V tile
constexpr int narrow_tokens = 16;  ///< of the last tile of a window that needs no more
constexpr int most_lead = 64;      ///< compressed tokens of the block before that reach into a block

struct DenseParams {
  CUtensorMap q;
  LayerShape shape;
  QueryTile tile;
  int queries;      // of an item
  int query_tiles;  // of a (sequence, group)
  int items;        // sequences * groups * query tiles
};
DenseParams dense_params(const LayerShape&, const QueryTile&, const void* q, int queries);

/// K and V of a branch.
struct DenseSource {
  CUtensorMap k, v;
  CUtensorMap narrow_k, narrow_v;  // boxes of 16 rows, where the map is not cut
  RowMap map;
  int box_rows;
  std::int64_t rows;  // that were written; what follows may be anything
};
/// `v` may be null: only K is read.
DenseSource dense_source(const LayerShape&, const QueryTile&, const KvView& k, const KvView* v, std::int64_t rows);
inline int dense_ctas(const DenseParams& p) { return p.items < limits().sms ? p.items : limits().sms; }

/// compressed_tokens by 32-bit division: positions are below 2^31.
__device__ __forceinline__ int tokens_seen(const BlockRules& r, std::int64_t t) {
  const unsigned end = static_cast<unsigned>(t) + 1u, l = static_cast<unsigned>(r.l);
  return end < l ? 0 : static_cast<int>((end - l) / static_cast<unsigned>(r.d)) + 1;
}

/// One item: some queries of a sequence and a group. Late queries, which have most to read, come first.
struct DenseItem {
  int sequence, group, first;  // first query, among the sequence's rows of the tile
  std::int64_t t;              // its position
  std::int64_t last;           // position of the last query
  int plane;
  __device__ __forceinline__ DenseItem(const DenseParams& p, int index, std::int64_t first_position) {
    const int lists = p.tile.batches * p.shape.groups, list = index % lists;
    sequence = list / p.shape.groups;
    group = list % p.shape.groups;
    first = (p.query_tiles - 1 - index / lists) * p.queries;
    t = first_position + first;
    const std::int64_t end = first_position + p.tile.tokens;
    last = (t + p.queries < end ? t + p.queries : end) - 1;
    plane = (p.tile.batch_begin + sequence) * p.shape.groups + group;
  }
};

/// Shared memory: queries [warpgroup][column box][64 rows], then the slots of the ring, then barriers. 128-byte rows.
/// `Groups`: warpgroups that multiply.
template <int DK, int DV, int Slots, int Groups>
struct DenseLayout {
  static constexpr int width = DK > DV ? DK : DV;
  static constexpr int query_box = 64 * 128, query_group = DK / box_columns * query_box;
  static constexpr int tile_box = dense_tokens * 128, slot = width / box_columns * tile_box;
  static constexpr int slots = query_group * Groups, barriers = slots + Slots * slot;
  static constexpr int bytes = barriers + 8 * (2 * Slots + 2) + 1024;  // and room to begin at a multiple of 1024
};

/// The addresses of a CTA's shared memory and how its two sides meet.
template <int DK, int DV, int Slots, int Groups>
struct DenseShared {
  using Layout = DenseLayout<DK, DV, Slots, Groups>;
  unsigned base;
  __device__ __forceinline__ explicit DenseShared(const char* memory)
      : base((shared_address(memory) + 1023) & ~1023u) {}
  __device__ __forceinline__ unsigned queries(int group) const { return base + group * Layout::query_group; }
  __device__ __forceinline__ unsigned slot(int i) const { return base + Layout::slots + i * Layout::slot; }
  __device__ __forceinline__ unsigned full(int i) const { return base + Layout::barriers + 8 * i; }
  __device__ __forceinline__ unsigned empty(int i) const { return full(Slots + i); }
  __device__ __forceinline__ unsigned queries_full() const { return full(2 * Slots); }
  __device__ __forceinline__ unsigned queries_empty() const { return full(2 * Slots + 1); }
  /// One thread, before a __syncthreads.
  __device__ __forceinline__ void open() const {
    for (int i = 0; i < Slots; ++i) {
      open_barrier(full(i), 1);
      open_barrier(empty(i), 4 * Groups);
    }
    open_barrier(queries_full(), 1);
    open_barrier(queries_empty(), 4 * Groups);
    barriers_opened();
  }
  /// The streaming thread: the item's queries, once those before are no longer read.
  __device__ __forceinline__ void stream_queries(const DenseParams& p, const DenseItem& item, int phase) const {
    wait_for(queries_empty(), phase ^ 1);
    arrive_expecting(queries_full(), Layout::query_group * Groups);
    for (int group = 0; group < Groups; ++group)
      for (int box = 0; box < DK / box_columns; ++box)
        copy_box(queries(group) + box * Layout::query_box, &p.q, queries_full(), box * box_columns,
                 item.group * p.shape.heads_per_group,
                 item.sequence * p.tile.tokens + item.first + group * group_queries);
  }
  /// The streaming thread: 128 rows from `begin` of one tensor; where its map is cut, `begin` is a multiple of 128.
  template <int Width>
  __device__ __forceinline__ void stream_tile(const DenseSource& p, const CUtensorMap& map, const Turn<Slots>& turn,
                                              int plane, std::int64_t begin) const {
    wait_for(empty(turn.slot), turn.phase ^ 1);
    arrive_expecting(full(turn.slot), Width / box_columns * Layout::tile_box);
    for (int at = 0; at < dense_tokens; at += p.box_rows) {
      const Place place = place_of(p.map, static_cast<int>(begin) + at);
      for (int box = 0; box < Width / box_columns; ++box)
        copy_box(slot(turn.slot) + box * Layout::tile_box + at * 128, &map, full(turn.slot), box * box_columns,
                 place.row, plane, place.rank);
    }
  }
  /// 16 rows from `begin` of a tensor that is not cut.
  template <int Width>
  __device__ __forceinline__ void stream_narrow(const CUtensorMap& map, const Turn<Slots>& turn, int plane,
                                                std::int64_t begin) const {
    wait_for(empty(turn.slot), turn.phase ^ 1);
    arrive_expecting(full(turn.slot), Width / box_columns * narrow_tokens * 128);
    for (int box = 0; box < Width / box_columns; ++box)
      copy_box(slot(turn.slot) + box * Layout::tile_box, &map, full(turn.slot), box * box_columns,
               static_cast<int>(begin), plane, 0);
  }
};

/// s = q k^T of a warpgroup's 64 rows and a tile's 128 (s[64]) or 16 (s[8]) tokens, queued.
template <class T, int N, int DK, int DV, int Slots, int Groups>
__device__ __forceinline__ void queue_scores(float (&s)[N], const DenseShared<DK, DV, Slots, Groups>& shared, int group,
                                             int slot) {
  using Layout = DenseLayout<DK, DV, Slots, Groups>;
  const std::uint64_t q = make_desc(shared.queries(group)), k = make_desc(shared.slot(slot));
#pragma unroll
  for (int step = 0; step < DK / 16; ++step) {
    const int box = step / 4, at = step % 4 * 32;
    product(s, advance_desc(q, box * Layout::query_box + at), advance_desc(k, box * Layout::tile_box + at), step > 0,
            T{});
  }
  products_queued();
}

/// x is the same in all lanes, and the compiler knows.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

/// The `threads` threads that meet under that number (1 .. 15).
__device__ __forceinline__ void meet(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

/// The two sides hand registers to and fro: more for those that multiply, few for those that stream.
template <int Registers>
__device__ __forceinline__ void warpgroup_reg_alloc() {
#ifdef NSA_WGMMA
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
#endif
}
template <int Registers>
__device__ __forceinline__ void warpgroup_reg_dealloc() {
#ifdef NSA_WGMMA
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
#endif
}

/// What a row's weights are relative to, in powers of two, behind a tile whose maximum is `top`: the running maximum,
/// or what it was, while it has grown by no more than 2^8 since. So o hardly ever has to be scaled.
constexpr float most_growth = 8.0f;
__device__ __forceinline__ float reference(float before, float top) {
  return top > before + most_growth ? top : before;
}

}  // namespace nsa::gpu
