// Online softmax and P V of one KV tile, and the loop over work items and splits; see the header.

#include "kernels/host/attention/split_attention.hpp"

namespace nsa::host {
namespace {

void merge_states(const Widths& w, int columns, ThreadBuffers& buffers, SoftmaxState& into, const SoftmaxState& from,
                  bool with_o) {
  merge_softmax_columns(w.columns, into.m, into.s, from.m, from.s, buffers.scale_prev, buffers.scale_new);
  if (!with_o) return;
  for (int c = 0; c < columns; ++c)
    rescale_and_add(w.v, buffers.scale_prev[c], into.o + std::int64_t{c} * w.v, buffers.scale_new[c],
                    from.o + std::int64_t{c} * w.v);
}

void store_partials(const AttendArgs& args, const Widths& w, const WorkItem& item, const SoftmaxState& state) {
  const LayerShape& s = args.shape;
  for (int r = 0; r < item.rows; ++r) {
    for (int j = 0; j < s.heads_per_group; ++j) {
      const int c = r * s.heads_per_group + j;
      const std::int64_t head = (item.tile_row + r) * s.heads() + item.g * s.heads_per_group + j;
      args.out.ms[head * 2] = state.m[c];
      args.out.ms[head * 2 + 1] = state.s[c];
      std::memcpy(args.out.o + head * s.d_v, state.o + std::int64_t{c} * w.v, sizeof(float) * s.d_v);
    }
  }
}

/// Whether the splits of an item run on several threads: with fewer items than keep the threads busy. The states of all
/// splits are then kept until they merge.
bool splits_kv(std::int64_t items, int splits) { return threads() > 1 && splits > 1 && items < 4 * threads(); }

/// Prefetches `count` rows of `width` values from the row `first` on; nothing where there are none. May run past the
/// array: a prefetch never faults.
void prefetch_rows(DType type, const CachedRows& rows, std::int64_t first, std::int64_t count, std::int64_t width) {
  if (!rows.data) return;
  const char* begin = static_cast<const char*>(advanced(type, rows, first, width).data);
  const char* end = static_cast<const char*>(advanced(type, rows, first + count, width).data);
  for (; begin < end; begin += 64) __builtin_prefetch(begin, 0, 3);
}

/// Whether P V prefetches the next K. With few heads P V is too short to hide the latency, and Q K^T prefetches both.
bool prefetches_next_k_in_pv(const LayerShape& s) { return s.heads_per_group > 8; }

void add_reads(const AttendArgs& args, const WorkItem& item, const ThreadBuffers& buffers) {
  std::int64_t& reads = args.reads[std::int64_t{item.b} * args.shape.groups + item.g];
#pragma omp atomic
  reads += buffers.tokens_read;
}

}  // namespace

void load_queries(const AttendArgs& args, const Widths& w, const WorkItem& item, ThreadBuffers& buffers) {
  const LayerShape& s = args.shape;
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.d_k));
  std::fill_n(buffers.queries, std::int64_t{s.d_k} * w.columns, 0.0f);
  for (int r = 0; r < item.rows; ++r) {
    for (int j = 0; j < s.heads_per_group; ++j) {
      const std::int64_t head = (item.tile_row + r) * s.heads() + item.g * s.heads_per_group + j;
      load(s.dtype, s.d_k, at(s.dtype, args.q, head * s.d_k), buffers.k);
      float* column = buffers.queries + r * s.heads_per_group + j;
      for (int e = 0; e < s.d_k; ++e) column[e * w.columns] = buffers.k[e] * scale;
    }
  }
  std::fill_n(buffers.column_begin, w.columns, 0);
  std::fill_n(buffers.column_end, w.columns, 0);
  buffers.tokens_read = 0;
}

