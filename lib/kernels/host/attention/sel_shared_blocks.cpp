// Selected branch of many rows: the rows of an item that selected the same block attend it together, as columns of one
// tile, so that a block is loaded and converted once for all of them. A row attends its blocks by rising index and
// forms the sums it would form alone: the result does not depend on how rows are grouped.
//
// Bytes: every selected block once an item. Work: two products of [64, Dk or Dv] x columns a block; bound by that.

#include <vector>

#include "kernels/host/attention/split_attention.hpp"

namespace nsa::host {
namespace {

/// Rows of an item: many, so that they share blocks, but few enough that every thread has items.
int shared_rows(const LayerShape& s, const QueryTile& tile) {
  const std::int64_t balanced = tile.rows() * s.groups / (2 * threads());
  return static_cast<int>(std::min<std::int64_t>(std::clamp<std::int64_t>(balanced, 32, 256), tile.tokens));
}

/// Rows of one tile: as many as give about max_columns columns.
int rows_per_tile(const LayerShape& s) { return std::max(1, max_columns / s.heads_per_group); }

/// One thread's buffers of an item's rows.
struct SharedRowBuffers {
  SharedRowBuffers(Arena& arena, const LayerShape& s, int rows, const Widths& w)
      : tile(arena, s, w),
        queries(arena.allocate<float>(std::int64_t{rows} * s.d_k * s.heads_per_group)),
        m(arena.allocate<float>(std::int64_t{rows} * s.heads_per_group)),
        s(arena.allocate<float>(std::int64_t{rows} * s.heads_per_group)),
        o(arena.allocate<float>(std::int64_t{rows} * s.heads_per_group * w.v)) {}
  ThreadBuffers tile;  ///< buffers of one tile's rows; tile.partial.m and .s hold their states
  float* queries;      ///< [rows][Dk][h], scaled
  float *m, *s;        ///< [rows][h]
  float* o;            ///< [rows][h][v]
};

/// The rows that selected each block, in compressed sparse row form: row[begin[j]] to row[begin[j + 1] - 1] selected j.
struct RowsByBlock {
  void collect(const AttendArgs& args, std::int64_t tile_row, std::int32_t g, int rows, std::int64_t blocks) {
    const std::int32_t n = args.shape.rules.n_sel;
    const auto selected = [&](int r) { return args.selected + ((tile_row + r) * args.shape.groups + g) * n; };
    begin.assign(blocks + 1, 0);
    const auto each = [&](auto&& body) {
      for (int r = 0; r < rows; ++r)
        for (std::int32_t k = 0; k < n; ++k)
          if (selected(r)[k] >= 0) body(selected(r)[k], r);
    };
    each([&](std::int32_t j, int) { ++begin[j + 1]; });
    for (std::int64_t j = 0; j < blocks; ++j) begin[j + 1] += begin[j];
    row.resize(begin[blocks]);
    next.assign(begin.begin(), begin.end());
    each([&](std::int32_t j, int r) { row[next[j]++] = r; });
  }
  std::vector<std::int32_t> begin, next;  ///< [blocks + 1]
  std::vector<int> row;
};

void load_row_queries(const AttendArgs& args, SharedRowBuffers& buffers, const Widths& w, std::int64_t tile_row,
                      std::int32_t g, int rows) {
  const LayerShape& s = args.shape;
  const int h = s.heads_per_group;
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.d_k));
  for (int r = 0; r < rows; ++r) {
    for (int j = 0; j < h; ++j) {
      load(s.dtype, s.d_k, at(s.dtype, args.q, ((tile_row + r) * s.heads() + g * h + j) * s.d_k), buffers.tile.k);
      for (int e = 0; e < s.d_k; ++e)
        buffers.queries[(std::int64_t{r} * s.d_k + e) * h + j] = buffers.tile.k[e] * scale;
    }
  }
  std::fill_n(buffers.m, rows * h, neg_inf);
  std::fill_n(buffers.s, rows * h, 0.0f);
  std::fill_n(buffers.o, std::int64_t{rows} * h * w.v, 0.0f);
  buffers.tile.tokens_read = 0;
}

/// Copies the rows' queries, m and s into the columns of a tile.
void gather_columns(const LayerShape& s, const Widths& w, SharedRowBuffers& buffers, const int* rows, int count) {
  const int h = s.heads_per_group;
  for (int i = 0; i < count; ++i) {
    const float* from = buffers.queries + std::int64_t{rows[i]} * s.d_k * h;
    for (int e = 0; e < s.d_k; ++e) std::copy_n(from + e * h, h, buffers.tile.queries + e * w.columns + i * h);
    std::copy_n(buffers.m + rows[i] * h, h, buffers.tile.partial.m + i * h);
    std::copy_n(buffers.s + rows[i] * h, h, buffers.tile.partial.s + i * h);
  }
}

