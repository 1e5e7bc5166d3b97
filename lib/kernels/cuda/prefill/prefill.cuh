#pragma once
// Shared by the tiled prefill kernels (capability 9.0): accepted shapes, work items, and the KV ring of the dense
// kernels.
//
// Tuned instances have (Dk, Dv) = (64, 64) or (128, 128) as constants. Padded instances of (128, 128), (192, 128) and
// (256, 128) serve all multiples of 16: tensor copies fill columns past the head size with zeros, in shared memory
// alone, and results past it are not stored. More than 128 columns of V, or 16 heads, are several parts, a launch each;
// the dense branches take all columns in one launch, by (256, 256) in place of (256, 128).
//
// A warp of a tuned instance has one query: its (up to 16) heads are the 16 rows of its part of a product. In a padded
// instance a query takes 1, 2, 4, 8 or 16 rows, so that groups of few heads fill products with several queries. A CTA
// of the dense kernels has consumer warpgroups of 64 rows each, which read the same K (and V) tiles of 128 tokens, and
// one producer warpgroup, which loads the tiles through a ring of slots. CTAs are persistent: each takes every
// gridDim-th work item, so that the next item's first tiles are in flight during this one's epilogue.

#include <algorithm>
#include <bit>
#include <cstddef>
#include <type_traits>

#include "kernels/cuda/attention/split_kv.cuh"
#include "kernels/cuda/primitives/mma.cuh"
#include "kernels/cuda/primitives/tma.cuh"
#include "kernels/cuda/primitives/wgmma.cuh"
#include "kernels/cuda/runtime/common.cuh"
#include "kernels/cuda/sizes/accepts.hpp"