WorkItem work_item_of(const AttendArgs& args, int rows_per_item, std::int64_t index) {
  const QueryTile& tile = args.tile;
  const std::int64_t blocks = (tile.tokens + rows_per_item - 1) / rows_per_item;
  WorkItem item;
  const auto block = static_cast<std::int32_t>(index % blocks);
  item.g = static_cast<std::int32_t>(index / blocks % args.shape.groups);
  item.b = static_cast<std::int32_t>(index / blocks / args.shape.groups);
  item.row = block * rows_per_item;
  item.rows = std::min(rows_per_item, tile.tokens - item.row);
  item.t0 = first_position(tile, item.b) + item.row;
  item.plane = std::int64_t{tile.batch_begin + item.b} * args.shape.groups + item.g;
  item.tile_row = std::int64_t{item.b} * tile.tokens + item.row;
  return item;
}

std::int64_t work_items(const LayerShape& s, const QueryTile& tile, int rows_per_item) {
  return std::int64_t{tile.batches} * s.groups * ((tile.tokens + rows_per_item - 1) / rows_per_item);
}

RowRun next_run(const KvView& view, std::int64_t i, std::int64_t end) {
  const RowMap& map = view.map;
  const auto bounded = [&](std::int64_t stop) {
    return RowRun{i, static_cast<int>(std::min({stop, end, i + kv_tile_tokens}) - i)};
  };
  if (map.ring > 0) {
    while (i < end && !has_row(map, i)) {
      const std::int64_t slot = i % map.ring;
      i += slot < map.slot_begin ? map.slot_begin - slot : map.ring - slot;
    }
    if (i >= end) return {};
    const std::int64_t slot = i % map.ring;
    return bounded(i + std::min(map.slot_end, map.ring) - slot);
  }
  if (i >= end) return {};
  std::int64_t c = chunk_of(map, i);
  while (!has_chunk(map, c)) {
    i = ++c * map.chunk;
    if (i >= end) return {};
  }
  const std::int64_t chunk_end = map.chunk > end ? end : (c + 1) * map.chunk;
  if (!view.pages.pages) return bounded(chunk_end);
  const std::int64_t in_page = row_in_chunk(map, c, i) % view.pages.rows;
  return bounded(std::min(chunk_end, i + view.pages.rows - in_page));
}

KvTile kv_tile_of(DType type, const KvView& k, const KvView& v, std::int64_t plane, const RowRun& run) {
  return {run.first, run.tokens, cached_rows(type, k, plane, run.first), cached_rows(type, v, plane, run.first)};
}

/// Slices of 8 rows: the arithmetic of one takes a few hundred nanoseconds, which hide the prefetch of the rows that
/// come next, V of this tile and K of the next.
void score_tile(const LayerShape& s, const Widths& w, ThreadBuffers& buffers, const KvTile& kv_tile) {
  constexpr int slice_rows = 8;
  for (int t = 0; t < kv_tile.tokens; t += slice_rows) {
    const int n = std::min(slice_rows, kv_tile.tokens - t);
    prefetch_rows(s.dtype, kv_tile.v, t, n, s.d_v);
    if (!prefetches_next_k_in_pv(s)) prefetch_rows(s.dtype, kv_tile.next_k, t, n, s.d_k);
    load_rows(s.dtype, n, s.d_k, advanced(s.dtype, kv_tile.k, t, s.d_k), buffers.k);
    product(n, w.columns, s.d_k, buffers.k, s.d_k, 1, buffers.queries, w.columns, buffers.scores + t * w.columns,
            w.columns);
  }
}

void load_values(const LayerShape& s, const Widths& w, const KvTile& kv_tile, float* v) {
  if (s.d_v == w.v) return load_rows(s.dtype, kv_tile.tokens, s.d_v, kv_tile.v, v);
  for (int t = 0; t < kv_tile.tokens; ++t) {
    load_rows(s.dtype, 1, s.d_v, advanced(s.dtype, kv_tile.v, t, s.d_v), v + t * w.v);
    std::fill(v + t * w.v + s.d_v, v + (t + 1) * w.v, 0.0f);
  }
}

