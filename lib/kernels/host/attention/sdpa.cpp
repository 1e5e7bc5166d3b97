// Attention by dense matrix products: Q K^T of all tokens an item attends, softmax, P V, one after the other, with all
// of P kept in between. `sdpa` first packs the selected tokens of the selected branch and takes the other branches'
// tokens in place; `masked` multiplies with every token and masks.
//
// Tiling: Q K^T and softmax run by (item, tile of up to 64 tokens), P V by (item, panel of 64 columns of V), so that
// few items use all threads. P is relative to its tile's maximum until P V rescales each tile: every element is formed
// in one order, whatever the threads and the kv layout.
//
// Bytes: K once, V once (a panel at a time), P written once and read once a panel. Bound by the products in prefill, by
// memory in decode.

#include "kernels/host/attention/score_layout.hpp"
#include "kernels/host/attention/split_attention.hpp"

namespace nsa::host {
namespace {

/// Contiguous tokens, as rows of the item's P.
struct ScoreTile {
  RowRun run;
  std::int64_t row = 0;    ///< first row in P
  std::int64_t block = 0;  ///< cmp: LSE segment; sel: selection block
  bool halo = false;       ///< cmp: scored only
};

using TokenRange = std::pair<std::int64_t, std::int64_t>;  ///< [first, second)

/// How a branch and implementation differ: the tiles of an item, the tokens a row attends.
struct Variant {
  std::vector<ScoreTile> (*tiles)(const AttendArgs&, const WorkItem&);
  /// Tokens that row r of the item attends; those outside of the tile do not matter.
  TokenRange (*range)(const AttendArgs&, const WorkItem&, const ScoreTile&, int r);
  bool compressed = false, packed = false;
};

/// A work item with its tiles and buffers.
struct DenseItem {
  WorkItem item;
  std::vector<ScoreTile> tiles;
  float *queries, *p, *m, *s;  ///< [Dk][columns], [tokens][columns], [tile][columns] each
  void *k, *v;                 ///< packed: [tokens][Dk], [tokens][Dv]
  DenseItem(Arena& arena, const LayerShape& shape, const Widths& w, std::int64_t tokens, std::int64_t max_tiles,
            bool packs)
      : queries(arena.allocate<float>(std::int64_t{shape.d_k} * w.columns)),
        p(arena.allocate<float>(tokens * w.columns)),
        m(arena.allocate<float>(max_tiles * w.columns)),
        s(arena.allocate<float>(max_tiles * w.columns)),
        k(arena.allocate<float>(packs ? tokens * shape.d_k : 0)),
        v(arena.allocate<float>(packs ? tokens * shape.d_v : 0)) {}
};

void add_tiles(const KvView& view, std::int64_t begin, std::int64_t end, std::int64_t block, bool halo,
               std::vector<ScoreTile>& tiles) {
  for_each_run(view, begin, end, [&](const RowRun& run) { tiles.push_back({run, 0, block, halo}); });
}

std::vector<ScoreTile> compressed_tiles(const AttendArgs& args, const WorkItem& item) {
  const LayerShape& s = args.shape;
  const RowMap& map = args.k.map;
  const bool all = holds_all_chunks(map);
  const std::int64_t valid = compressed_tokens(s.rules, item.t0 + item.rows - 1), halo = all ? 0 : map.halo;
  std::vector<ScoreTile> tiles;
  for (std::int64_t segment = all ? 0 : map.rank; segment * s.lse.segment - halo < valid; segment += all ? 1 : map.kv) {
    const std::int64_t begin = segment * s.lse.segment;
    for (std::int64_t i = std::max<std::int64_t>(0, begin - halo); i < std::min(begin, valid); i += kv_tile_tokens) {
      const std::int64_t n = std::min<std::int64_t>(kv_tile_tokens, std::min(begin, valid) - i);
      if (halo > 0) tiles.push_back({{i, static_cast<int>(n)}, 0, segment, true});
    }
    add_tiles(args.k, begin, std::min(begin + s.lse.segment, valid), segment, false, tiles);
  }
  return tiles;
}

std::vector<ScoreTile> window_tiles(const AttendArgs& args, const WorkItem& item) {
  std::vector<ScoreTile> tiles;
  add_tiles(args.k, window_begin(args.shape.rules, item.t0), item.t0 + item.rows, 0, false, tiles);
  return tiles;
}

std::vector<ScoreTile> selected_tiles(const AttendArgs& args, const WorkItem& item) {
  std::vector<ScoreTile> tiles;
  for (int i = 0; i < args.shape.rules.n_sel; ++i) {
    const RowRun block = selected_block(args, item, i);
    add_tiles(args.k, block.first, block.first + block.tokens, block.first / args.shape.rules.l_sel, false, tiles);
  }
  return tiles;
}

/// All tokens up to the item's last row, no tile across a selection block; of a ring the tokens it holds.
std::vector<ScoreTile> all_tiles(const AttendArgs& args, const WorkItem& item) {
  if (args.k.map.ring > 0) return window_tiles(args, item);
  std::vector<ScoreTile> tiles;
  const std::int64_t end = item.t0 + item.rows, l = args.shape.rules.l_sel;
  for (std::int64_t j = 0; j * l < end; ++j) add_tiles(args.k, j * l, std::min((j + 1) * l, end), j, false, tiles);
  return tiles;
}

TokenRange compressed_range(const AttendArgs& args, const WorkItem& item, const ScoreTile&, int r) {
  return {0, compressed_tokens(args.shape.rules, item.t0 + r)};
}
TokenRange window_range(const AttendArgs& args, const WorkItem& item, const ScoreTile&, int r) {
  return {window_begin(args.shape.rules, item.t0 + r), item.t0 + r + 1};
}
TokenRange causal_range(const AttendArgs&, const WorkItem& item, const ScoreTile&, int r) {
  return {0, item.t0 + r + 1};
}
TokenRange selected_range(const AttendArgs& args, const WorkItem& item, const ScoreTile& tile, int r) {
  const std::int32_t n = args.shape.rules.n_sel;
  const std::int32_t* selected = args.selected + ((item.tile_row + r) * args.shape.groups + item.g) * n;
  return {0, std::find(selected, selected + n, tile.block) == selected + n ? 0 : item.t0 + r + 1};
}

constexpr Variant sdpa_variants[branches] = {{compressed_tiles, compressed_range, true, false},
                                             {selected_tiles, causal_range, false, true},
                                             {window_tiles, window_range, false, false}};
constexpr Variant masked_variants[branches] = {{nullptr, nullptr, false, false},
                                               {all_tiles, selected_range, false, false},
                                               {all_tiles, window_range, false, false}};

/// K and V of a tile; a halo's K from the copies in front of the tile's chunk.
KvTile kv_tile_at(const AttendArgs& args, const DenseItem& dense, const ScoreTile& tile) {
  const DType type = args.shape.dtype;
  if (!tile.halo) return kv_tile_of(type, args.k, args.v, dense.item.plane, tile.run);
  return {tile.run.first, tile.run.tokens, cached_rows(type, args.k, dense.item.plane, tile.block, tile.run.first), {}};
}

/// Copies rows as storage type, which holds a quantised value exactly; `values` has room for the rows in fp32.
CachedRows pack_rows(DType type, std::int64_t count, std::int64_t width, const CachedRows& from, void* to,
                     float* values) {
  if (from.scales) {
    load_rows(type, count, width, from, values);
    store(type, count * width, values, to);
  } else {
    std::memcpy(to, from.data, count * width * size_of(type));
  }
  return {to};
}

KvTile pack(const LayerShape& s, const ThreadBuffers& buffers, const DenseItem& dense, const ScoreTile& tile,
            const KvTile& from) {
  void *k = at(s.dtype, dense.k, tile.row * s.d_k), *v = at(s.dtype, dense.v, tile.row * s.d_v);
  return {from.first, from.tokens, pack_rows(s.dtype, tile.run.tokens, s.d_k, from.k, k, buffers.k),
          pack_rows(s.dtype, tile.run.tokens, s.d_v, from.v, v, buffers.v)};
}

/// Q K^T of a tile and its softmax relative to the tile's maximum.
void softmax_tile(const AttendArgs& args, const Variant& variant, const Widths& w, const ThreadBuffers& own,
                  const DenseItem& dense, std::int64_t index) {
  const LayerShape& s = args.shape;
  const ScoreTile& tile = dense.tiles[index];
  const int n = tile.run.tokens, h = s.heads_per_group;
  ThreadBuffers buffers = own;  // but queries and P of the item
  buffers.queries = dense.queries;
  if (!tile.halo) buffers.scores = dense.p + tile.row * w.columns;
  KvTile kv_tile = kv_tile_at(args, dense, tile);
  if (variant.packed) kv_tile = pack(s, buffers, dense, tile, kv_tile);
  score_tile(s, w, buffers, kv_tile);
  if (variant.compressed)
    store_scores(args, w, buffers, dense.item, score_slot(args.k.map, tile.block, tile.run.first), n);
  if (tile.halo) return;
  std::int64_t read = 0;
  std::fill_n(buffers.column_begin, w.columns, 0);
  std::fill_n(buffers.column_end, w.columns, 0);
  for (int r = 0; r < dense.item.rows; ++r) {
    const auto [begin, end] = variant.range(args, dense.item, tile, r);
    const auto low = static_cast<std::int32_t>(std::clamp<std::int64_t>(begin - tile.run.first, 0, n));
    const auto high = static_cast<std::int32_t>(std::clamp<std::int64_t>(end - tile.run.first, low, n));
    std::fill_n(buffers.column_begin + r * h, h, low);
    std::fill_n(buffers.column_end + r * h, h, high);
    read += high - low;
  }
  mask_columns(n, w.columns, buffers.scores, buffers.column_begin, buffers.column_end);
  softmax_columns(n, w.columns, buffers.scores, dense.m + index * w.columns, dense.s + index * w.columns);
  std::int64_t& reads = args.reads[std::int64_t{dense.item.b} * s.groups + dense.item.g];
#pragma omp atomic
  reads += read;
}

void merge_tiles(const Widths& w, ThreadBuffers& buffers, const DenseItem& dense, SoftmaxState& into,
                 std::int64_t bucket, std::int64_t buckets) {
  for (std::size_t i = 0; i < dense.tiles.size(); ++i)
    if (!dense.tiles[i].halo && (buckets == 1 || dense.tiles[i].block % buckets == bucket))
      merge_softmax_columns(w.columns, into.m, into.s, dense.m + i * w.columns, dense.s + i * w.columns,
                            buffers.scale_prev, buffers.scale_new);
}

/// (m, s) of all tiles in buffers.total. With `write`, also stores the LSE buckets of the compressed scores.
void merge_statistics(const AttendArgs& args, const Variant& variant, const Widths& w, ThreadBuffers& buffers,
                      const DenseItem& dense, bool write) {
  buffers.total.clear(w, false);
  if (!variant.compressed) return merge_tiles(w, buffers, dense, buffers.total, 0, 1);
  const RowMap& map = args.k.map;
  const int stride = holds_all_chunks(map) ? 1 : map.kv;
  for (int bucket = stride == 1 ? 0 : map.rank; bucket < args.shape.lse.buckets; bucket += stride) {
    buffers.partial.clear(w, false);
    merge_tiles(w, buffers, dense, buffers.partial, bucket, args.shape.lse.buckets);
    if (write) store_lse_bucket(args, dense.item, bucket / stride, buffers.partial);
    merge_softmax_columns(w.columns, buffers.total.m, buffers.total.s, buffers.partial.m, buffers.partial.s,
                          buffers.scale_prev, buffers.scale_new);
  }
}

/// The columns [e, e + count) of a row to fp32.
void load_columns(DType type, int e, int count, const CachedRows& row, float* to) {
  if (row.scales) return load_quantised(1, count, static_cast<const std::uint8_t*>(row.data) + e, row.scales, to);
  load(type, count, at(type, row.data, e), to);
}

/// O = P V for the columns [e, e + pv_panel_columns) of V.
void accumulate_pv(const AttendArgs& args, const Variant& variant, const Widths& w, ThreadBuffers& buffers,
                   const DenseItem& dense, int e) {
  const LayerShape& s = args.shape;
  const int columns = dense.item.rows * s.heads_per_group, width = std::min(pv_panel_columns, w.v - e),
            valid = std::min(pv_panel_columns, s.d_v - e);
  for (int c = 0; c < columns; ++c) std::fill_n(buffers.total.o + std::int64_t{c} * w.v + e, width, 0.0f);
  for (std::size_t i = 0; i < dense.tiles.size() && !args.scores_only; ++i) {
    const ScoreTile& tile = dense.tiles[i];
    if (tile.halo) continue;
    const CachedRows v =
        variant.packed ? CachedRows{at(s.dtype, dense.v, tile.row * s.d_v)} : kv_tile_at(args, dense, tile).v;
    for (int t = 0; t < tile.run.tokens; ++t) {
      load_columns(s.dtype, e, valid, advanced(s.dtype, v, t, s.d_v), buffers.v + t * w.v);
      std::fill(buffers.v + t * w.v + valid, buffers.v + t * w.v + width, 0.0f);
    }
    for (int c = 0; c < columns; ++c) {
      const float m = dense.m[i * w.columns + c];
      buffers.scale_prev[c] = 1.0f;
      buffers.scale_new[c] = std::isinf(m) ? 0.0f : exponential(m - buffers.total.m[c]);
    }
    for (int c = 0; c < columns; c += pv_query_columns)
      product_rescale_add(std::min(pv_query_columns, columns - c), width, tile.run.tokens,
                          dense.p + tile.row * w.columns + c, 1, w.columns, buffers.v, w.v,
                          buffers.total.o + std::int64_t{c} * w.v + e, w.v, buffers.scale_prev + c,
                          buffers.scale_new + c);
  }
}

void store_panel(const AttendArgs& args, const Widths& w, const ThreadBuffers& buffers, const DenseItem& dense, int e) {
  const LayerShape& s = args.shape;
  for (int r = 0; r < dense.item.rows; ++r) {
    for (int j = 0; j < s.heads_per_group; ++j) {
      const int c = r * s.heads_per_group + j;
      const std::int64_t head = (dense.item.tile_row + r) * s.heads() + dense.item.g * s.heads_per_group + j;
      std::copy_n(buffers.total.o + std::int64_t{c} * w.v + e, std::min(pv_panel_columns, s.d_v - e),
                  args.out.o + head * s.d_v + e);
      args.out.ms[head * 2] = buffers.total.m[c];
      args.out.ms[head * 2 + 1] = buffers.total.s[c];
    }
  }
}

/// Sizes of an item's buffers, from the shape alone.
struct Extent {
  int rows;                        ///< of an item
  std::int64_t tokens, max_tiles;  ///< of an item
  bool packs;
};

/// Bound on the tiles of `tokens` tokens: a tile ends with a chunk, a selection block or a ring (`unit` tokens), and
/// after 64 tokens.
std::int64_t max_tiles_of(std::int64_t tokens, std::int64_t unit) {
  return (tokens / unit + 4) * ((unit - 1) / kv_tile_tokens + 1) + 2;
}

Extent extent_of(Branch branch, bool masked, const LayerShape& s, const QueryTile& tile) {
  const std::int64_t positions = std::max<std::int64_t>(tile.max_positions, 1);
  const int rows = item_rows(s, tile);
  if (masked) return {rows, positions, max_tiles_of(positions, s.rules.l_sel), false};
  if (branch == cmp) {
    const std::int64_t tokens = compressed_tokens(s.rules, positions - 1);
    return {rows, tokens, 2 * max_tiles_of(tokens, s.lse.segment) + max_tiles_of(tokens, s.lse.segment), false};
  }
  if (branch == win) {
    const std::int64_t tokens = std::min<std::int64_t>(s.rules.w + rows - 1, positions);
    return {rows, tokens, max_tiles_of(tokens, std::min<std::int64_t>(s.lse.segment * s.rules.d, positions)), false};
  }
  const std::int64_t tokens = std::int64_t{s.rules.n_sel} * s.rules.l_sel;
  return {1, tokens, s.rules.n_sel * ((s.rules.l_sel - 1) / kv_tile_tokens + 1), true};
}

std::size_t scratch_of(Branch branch, bool masked, const LayerShape& s, const QueryTile& tile) {
  const Extent extent = extent_of(branch, masked, s, tile);
  const Widths w(s, extent.rows);
  Arena arena;
  for (int t = 0; t < threads(); ++t) {
    ThreadBuffers(arena, s, w);
    DenseItem(arena, s, w, extent.tokens, extent.max_tiles, extent.packs);
  }
  return arena.used();
}

/// Numbers the rows of P of every tile; returns (item, tile) of all tiles.
std::vector<std::pair<int, int>> number_tiles(std::vector<DenseItem>& dense_items, int count, const Extent& extent) {
  std::vector<std::pair<int, int>> all;
  for (int i = 0; i < count; ++i) {
    std::int64_t row = 0;
    for (ScoreTile& tile : dense_items[i].tiles) {
      tile.row = row;
      if (!tile.halo) row += tile.run.tokens;
      all.emplace_back(i, static_cast<int>(&tile - dense_items[i].tiles.data()));
    }
    if (row > extent.tokens || std::ssize(dense_items[i].tiles) > extent.max_tiles)
      throw InternalError("dense attention: more tokens or tiles than its buffers hold");
  }
  return all;
}

void attend(Branch branch, bool masked, const AttendArgs& args) {
  const LayerShape& s = args.shape;
  const Variant& variant = masked ? masked_variants[branch] : sdpa_variants[branch];
  const Extent extent = extent_of(branch, masked, s, args.tile);
  const Widths w(s, extent.rows);
  Arena arena(args.scratch, args.scratch_bytes);
  std::vector<ThreadBuffers> thread_buffers;
  std::vector<DenseItem> dense_items;
  for (int t = 0; t < threads(); ++t) {
    thread_buffers.emplace_back(arena, s, w);
    dense_items.emplace_back(arena, s, w, extent.tokens, extent.max_tiles, extent.packs);
  }
  const std::int64_t items = work_items(s, args.tile, extent.rows);
  const int panels = (w.v + pv_panel_columns - 1) / pv_panel_columns;
  for (std::int64_t first = 0; first < items; first += std::ssize(dense_items)) {
    const int count = static_cast<int>(std::min<std::int64_t>(std::ssize(dense_items), items - first));
#pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < count; ++i) {
      ThreadBuffers buffers = thread_buffers[omp_get_thread_num()];
      dense_items[i].item = work_item_of(args, extent.rows, first + i);
      dense_items[i].tiles = variant.tiles(args, dense_items[i].item);
      buffers.queries = dense_items[i].queries;
      load_queries(args, w, dense_items[i].item, buffers);
    }
    const std::vector<std::pair<int, int>> tiles = number_tiles(dense_items, count, extent);
#pragma omp parallel
    {
      ThreadBuffers& buffers = thread_buffers[omp_get_thread_num()];
#pragma omp for schedule(dynamic, 4)
      for (std::size_t i = 0; i < tiles.size(); ++i)
        softmax_tile(args, variant, w, buffers, dense_items[tiles[i].first], tiles[i].second);
#pragma omp for schedule(dynamic)
      for (int i = 0; i < count * panels; ++i) {
        const DenseItem& dense = dense_items[i / panels];
        const int e = i % panels * pv_panel_columns;
        merge_statistics(args, variant, w, buffers, dense, e == 0);
        accumulate_pv(args, variant, w, buffers, dense, e);
        store_panel(args, w, buffers, dense, e);
      }
    }
  }
}

}  // namespace

std::size_t sdpa_scratch(const LayerShape& s, const QueryTile& tile) {
  return std::max({scratch_of(cmp, false, s, tile), scratch_of(sel, false, s, tile), scratch_of(win, false, s, tile)});
}

std::size_t masked_scratch(const LayerShape& s, const QueryTile& tile) { return scratch_of(sel, true, s, tile); }

bool masked_accepts(const LayerShape& s, const QueryTile& tile) {
  constexpr std::size_t max_thread_bytes = std::size_t{1} << 30;
  return masked_scratch(s, tile) <= max_thread_bytes * threads();
}

void attend_cmp_sdpa(const AttendArgs& args, Stream*) { attend(cmp, false, args); }
void attend_sel_sdpa(const AttendArgs& args, Stream*) { attend(sel, false, args); }
void attend_win_sdpa(const AttendArgs& args, Stream*) { attend(win, false, args); }
void attend_sel_masked(const AttendArgs& args, Stream*) { attend(sel, true, args); }
void attend_win_masked(const AttendArgs& args, Stream*) { attend(win, true, args); }

}  // namespace nsa::host