namespace nsa::gpu {

constexpr int warpgroup_rows = 64;                                  ///< of a product
constexpr int warpgroup_queries = warpgroup_rows / heads_per_tile;  ///< of a tuned instance
constexpr int narrow_tile_tokens = 16;                              ///< of a window's last tile, where 16 are enough

/// Calls f(DK, DV, tuned), integral constants of the instance that serves a shape. A tuned instance has the shape's
/// head sizes as constants, and one query a warp.
template <class F>
void with_head_sizes(const LayerShape& s, F f) {
  using std::integral_constant;
  constexpr integral_constant<int, 64> small;
  constexpr integral_constant<int, 128> large;
  const auto tuned = [&](int size, int fewest_heads) {  // fewer heads: several queries a warp are faster
    return s.d_k == size && s.d_v == size && s.heads_per_group >= fewest_heads && s.heads_per_group <= heads_per_tile;
  };
  if (tuned(64, 5))
    f(small, small, std::true_type{});
  else if (tuned(128, 9))
    f(large, large, std::true_type{});
  else if (s.d_k <= 128)
    f(large, large, std::false_type{});
  else if (s.d_k <= 192)
    f(integral_constant<int, 192>{}, large, std::false_type{});
  else
    f(integral_constant<int, 256>{}, large, std::false_type{});
}

/// What one launch computes of every group: up to 16 heads, and up to `columns` columns of V and o.
struct PrefillPart {
  int first_head, heads, first_column, columns;
  int query_rows;  // of a product, that a query takes: the next power of two of `heads`, or all 16 of a warp
  __host__ __device__ bool is_first() const { return first_head == 0 && first_column == 0; }
};
/// Calls f(part) for all parts of a shape, each with up to `columns` columns of V. `tuned`: of the instance.
template <class F>
void for_each_prefill_part(const LayerShape& s, int columns, bool tuned, F f) {
  for (int head = 0; head < s.heads_per_group; head += heads_per_tile)
    for (int column = 0; column < s.d_v; column += columns) {
      PrefillPart part{head, std::min(heads_per_tile, s.heads_per_group - head), column,
                       std::min(columns, s.d_v - column), heads_per_tile};
      if (!tuned) part.query_rows = static_cast<int>(std::bit_ceil(static_cast<unsigned>(part.heads)));
      f(part);
    }
}
/// Of a lane's two rows of its warpgroup's product: the query, among the work item's, and the head in the part.
template <bool Tuned>
struct LaneRows {
  static constexpr int queries = Tuned ? 1 : 2;  ///< of the two rows
  static __device__ __forceinline__ int row(int half) {
    return threadIdx.x % 128 / 32 * heads_per_tile + threadIdx.x % 32 / 4 + half * 8;
  }
  static __device__ __forceinline__ int query(const PrefillPart& part, int warpgroup, int half) {
    if constexpr (Tuned) return warpgroup * warpgroup_queries + threadIdx.x % 128 / 32;
    return (warpgroup * warpgroup_rows + row(half)) >> (31 - __clz(part.query_rows));
  }
  static __device__ __forceinline__ int head(const PrefillPart& part, int half) {
    if constexpr (Tuned) return threadIdx.x % 32 / 4 + half * 8;
    return row(half) & (part.query_rows - 1);
  }
};
inline Partials partials_of(const PrefillPart& part, const LayerShape& s, Partials out) {
  out.o += std::int64_t{part.first_head} * s.d_v + part.first_column;
  out.ms += std::int64_t{part.first_head} * 2;
  return out;
}
/// Factor of scores before exponentials in base 2: log2(e) / sqrt(Dk).
float softmax_scale(const LayerShape& s);

/// The work of a dense kernel: a work item is some queries of a (sequence, group).
struct DenseWork {
  CUtensorMap q;
  LayerShape shape;
  QueryTile tile;
  int item_queries;
  int query_tiles;  // of a (sequence, group)
  int items;        // sequences * groups * query tiles
  float scale;      // softmax_scale()
};
/// For work items of `item_rows` rows of products.
DenseWork dense_work(const LayerShape&, const PrefillPart&, const QueryTile&, const void* q, int item_rows);

/// K and V of a branch.
struct KvTensorMaps {
  CUtensorMap k, v;
  CUtensorMap narrow_k, narrow_v;  // boxes of 16 rows, of contiguous buffers
  RowMap map;
  int box_rows;
  std::int64_t rows;  // that are written; later ones have any value
};
/// `v` may be null: only K is read. Columns of V count from `first_column`.
KvTensorMaps kv_tensor_maps(const LayerShape&, const QueryTile&, const KvView& k, const KvView* v, std::int64_t rows,
                            int first_column = 0, int tile_tokens = dense_tile_tokens);
inline int persistent_ctas(const DenseWork& w) { return w.items < limits().sms ? w.items : limits().sms; }

/// compressed_tokens by 32-bit division: positions are below 2^31.
__device__ __forceinline__ int visible_compressed_tokens(const BlockRules& r, std::int64_t t) {
  const unsigned end = static_cast<unsigned>(t) + 1u, l = static_cast<unsigned>(r.l);
  return end < l ? 0 : static_cast<int>((end - l) / static_cast<unsigned>(r.d)) + 1;
}

/// One work item. Late queries, which read most, come first.
struct DenseWorkItem {
  int sequence, group, first_query;  // first_query: among the sequence's rows of the tile
  std::int64_t t;                    // position of the first query
  std::int64_t last_t;               // position of the last query
  int plane;
  __device__ __forceinline__ DenseWorkItem(const DenseWork& w, int index, std::int64_t first_position) {
    const int planes = w.tile.batches * w.shape.groups, in_tile = index % planes;
    sequence = in_tile / w.shape.groups;
    group = in_tile % w.shape.groups;
    first_query = (w.query_tiles - 1 - index / planes) * w.item_queries;
    t = first_position + first_query;
    const std::int64_t end = first_position + w.tile.tokens;
    last_t = (t + w.item_queries < end ? t + w.item_queries : end) - 1;
    plane = (w.tile.batch_begin + sequence) * w.shape.groups + group;
  }
};

/// Shared memory of a CTA, at a multiple of 1024 bytes. Rows of queries and KV slots are 128 bytes, in column boxes.
template <int DK, int DV, int Slots, int ConsumerWarpgroups, int TileTokens>
struct DenseSharedStorage {
  static constexpr int width = DK > DV ? DK : DV;
  static constexpr int query_box = warpgroup_rows * 128, tile_box = TileTokens * 128;
  static constexpr int query_bytes = DK / box_columns * query_box, slot_bytes = width / box_columns * tile_box;
  char queries[ConsumerWarpgroups][query_bytes];
  char slots[Slots][slot_bytes];
  MbarrierWord full[Slots], empty[Slots];
  MbarrierWord queries_full, queries_empty;
};

/// A CTA's shared memory by its addresses, and what the producer does with it.
template <int DK, int DV, int Slots, int ConsumerWarpgroups, int TileTokens = dense_tile_tokens>
struct DenseShared {
  using Storage = DenseSharedStorage<DK, DV, Slots, ConsumerWarpgroups, TileTokens>;
  static constexpr int bytes = sizeof(Storage) + 1024;  // 1024: dynamic shared memory may begin anywhere
  unsigned base;
  __device__ __forceinline__ explicit DenseShared(const char* memory)
      : base((shared_address(memory) + 1023) & ~1023u) {}
  __device__ __forceinline__ unsigned at(std::size_t offset) const { return base + static_cast<unsigned>(offset); }
  __device__ __forceinline__ unsigned queries(int warpgroup) const {
    return at(offsetof(Storage, queries)) + warpgroup * Storage::query_bytes;
  }
  __device__ __forceinline__ unsigned slot(int i) const {
    return at(offsetof(Storage, slots)) + i * Storage::slot_bytes;
  }
  __device__ __forceinline__ unsigned full(int i) const { return at(offsetof(Storage, full)) + 8 * i; }
  __device__ __forceinline__ unsigned empty(int i) const { return at(offsetof(Storage, empty)) + 8 * i; }
  __device__ __forceinline__ unsigned queries_full() const { return at(offsetof(Storage, queries_full)); }
  __device__ __forceinline__ unsigned queries_empty() const { return at(offsetof(Storage, queries_empty)); }
  /// One thread, before a __syncthreads. A warp that has read a slot or the queries arrives once.
  __device__ __forceinline__ void init_barriers() const {
    for (int i = 0; i < Slots; ++i) {
      mbarrier_init(full(i), 1);
      mbarrier_init(empty(i), 4 * ConsumerWarpgroups);
    }
    mbarrier_init(queries_full(), 1);
    mbarrier_init(queries_empty(), 4 * ConsumerWarpgroups);
    fence_mbarrier_init();
  }
  /// The producer thread: the item's queries, `queries_each` for a warpgroup, once the previous item's are released.
  __device__ __forceinline__ void load_queries(const DenseWork& w, const DenseWorkItem& item, int phase,
                                               int queries_each) const {
    mbarrier_wait(queries_empty(), phase ^ 1);
    mbarrier_arrive_expect_tx(queries_full(), Storage::query_bytes * ConsumerWarpgroups);
    for (int warpgroup = 0; warpgroup < ConsumerWarpgroups; ++warpgroup)
      for (int box = 0; box < DK / box_columns; ++box)
        tma_load(queries(warpgroup) + box * Storage::query_box, &w.q, queries_full(), box * box_columns,
                 item.group * w.shape.heads_per_group,
                 item.sequence * w.tile.tokens + item.first_query + warpgroup * queries_each);
  }
  /// The producer thread: a tile's rows from `begin` of one tensor. `begin` is a multiple of their number unless the
  /// buffer is contiguous.
  template <int Width>
  __device__ __forceinline__ void load_tile(const KvTensorMaps& kv, const CUtensorMap& map,
                                            const PipelineState<Slots>& state, int plane, std::int64_t begin) const {
    mbarrier_wait(empty(state.slot), state.phase ^ 1);
    mbarrier_arrive_expect_tx(full(state.slot), Width / box_columns * Storage::tile_box);
    for (int at = 0; at < TileTokens; at += kv.box_rows) {
      const RowCoordinate from = row_coordinate(kv.map, static_cast<int>(begin) + at);
      for (int box = 0; box < Width / box_columns; ++box)
        tma_load(slot(state.slot) + box * Storage::tile_box + at * 128, &map, full(state.slot), box * box_columns,
                 from.row, plane, from.rank);
    }
  }
  /// 16 rows from `begin` of a contiguous buffer.
  template <int Width>
  __device__ __forceinline__ void load_narrow_tile(const CUtensorMap& map, const PipelineState<Slots>& state, int plane,
                                                   std::int64_t begin) const {
    mbarrier_wait(empty(state.slot), state.phase ^ 1);
    mbarrier_arrive_expect_tx(full(state.slot), Width / box_columns * narrow_tile_tokens * 128);
    for (int box = 0; box < Width / box_columns; ++box)
      tma_load(slot(state.slot) + box * Storage::tile_box, &map, full(state.slot), box * box_columns,
               static_cast<int>(begin), plane, 0);
  }
};

/// s = q k^T of a warpgroup's 64 rows and a tile's 128 (s[64]), 64 (s[32]) or 16 (s[8]) tokens, issued as one group.
template <class T, int N, int DK, int DV, int Slots, int ConsumerWarpgroups, int TileTokens>
__device__ __forceinline__ void issue_qk(float (&s)[N],
                                         const DenseShared<DK, DV, Slots, ConsumerWarpgroups, TileTokens>& shared,
                                         int warpgroup, int slot) {
  using Storage = DenseSharedStorage<DK, DV, Slots, ConsumerWarpgroups, TileTokens>;
  const std::uint64_t q = make_desc(shared.queries(warpgroup)), k = make_desc(shared.slot(slot));
#pragma unroll
  for (int step = 0; step < DK / 16; ++step) {
    const int box = step / 4, at = step % 4 * 32;
    wgmma_ss(s, advance_desc(q, box * Storage::query_box + at), advance_desc(k, box * Storage::tile_box + at), step > 0,
             T{});
  }
  warpgroup_commit_batch();
}

/// Tells the compiler that x is equal in all lanes.
__device__ __forceinline__ int warp_uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

/// Reference of a row's probabilities, in base 2, after a tile of maximum `tile_max`. It follows the running maximum
/// only when that grows by more than 2^8, so that o is rarely rescaled.
constexpr float rescale_threshold = 8.0f;
__device__ __forceinline__ float update_row_max(float row_max, float tile_max) {
  return tile_max > row_max + rescale_threshold ? tile_max : row_max;
}

}  // namespace nsa::gpu