void softmax_and_accumulate(const LayerShape& s, const Widths& w, ThreadBuffers& buffers, const KvTile& kv_tile,
                            int columns, bool mask, SoftmaxState& state, bool with_o) {
  if (mask) mask_columns(kv_tile.tokens, w.columns, buffers.scores, buffers.column_begin, buffers.column_end);
  softmax_columns(kv_tile.tokens, w.columns, buffers.scores, buffers.m, buffers.s);
  merge_softmax_columns(w.columns, state.m, state.s, buffers.m, buffers.s, buffers.scale_prev, buffers.scale_new);
  if (!with_o) return;
  load_values(s, w, kv_tile, buffers.v);
  const int column_groups = (columns + pv_query_columns - 1) / pv_query_columns;
  const int slices = column_groups * ((w.v + pv_panel_columns - 1) / pv_panel_columns);
  for (int slice = 0; slice < slices; ++slice) {
    const int e = slice / column_groups * pv_panel_columns, c = slice % column_groups * pv_query_columns;
    const int begin = kv_tile.tokens * slice / slices, end = kv_tile.tokens * (slice + 1) / slices;
    if (prefetches_next_k_in_pv(s)) prefetch_rows(s.dtype, kv_tile.next_k, begin, end - begin, s.d_k);
    product_rescale_add(std::min(pv_query_columns, columns - c), std::min(pv_panel_columns, w.v - e), kv_tile.tokens,
                        buffers.scores + c, 1, w.columns, buffers.v + e, w.v, state.o + std::int64_t{c} * w.v + e, w.v,
                        buffers.scale_prev + c, buffers.scale_new + c);
  }
}

std::size_t attend_scratch(const LayerShape& s, const QueryTile& tile, int rows_per_item, int splits) {
  Arena arena;
  const Widths w(s, rows_per_item);
  for (int t = 0; t < threads(); ++t) ThreadBuffers(arena, s, w);
  const std::int64_t items = work_items(s, tile, rows_per_item);
  if (splits_kv(items, splits))
    for (std::int64_t i = 0; i < items * splits; ++i) SoftmaxState(arena, w);
  return arena.used();
}

void attend_splits(const AttendArgs& args, int rows_per_item, int splits, SplitFunction attend_split) {
  const Widths w(args.shape, rows_per_item);
  const std::int64_t items = work_items(args.shape, args.tile, rows_per_item);
  const bool split_kv = splits_kv(items, splits), with_o = !args.scores_only;
  Arena arena(args.scratch, args.scratch_bytes);
  std::vector<ThreadBuffers> thread_buffers;
  for (int t = 0; t < threads(); ++t) thread_buffers.emplace_back(arena, args.shape, w);
  std::vector<SoftmaxState> states;
  if (split_kv)
    for (std::int64_t i = 0; i < items * splits; ++i) states.emplace_back(arena, w);

#pragma omp parallel
  {
    ThreadBuffers& buffers = thread_buffers[omp_get_thread_num()];
    if (split_kv) {
      std::int64_t loaded = -1;  // the item whose queries are in the buffers
      // Guided: a thread gets consecutive splits, so that it reads the rows it has prefetched.
#pragma omp for schedule(guided)
      for (std::int64_t i = 0; i < items * splits; ++i) {
        const WorkItem item = work_item_of(args, rows_per_item, i / splits);
        if (i / splits != loaded) load_queries(args, w, item, buffers);
        loaded = i / splits;
        buffers.tokens_read = 0;
        states[i].clear(w, with_o);
        attend_split(args, w, buffers, item, static_cast<int>(i % splits), states[i]);
        add_reads(args, item, buffers);
      }
    }
#pragma omp for schedule(dynamic)
    for (std::int64_t i = 0; i < items; ++i) {
      const WorkItem item = work_item_of(args, rows_per_item, i);
      const int columns = item.rows * args.shape.heads_per_group;
      if (!split_kv) load_queries(args, w, item, buffers);
      buffers.total.clear(w, true);
      for (int p = 0; p < splits; ++p) {
        SoftmaxState& state = split_kv ? states[i * splits + p] : buffers.partial;
        if (!split_kv) {
          state.clear(w, with_o);
          attend_split(args, w, buffers, item, p, state);
        }
        merge_states(w, columns, buffers, buffers.total, state, with_o);
      }
      store_partials(args, w, item, buffers.total);
      if (!split_kv) add_reads(args, item, buffers);
    }
  }
}

}  // namespace nsa::host