/// The given rows attend one KV tile of a block, already in tile.k and tile.v.
void attend_rows(const LayerShape& s, SharedRowBuffers& buffers, const KvTile& kv_tile, std::int64_t t0,
                 const int* rows, int count) {
  const int h = s.heads_per_group;
  const Widths w(s, count);
  ThreadBuffers& tile = buffers.tile;
  gather_columns(s, w, buffers, rows, count);
  bool mask = false;
  for (int i = 0; i < count; ++i) {
    const auto end =
        static_cast<std::int32_t>(std::clamp<std::int64_t>(t0 + rows[i] + 1 - kv_tile.first, 0, kv_tile.tokens));
    mask = mask || end < kv_tile.tokens;
    std::fill_n(tile.column_begin + i * h, h, 0);
    std::fill_n(tile.column_end + i * h, h, end);
    tile.tokens_read += end;
  }
  product(kv_tile.tokens, w.columns, s.d_k, tile.k, s.d_k, 1, tile.queries, w.columns, tile.scores, w.columns);
  if (mask) mask_columns(kv_tile.tokens, w.columns, tile.scores, tile.column_begin, tile.column_end);
  softmax_columns(kv_tile.tokens, w.columns, tile.scores, tile.m, tile.s);
  merge_softmax_columns(w.columns, tile.partial.m, tile.partial.s, tile.m, tile.s, tile.scale_prev, tile.scale_new);
  for (int i = 0; i < count; ++i) {
    product_rescale_add(h, w.v, kv_tile.tokens, tile.scores + i * h, 1, w.columns, tile.v, w.v,
                        buffers.o + std::int64_t{rows[i]} * h * w.v, w.v, tile.scale_prev + i * h,
                        tile.scale_new + i * h);
    std::copy_n(tile.partial.m + i * h, h, buffers.m + rows[i] * h);
    std::copy_n(tile.partial.s + i * h, h, buffers.s + rows[i] * h);
  }
}

void store_rows(const AttendArgs& args, const SharedRowBuffers& buffers, const Widths& w, std::int64_t tile_row,
                std::int32_t g, int rows) {
  const LayerShape& s = args.shape;
  for (int r = 0; r < rows; ++r) {
    for (int j = 0; j < s.heads_per_group; ++j) {
      const std::int64_t head = (tile_row + r) * s.heads() + g * s.heads_per_group + j;
      const std::int64_t c = std::int64_t{r} * s.heads_per_group + j;
      args.out.ms[head * 2] = buffers.m[c];
      args.out.ms[head * 2 + 1] = buffers.s[c];
      std::copy_n(buffers.o + c * w.v, s.d_v, args.out.o + head * s.d_v);
    }
  }
}

/// Rows [row, row + rows) of sequence b and one group.
void attend_item(const AttendArgs& args, const Widths& w, SharedRowBuffers& buffers, RowsByBlock& rows_by_block,
                 std::int32_t b, std::int32_t g, int row, int rows) {
  const LayerShape& s = args.shape;
  const std::int64_t t0 = first_position(args.tile, b) + row, tile_row = std::int64_t{b} * args.tile.tokens + row;
  const std::int64_t plane = std::int64_t{args.tile.batch_begin + b} * s.groups + g;
  const std::int64_t blocks = eligible_blocks(s.rules, t0 + rows - 1);
  rows_by_block.collect(args, tile_row, g, rows, blocks);
  load_row_queries(args, buffers, w, tile_row, g, rows);
  for (std::int64_t j = 0; j < blocks; ++j) {
    const int count = rows_by_block.begin[j + 1] - rows_by_block.begin[j];
    if (count == 0) continue;
    const int* selected_by = rows_by_block.row.data() + rows_by_block.begin[j];
    for_each_run(args.k, j * s.rules.l_sel, std::min((j + 1) * s.rules.l_sel, t0 + rows), [&](const RowRun& run) {
      const KvTile kv_tile = kv_tile_of(s.dtype, args.k, args.v, plane, run);
      load_rows(s.dtype, run.tokens, s.d_k, kv_tile.k, buffers.tile.k);
      load_values(s, w, kv_tile, buffers.tile.v);
      for (int i = 0; i < count; i += rows_per_tile(s))
        attend_rows(s, buffers, kv_tile, t0, selected_by + i, std::min(rows_per_tile(s), count - i));
    });
  }
  store_rows(args, buffers, w, tile_row, g, rows);
  std::int64_t& reads = args.reads[std::int64_t{b} * s.groups + g];
#pragma omp atomic
  reads += buffers.tile.tokens_read;
}

}  // namespace

std::size_t attend_shared_scratch(const LayerShape& s, const QueryTile& tile) {
  Arena arena;
  for (int t = 0; t < threads(); ++t) SharedRowBuffers(arena, s, shared_rows(s, tile), Widths(s, rows_per_tile(s)));
  return arena.used();
}

void attend_sel_shared(const AttendArgs& args, Stream*) {
  const LayerShape& s = args.shape;
  const QueryTile& tile = args.tile;
  const int rows_per_item = shared_rows(s, tile);
  const Widths w(s, rows_per_tile(s));
  Arena arena(args.scratch, args.scratch_bytes);
  std::vector<SharedRowBuffers> thread_buffers;
  for (int t = 0; t < threads(); ++t) thread_buffers.emplace_back(arena, s, rows_per_item, w);
  const std::int64_t row_blocks = (tile.tokens + rows_per_item - 1) / rows_per_item;
#pragma omp parallel
  {
    SharedRowBuffers& buffers = thread_buffers[omp_get_thread_num()];
    RowsByBlock rows_by_block;
#pragma omp for schedule(dynamic) collapse(3)
    for (std::int32_t b = 0; b < tile.batches; ++b) {
      for (std::int32_t g = 0; g < s.groups; ++g) {
        for (std::int64_t block = 0; block < row_blocks; ++block) {
          const int row = static_cast<int>(block) * rows_per_item;
          attend_item(args, w, buffers, rows_by_block, b, g, row, std::min(rows_per_item, tile.tokens - row));
        }
      }
    }
  }
}

}  // namespace nsa::host
