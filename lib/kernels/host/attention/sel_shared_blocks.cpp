// Selected branch of many rows: the rows of a task that chose the same block attend it together, as columns of one
// tile, so that a block is loaded and converted once for all of them. A row still meets its blocks by rising index
// and its sums are the ones it would form alone: how rows are shared out cannot be seen in the result.
//
// Bytes: every chosen block once a task. Work: two products of [64, Dk or Dv] x columns a block; bound by that.

#include <vector>

#include "kernels/host/attention/split_attention.hpp"

namespace nsa::host {
namespace {

/// Rows of a task: many, so that blocks are shared, but enough tasks for the threads.
int shared_rows(const LayerShape& s, const QueryTile& tile) {
  const std::int64_t fair = tile.rows() * s.groups / (2 * threads());
  return static_cast<int>(std::min<std::int64_t>(std::clamp<std::int64_t>(fair, 32, 256), tile.tokens));
}

/// Rows attended at once: as many as give about max_columns columns.
int rows_at_once(const LayerShape& s) { return std::max(1, max_columns / s.heads_per_group); }

struct SharedWorker {
  SharedWorker(Arena& arena, const LayerShape& s, int rows, const Widths& w)
      : tile(arena, s, w),
        queries(arena.take<float>(std::int64_t{rows} * s.d_k * s.heads_per_group)),
        m(arena.take<float>(std::int64_t{rows} * s.heads_per_group)),
        s(arena.take<float>(std::int64_t{rows} * s.heads_per_group)),
        o(arena.take<float>(std::int64_t{rows} * s.heads_per_group * w.v)) {}
  Worker tile;     ///< buffers of the rows at once; tile.part.m and .s hold their states
  float* queries;  ///< [rows][Dk][h], scaled
  float *m, *s;    ///< [rows][h]
  float* o;        ///< [rows][h][v]
};

/// The rows that chose each block, by block and row.
struct Choices {
  void collect(const AttendArgs& args, std::int64_t tile_row, std::int32_t g, int rows, std::int64_t blocks) {
    const std::int32_t n = args.shape.rules.n_sel;
    const auto chosen = [&](int r) { return args.selected + ((tile_row + r) * args.shape.groups + g) * n; };
    begin.assign(blocks + 1, 0);
    const auto each = [&](auto&& body) {
      for (int r = 0; r < rows; ++r)
        for (std::int32_t k = 0; k < n; ++k)
          if (chosen(r)[k] >= 0) body(chosen(r)[k], r);
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

void load_rows(const AttendArgs& args, SharedWorker& worker, const Widths& w, std::int64_t tile_row, std::int32_t g,
               int rows) {
  const LayerShape& s = args.shape;
  const int h = s.heads_per_group;
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.d_k));
  for (int r = 0; r < rows; ++r) {
    for (int j = 0; j < h; ++j) {
      load(s.dtype, s.d_k, at(s.dtype, args.q, ((tile_row + r) * s.heads() + g * h + j) * s.d_k), worker.tile.k);
      for (int e = 0; e < s.d_k; ++e) worker.queries[(std::int64_t{r} * s.d_k + e) * h + j] = worker.tile.k[e] * scale;
    }
  }
  std::fill_n(worker.m, rows * h, -std::numeric_limits<float>::infinity());
  std::fill_n(worker.s, rows * h, 0.0f);
  std::fill_n(worker.o, std::int64_t{rows} * h * w.v, 0.0f);
  worker.tile.tokens_read = 0;
}

/// The rows' queries and states side by side as columns.
void gather(const LayerShape& s, const Widths& w, SharedWorker& worker, const int* rows, int count) {
  const int h = s.heads_per_group;
  for (int i = 0; i < count; ++i) {
    const float* from = worker.queries + std::int64_t{rows[i]} * s.d_k * h;
    for (int e = 0; e < s.d_k; ++e) std::copy_n(from + e * h, h, worker.tile.queries + e * w.columns + i * h);
    std::copy_n(worker.m + rows[i] * h, h, worker.tile.part.m + i * h);
    std::copy_n(worker.s + rows[i] * h, h, worker.tile.part.s + i * h);
  }
}

/// Rows of the task that chose a block attend one piece of it, already in tile.k and tile.v.
void attend_together(const LayerShape& s, SharedWorker& worker, const Piece& piece, std::int64_t t0, const int* rows,
                     int count) {
  const int h = s.heads_per_group;
  const Widths w(s, count);
  Worker& tile = worker.tile;
  gather(s, w, worker, rows, count);
  bool mask = false;
  for (int i = 0; i < count; ++i) {
    const auto last =
        static_cast<std::int32_t>(std::clamp<std::int64_t>(t0 + rows[i] + 1 - piece.first, 0, piece.tokens));
    mask = mask || last < piece.tokens;
    std::fill_n(tile.first + i * h, h, 0);
    std::fill_n(tile.last + i * h, h, last);
    tile.tokens_read += last;
  }
  product(piece.tokens, w.columns, s.d_k, tile.k, s.d_k, 1, tile.queries, w.columns, tile.scores, w.columns);
  if (mask) mask_columns(piece.tokens, w.columns, tile.scores, tile.first, tile.last);
  softmax_columns(piece.tokens, w.columns, tile.scores, tile.m, tile.s);
  merge_columns(w.columns, tile.part.m, tile.part.s, tile.m, tile.s, tile.keep, tile.add);
  for (int i = 0; i < count; ++i) {
    product_merge(h, w.v, piece.tokens, tile.scores + i * h, 1, w.columns, tile.v, w.v,
                  worker.o + std::int64_t{rows[i]} * h * w.v, w.v, tile.keep + i * h, tile.add + i * h);
    std::copy_n(tile.part.m + i * h, h, worker.m + rows[i] * h);
    std::copy_n(tile.part.s + i * h, h, worker.s + rows[i] * h);
  }
}

void write_rows(const AttendArgs& args, const SharedWorker& worker, const Widths& w, std::int64_t tile_row,
                std::int32_t g, int rows) {
  const LayerShape& s = args.shape;
  for (int r = 0; r < rows; ++r) {
    for (int j = 0; j < s.heads_per_group; ++j) {
      const std::int64_t head = (tile_row + r) * s.heads() + g * s.heads_per_group + j;
      const std::int64_t c = std::int64_t{r} * s.heads_per_group + j;
      args.out.ms[head * 2] = worker.m[c];
      args.out.ms[head * 2 + 1] = worker.s[c];
      std::copy_n(worker.o + c * w.v, s.d_v, args.out.o + head * s.d_v);
    }
  }
}

/// Rows [row, row + rows) of sequence b and one group.
void attend_task(const AttendArgs& args, const Widths& w, SharedWorker& worker, Choices& choices, std::int32_t b,
                 std::int32_t g, int row, int rows) {
  const LayerShape& s = args.shape;
  const std::int64_t t0 = *args.tile.first_position + row, tile_row = std::int64_t{b} * args.tile.tokens + row;
  const std::int64_t plane = std::int64_t{args.tile.batch_begin + b} * s.groups + g;
  const std::int64_t blocks = eligible_blocks(s.rules, t0 + rows - 1);
  choices.collect(args, tile_row, g, rows, blocks);
  load_rows(args, worker, w, tile_row, g, rows);
  for (std::int64_t j = 0; j < blocks; ++j) {
    const int count = choices.begin[j + 1] - choices.begin[j];
    if (count == 0) continue;
    const int* chosen_by = choices.row.data() + choices.begin[j];
    for_runs(args.k.map, j * s.rules.l_sel, std::min((j + 1) * s.rules.l_sel, t0 + rows), [&](const Run& run) {
      const Piece piece = piece_of(s.dtype, args.k, args.v, plane, run);
      load(s.dtype, std::int64_t{run.tokens} * s.d_k, piece.k, worker.tile.k);
      load_values(s, w, piece, worker.tile.v);
      for (int i = 0; i < count; i += rows_at_once(s))
        attend_together(s, worker, piece, t0, chosen_by + i, std::min(rows_at_once(s), count - i));
    });
  }
  write_rows(args, worker, w, tile_row, g, rows);
  std::int64_t& reads = args.reads[std::int64_t{b} * s.groups + g];
#pragma omp atomic
  reads += worker.tile.tokens_read;
}

}  // namespace

std::size_t attend_shared_scratch(const LayerShape& s, const QueryTile& tile) {
  Arena arena;
  for (int t = 0; t < threads(); ++t) SharedWorker(arena, s, shared_rows(s, tile), Widths(s, rows_at_once(s)));
  return arena.used();
}

void attend_sel_shared(const AttendArgs& args, Stream*) {
  const LayerShape& s = args.shape;
  const QueryTile& tile = args.tile;
  const int rows_per_task = shared_rows(s, tile);
  const Widths w(s, rows_at_once(s));
  Arena arena(args.scratch, args.scratch_bytes);
  std::vector<SharedWorker> workers;
  for (int t = 0; t < threads(); ++t) workers.emplace_back(arena, s, rows_per_task, w);
  const std::int64_t row_blocks = (tile.tokens + rows_per_task - 1) / rows_per_task;
#pragma omp parallel
  {
    SharedWorker& worker = workers[omp_get_thread_num()];
    Choices choices;
#pragma omp for schedule(dynamic) collapse(3)
    for (std::int32_t b = 0; b < tile.batches; ++b) {
      for (std::int32_t g = 0; g < s.groups; ++g) {
        for (std::int64_t block = 0; block < row_blocks; ++block) {
          const int row = static_cast<int>(block) * rows_per_task;
          attend_task(args, w, worker, choices, b, g, row, std::min(rows_per_task, tile.tokens - row));
        }
      }
    }
  }
}

}  // namespace nsa::host
