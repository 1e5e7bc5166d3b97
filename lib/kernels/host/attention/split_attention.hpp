#pragma once
// Split-KV attention on the host, common to the three branches: query columns, online softmax state (m, s, o), and the
// distribution of the work over threads.
//
// Tiling: a work item is (sequence, group, block of rows). Its K/V range is cut into splits (cmp: LSE buckets; sel:
// selected blocks; win: spans of 64 positions), and each split into KV tiles of at most 64 rows. Tiles merge into the
// state of their split and splits into the result by rising index, whether one thread takes all splits or several
// share them: the result does not depend on the thread count.
//
// Bytes: K and V of an item's range once. Work: two products of [64, Dk or Dv] x columns a tile. Bound by memory where
// columns are few (decode), by the products where they are many (prefill).

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/host/runtime/arena.hpp"
#include "kernels/host/simd/cached_rows.hpp"
#include "kernels/host/simd/loops.hpp"
#include "kernels/interface/kernel_table.hpp"

namespace nsa::host {

constexpr int max_columns = 64;       ///< an item has as many rows as give about this many query columns
constexpr int pv_panel_columns = 64;  ///< columns of V in a panel: the panel stays in L1 while all query columns use it
constexpr int pv_query_columns = 4;   ///< query columns that one product P V takes

/// Padded widths of an item's buffers, in floats.
struct Widths {
  Widths(const LayerShape& s, int rows)
      : columns(static_cast<int>(round_up(std::int64_t{rows} * s.heads_per_group, simd_lanes))),
        v(static_cast<int>(round_up(s.d_v, simd_lanes))) {}
  int columns;  ///< query columns, column = row * h + head, padded
  int v;        ///< Dv, padded
};

/// Query rows of a work item.
inline int item_rows(const LayerShape& s, const QueryTile& tile) {
  return std::clamp(max_columns / s.heads_per_group, 1, tile.tokens);
}

/// Online softmax state of every query column over some K/V rows: maximum m, s = sum exp(score - m), and
/// o = sum exp(score - m) v, unnormalised.
struct SoftmaxState {
  float *m, *s;  ///< [columns]
  float* o;      ///< [columns][v]
  SoftmaxState(Arena& arena, const Widths& w)
      : m(arena.allocate<float>(w.columns)),
        s(arena.allocate<float>(w.columns)),
        o(arena.allocate<float>(w.columns * w.v)) {}
  void clear(const Widths& w, bool with_o) {
    std::fill_n(m, w.columns, neg_inf);
    std::fill_n(s, w.columns, 0.0f);
    if (with_o) std::fill_n(o, w.columns * w.v, 0.0f);
  }
};

/// Rows [row, row + rows) of sequence b of the query tile and one group, at positions t0, t0 + 1, …
struct WorkItem {
  std::int32_t b, g, row, rows;
  std::int64_t t0;
  std::int64_t plane;     ///< of the K/V views
  std::int64_t tile_row;  ///< index of the first row in the query tile
};

/// One thread's buffers.
struct ThreadBuffers {
  ThreadBuffers(Arena& arena, const LayerShape& s, const Widths& w)
      : queries(arena.allocate<float>(std::int64_t{s.d_k} * w.columns)),
        k(arena.allocate<float>(std::int64_t{kv_tile_tokens} * s.d_k)),
        v(arena.allocate<float>(std::int64_t{kv_tile_tokens} * w.v)),
        scores(arena.allocate<float>(std::int64_t{kv_tile_tokens} * w.columns)),
        m(arena.allocate<float>(w.columns)),
        s(arena.allocate<float>(w.columns)),
        scale_prev(arena.allocate<float>(w.columns)),
        scale_new(arena.allocate<float>(w.columns)),
        column_begin(arena.allocate<std::int32_t>(w.columns)),
        column_end(arena.allocate<std::int32_t>(w.columns)),
        partial(arena, w),
        total(arena, w) {}
  float* queries;                           ///< [Dk][columns], scaled by 1/sqrt(Dk)
  float *k, *v;                             ///< a KV tile in fp32: [64][Dk], [64][v]
  float* scores;                            ///< [64][columns]
  float *m, *s;                             ///< of a KV tile, [columns]
  float *scale_prev, *scale_new;            ///< rescale factors of a merge, [columns]
  std::int32_t *column_begin, *column_end;  ///< tokens of the tile that a column attends: [begin, end)
  SoftmaxState partial, total;              ///< of one split; of all
  std::int64_t tokens_read = 0;             ///< by the current item
};

/// K/V rows contiguous in memory.
struct KvTile {
  std::int64_t first;  ///< position, or compressed token
  int tokens;          ///< <= 64
  CachedRows k, v;
  CachedRows next_k = {};  ///< as many K rows that this thread reads next
};

/// Q K^T of a KV tile in buffers.scores [tokens][columns].
void score_tile(const LayerShape& s, const Widths& w, ThreadBuffers& buffers, const KvTile& kv_tile);

/// Online softmax and P V of a scored KV tile into `state`: row r of the item attends the tokens [begin(r), end(r)).
/// Adds the tokens read to buffers.tokens_read.
template <class Begin, class End>
void attend_tile(const LayerShape& s, const Widths& w, ThreadBuffers& buffers, const KvTile& kv_tile,
                 const WorkItem& item, SoftmaxState& state, bool with_o, Begin&& begin, End&& end);

/// The first run of held, contiguous rows in [i, end), at most 64 long. tokens = 0: none.
struct RowRun {
  std::int64_t first = 0;
  int tokens = 0;
};
RowRun next_run(const KvView& view, std::int64_t i, std::int64_t end);

/// K and V of a run.
KvTile kv_tile_of(DType type, const KvView& k, const KvView& v, std::int64_t plane, const RowRun& run);

/// Calls `body(run)` for every run of held rows in [begin, end).
template <class Body>
void for_each_run(const KvView& view, std::int64_t begin, std::int64_t end, Body&& body) {
  for (RowRun run = next_run(view, begin, end); run.tokens > 0; run = next_run(view, run.first + run.tokens, end))
    body(run);
}

/// Attends split `index` of the item into the cleared state.
using SplitFunction = void (*)(const AttendArgs&, const Widths&, ThreadBuffers&, const WorkItem&, int index,
                               SoftmaxState&);
/// Runs all splits of all items. Writes args.out, adds to args.reads.
void attend_splits(const AttendArgs& args, int rows_per_item, int splits, SplitFunction attend_split);

/// Bytes of scratch that attend_splits takes.
std::size_t attend_scratch(const LayerShape& s, const QueryTile& tile, int rows_per_item, int splits);

/// Splits of an item.
int cmp_splits(const LayerShape& s, const QueryTile& tile);
int win_splits(const LayerShape& s, const QueryTile& tile);

// attention/sdpa.cpp
void attend_cmp_sdpa(const AttendArgs& args, Stream*);
void attend_sel_sdpa(const AttendArgs& args, Stream*);
void attend_win_sdpa(const AttendArgs& args, Stream*);
void attend_sel_masked(const AttendArgs& args, Stream*);
void attend_win_masked(const AttendArgs& args, Stream*);
std::size_t sdpa_scratch(const LayerShape& s, const QueryTile& tile);    ///< of any branch
std::size_t masked_scratch(const LayerShape& s, const QueryTile& tile);  ///< of either branch
bool masked_accepts(const LayerShape& s, const QueryTile& tile);

// Parts of several implementations.
/// Item `index` of work_items().
WorkItem work_item_of(const AttendArgs& args, int rows_per_item, std::int64_t index);
/// Number of work items of a query tile.
std::int64_t work_items(const LayerShape& s, const QueryTile& tile, int rows_per_item);
/// q of the item as [Dk][columns], scaled, in buffers.queries.
void load_queries(const AttendArgs& args, const Widths& w, const WorkItem& item, ThreadBuffers& buffers);
/// Stores buffers.scores of `tokens` tokens in args.scores, from `slot` on.
void store_scores(const AttendArgs& args, const Widths& w, const ThreadBuffers& buffers, const WorkItem& item,
                  std::int64_t slot, int tokens);
/// Stores (m, s) of the item's columns at bucket slot `slot` of args.lse.
void store_lse_bucket(const AttendArgs& args, const WorkItem& item, std::int64_t slot, const SoftmaxState& state);
/// Positions of the row's selected block `index`, up to the row's own position; empty where another rank holds them.
RowRun selected_block(const AttendArgs& args, const WorkItem& item, int index);

void attend_cmp(const AttendArgs& args, Stream*);
void attend_sel_direct(const AttendArgs& args, Stream*);
/// attend_sel_direct of many rows: the rows that selected a block attend it as columns of one tile.
void attend_sel_shared(const AttendArgs& args, Stream*);
void attend_win(const AttendArgs& args, Stream*);
std::size_t attend_shared_scratch(const LayerShape& s, const QueryTile& tile);

/// V of a KV tile in fp32: [tokens][w.v], padded with zeros.
void load_values(const LayerShape& s, const Widths& w, const KvTile& kv_tile, float* v);

/// attend_tile with the token ranges in buffers.column_begin and .column_end; `mask`: some range is not the whole tile.
void softmax_and_accumulate(const LayerShape& s, const Widths& w, ThreadBuffers& buffers, const KvTile& kv_tile,
                            int columns, bool mask, SoftmaxState& state, bool with_o);

template <class Begin, class End>
void attend_tile(const LayerShape& s, const Widths& w, ThreadBuffers& buffers, const KvTile& kv_tile,
                 const WorkItem& item, SoftmaxState& state, bool with_o, Begin&& begin, End&& end) {
  bool mask = false;
  for (int r = 0; r < item.rows; ++r) {
    const std::int64_t n = kv_tile.tokens;
    const auto lo = static_cast<std::int32_t>(std::clamp<std::int64_t>(begin(r) - kv_tile.first, 0, n));
    const auto hi = static_cast<std::int32_t>(std::clamp<std::int64_t>(end(r) - kv_tile.first, lo, n));
    mask = mask || lo > 0 || hi < n;
    std::fill_n(buffers.column_begin + r * s.heads_per_group, s.heads_per_group, lo);
    std::fill_n(buffers.column_end + r * s.heads_per_group, s.heads_per_group, hi);
    buffers.tokens_read += hi - lo;
  }
  softmax_and_accumulate(s, w, buffers, kv_tile, item.rows * s.heads_per_group, mask, state, with_o);
}

}  // namespace nsa::host
