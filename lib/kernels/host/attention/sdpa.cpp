// Attention by matrix products over everything a task attends at once: scores of all tokens, softmax, weighted sum, one
// after the other, with all weights kept in between. `sdpa` packs the chosen tokens of the selected branch first and
// takes the others as they lie; `masked` multiplies with every token there is and masks.
//
// Work is shared out by (task, tile of up to 64 tokens) for the scores and by (task, panel of V's columns) for the
// sums, so that few tasks use all threads. Weights are relative to their tile's maximum until the sum, which scales
// each tile: every element is formed in one order, whatever the threads and the kv layout.

#include "kernels/host/attention/score_layout.hpp"
#include "kernels/host/attention/split_attention.hpp"

namespace nsa::host {
namespace {

constexpr int panel = 64;

/// Tokens that lie behind one another, as rows of the task's weights.
struct Tile {
  Run run;
  std::int64_t row = 0;    ///< of the weights
  std::int64_t block = 0;  ///< cmp: leaf; sel: selection block
  bool halo = false;       ///< cmp: scored only
};

/// What differs between the branches and implementations.
struct Kind {
  std::vector<Tile> (*tiles)(const AttendArgs&, const Task&);
  /// Tokens of the tile's block that row r of the task attends: [first, second).
  std::pair<std::int64_t, std::int64_t> (*range)(const AttendArgs&, const Task&, const Tile&, int r);
  bool compressed = false, packed = false;
};

struct Job {
  Task task;
  std::vector<Tile> tiles;
  float *queries, *weights, *m, *s;  ///< [Dk][columns], [tokens][columns], [tile][columns] each
  void *k, *v;                       ///< packed [tokens][D]
  Job(Arena& arena, const LayerShape& shape, const Widths& w, std::int64_t tokens, std::int64_t most_tiles, bool packs)
      : queries(arena.take<float>(std::int64_t{shape.d_k} * w.columns)),
        weights(arena.take<float>(tokens * w.columns)),
        m(arena.take<float>(most_tiles * w.columns)),
        s(arena.take<float>(most_tiles * w.columns)),
        k(arena.take<float>(packs ? tokens * shape.d_k : 0)),
        v(arena.take<float>(packs ? tokens * shape.d_v : 0)) {}
};

void add_runs(const RowMap& map, std::int64_t begin, std::int64_t end, std::int64_t block, bool halo,
              std::vector<Tile>& tiles) {
  for_runs(map, begin, end, [&](const Run& run) { tiles.push_back({run, 0, block, halo}); });
}

std::vector<Tile> compressed_tiles(const AttendArgs& args, const Task& task) {
  const LayerShape& s = args.shape;
  const RowMap& map = args.k.map;
  const bool all = holds_all(map);
  const std::int64_t valid = compressed_tokens(s.rules, task.t0 + task.rows - 1), halo = all ? 0 : map.halo;
  std::vector<Tile> tiles;
  for (std::int64_t leaf = all ? 0 : map.rank; leaf * s.lse.segment - halo < valid; leaf += all ? 1 : map.kv) {
    const std::int64_t begin = leaf * s.lse.segment;
    for (std::int64_t i = std::max<std::int64_t>(0, begin - halo); i < std::min(begin, valid); i += tile_tokens) {
      const std::int64_t n = std::min<std::int64_t>(tile_tokens, std::min(begin, valid) - i);
      if (halo > 0) tiles.push_back({{i, static_cast<int>(n)}, 0, leaf, true});
    }
    add_runs(map, begin, std::min(begin + s.lse.segment, valid), leaf, false, tiles);
  }
  return tiles;
}

std::vector<Tile> window_tiles(const AttendArgs& args, const Task& task) {
  std::vector<Tile> tiles;
  add_runs(args.k.map, window_begin(args.shape.rules, task.t0), task.t0 + task.rows, 0, false, tiles);
  return tiles;
}

std::vector<Tile> chosen_tiles(const AttendArgs& args, const Task& task) {
  std::vector<Tile> tiles;
  for (int i = 0; i < args.shape.rules.n_sel; ++i) {
    const Run block = block_range(args, task, i);
    add_runs(args.k.map, block.first, block.first + block.tokens, block.first / args.shape.rules.l_sel, false, tiles);
  }
  return tiles;
}

/// All tokens up to the task's last row, none across a selection block; of a ring what it holds.
std::vector<Tile> all_tiles(const AttendArgs& args, const Task& task) {
  if (args.k.map.ring > 0) return window_tiles(args, task);
  std::vector<Tile> tiles;
  const std::int64_t end = task.t0 + task.rows, l = args.shape.rules.l_sel;
  for (std::int64_t j = 0; j * l < end; ++j) add_runs(args.k.map, j * l, std::min((j + 1) * l, end), j, false, tiles);
  return tiles;
}

using Range = std::pair<std::int64_t, std::int64_t>;
Range compressed_range(const AttendArgs& args, const Task& task, const Tile&, int r) {
  return {0, compressed_tokens(args.shape.rules, task.t0 + r)};
}
Range window_range(const AttendArgs& args, const Task& task, const Tile&, int r) {
  return {window_begin(args.shape.rules, task.t0 + r), task.t0 + r + 1};
}
Range causal_range(const AttendArgs&, const Task& task, const Tile&, int r) { return {0, task.t0 + r + 1}; }
Range chosen_range(const AttendArgs& args, const Task& task, const Tile& tile, int r) {
  const std::int32_t n = args.shape.rules.n_sel;
  const std::int32_t* chosen = args.selected + ((task.tile_row + r) * args.shape.groups + task.g) * n;
  return {0, std::find(chosen, chosen + n, tile.block) == chosen + n ? 0 : task.t0 + r + 1};
}

constexpr Kind sdpa_kinds[branches] = {{compressed_tiles, compressed_range, true, false},
                                       {chosen_tiles, causal_range, false, true},
                                       {window_tiles, window_range, false, false}};
constexpr Kind masked_kinds[branches] = {
    {nullptr, nullptr, false, false}, {all_tiles, chosen_range, false, false}, {all_tiles, window_range, false, false}};

/// Where the rows of a tile lie; a halo's as the chunk behind it sees them.
Piece piece_at(const AttendArgs& args, const Job& job, const Tile& tile) {
  const DType type = args.shape.dtype;
  if (!tile.halo) return piece_of(type, args.k, args.v, job.task.plane, tile.run);
  const std::int64_t at_k = offset_in_chunk(args.k, job.task.plane, tile.block, tile.run.first);
  return {tile.run.first, tile.run.tokens, at(type, args.k.data, at_k), nullptr};
}

Piece pack(const LayerShape& s, const Job& job, const Tile& tile, const Piece& from) {
  void *k = at(s.dtype, job.k, tile.row * s.d_k), *v = at(s.dtype, job.v, tile.row * s.d_v);
  std::memcpy(k, from.k, tile.run.tokens * s.d_k * size_of(s.dtype));
  std::memcpy(v, from.v, tile.run.tokens * s.d_v * size_of(s.dtype));
  return {from.first, from.tokens, k, v};
}

/// Scores of a tile to weights relative to the tile's maximum.
void weigh_tile(const AttendArgs& args, const Kind& kind, const Widths& w, const Worker& mine, const Job& job,
                std::int64_t index) {
  const LayerShape& s = args.shape;
  const Tile& tile = job.tiles[index];
  const int n = tile.run.tokens, h = s.heads_per_group;
  Worker worker = mine;  // its buffers, but the job's queries and weights
  worker.queries = job.queries;
  if (!tile.halo) worker.scores = job.weights + tile.row * w.columns;
  Piece piece = piece_at(args, job, tile);
  if (kind.packed) piece = pack(s, job, tile, piece);
  score_piece(s, w, worker, piece);
  if (kind.compressed) keep_scores(args, w, worker, job.task, score_slot(args.k.map, tile.block, tile.run.first), n);
  if (tile.halo) return;
  std::int64_t read = 0;
  std::fill_n(worker.first, w.columns, 0);
  std::fill_n(worker.last, w.columns, 0);
  for (int r = 0; r < job.task.rows; ++r) {
    const auto [begin, end] = kind.range(args, job.task, tile, r);
    const auto low = static_cast<std::int32_t>(std::clamp<std::int64_t>(begin - tile.run.first, 0, n));
    const auto high = static_cast<std::int32_t>(std::clamp<std::int64_t>(end - tile.run.first, low, n));
    std::fill_n(worker.first + r * h, h, low);
    std::fill_n(worker.last + r * h, h, high);
    read += high - low;
  }
  mask_columns(n, w.columns, worker.scores, worker.first, worker.last);
  softmax_columns(n, w.columns, worker.scores, job.m + index * w.columns, job.s + index * w.columns);
  std::int64_t& reads = args.reads[std::int64_t{job.task.b} * s.groups + job.task.g];
#pragma omp atomic
  reads += read;
}

void merge_tiles(const Widths& w, Worker& worker, const Job& job, State& into, std::int64_t lane, std::int64_t lanes) {
  for (std::size_t i = 0; i < job.tiles.size(); ++i)
    if (!job.tiles[i].halo && (lanes == 1 || job.tiles[i].block % lanes == lane))
      merge_columns(w.columns, into.m, into.s, job.m + i * w.columns, job.s + i * w.columns, worker.keep, worker.add);
}

/// (m, s) of all tiles in worker.total, and with `write` the lanes of the compressed scores.
void merge_all(const AttendArgs& args, const Kind& kind, const Widths& w, Worker& worker, const Job& job, bool write) {
  worker.total.clear(w, false);
  if (!kind.compressed) return merge_tiles(w, worker, job, worker.total, 0, 1);
  const RowMap& map = args.k.map;
  const int step = holds_all(map) ? 1 : map.kv;
  for (int lane = step == 1 ? 0 : map.rank; lane < args.shape.lse.buckets; lane += step) {
    worker.part.clear(w, false);
    merge_tiles(w, worker, job, worker.part, lane, args.shape.lse.buckets);
    if (write) write_lane(args, job.task, lane / step, worker.part);
    merge_columns(w.columns, worker.total.m, worker.total.s, worker.part.m, worker.part.s, worker.keep, worker.add);
  }
}

/// Columns [e, e + panel) of V, weighed and summed.
void sum_panel(const AttendArgs& args, const Kind& kind, const Widths& w, Worker& worker, const Job& job, int e) {
  const LayerShape& s = args.shape;
  const int columns = job.task.rows * s.heads_per_group, width = std::min(panel, w.v - e),
            there = std::min(panel, s.d_v - e);
  for (int c = 0; c < columns; ++c) std::fill_n(worker.total.o + std::int64_t{c} * w.v + e, width, 0.0f);
  for (std::size_t i = 0; i < job.tiles.size() && !args.scores_only; ++i) {
    const Tile& tile = job.tiles[i];
    if (tile.halo) continue;
    const void* v = kind.packed ? at(s.dtype, job.v, tile.row * s.d_v) : piece_at(args, job, tile).v;
    for (int t = 0; t < tile.run.tokens; ++t) {
      load(s.dtype, there, at(s.dtype, v, std::int64_t{t} * s.d_v + e), worker.v + t * w.v);
      std::fill(worker.v + t * w.v + there, worker.v + t * w.v + width, 0.0f);
    }
    for (int c = 0; c < columns; ++c) {
      const float m = job.m[i * w.columns + c];
      worker.keep[c] = 1.0f;
      worker.add[c] = std::isinf(m) ? 0.0f : exponential(m - worker.total.m[c]);
    }
    for (int c = 0; c < columns; c += 4)
      product_merge(std::min(4, columns - c), width, tile.run.tokens, job.weights + tile.row * w.columns + c, 1,
                    w.columns, worker.v, w.v, worker.total.o + std::int64_t{c} * w.v + e, w.v, worker.keep + c,
                    worker.add + c);
  }
}

void write_panel(const AttendArgs& args, const Widths& w, const Worker& worker, const Job& job, int e) {
  const LayerShape& s = args.shape;
  for (int r = 0; r < job.task.rows; ++r) {
    for (int j = 0; j < s.heads_per_group; ++j) {
      const int c = r * s.heads_per_group + j;
      const std::int64_t head = (job.task.tile_row + r) * s.heads() + job.task.g * s.heads_per_group + j;
      std::copy_n(worker.total.o + std::int64_t{c} * w.v + e, std::min(panel, s.d_v - e),
                  args.out.o + head * s.d_v + e);
      args.out.ms[head * 2] = worker.total.m[c];
      args.out.ms[head * 2 + 1] = worker.total.s[c];
    }
  }
}

/// Sizes of the jobs' buffers, from the shape alone.
struct Extent {
  int rows;                         ///< of a task
  std::int64_t tokens, most_tiles;  ///< of a task
  bool packs;
};

/// Runs end with a chunk, a selection block or a ring, and after 64 tokens.
std::int64_t tiles_of(std::int64_t tokens, std::int64_t unit) {
  return (tokens / unit + 4) * ((unit - 1) / tile_tokens + 1) + 2;
}

Extent extent_of(Branch branch, bool masked, const LayerShape& s, const QueryTile& tile) {
  const std::int64_t positions = std::max<std::int64_t>(tile.max_positions, 1);
  const int rows = rows_of_task(s, tile);
  if (masked) return {rows, positions, tiles_of(positions, s.rules.l_sel), false};
  if (branch == cmp) {
    const std::int64_t tokens = compressed_tokens(s.rules, positions - 1);
    return {rows, tokens, 2 * tiles_of(tokens, s.lse.segment) + tiles_of(tokens, s.lse.segment), false};
  }
  if (branch == win) {
    const std::int64_t tokens = std::min<std::int64_t>(s.rules.w + rows - 1, positions);
    return {rows, tokens, tiles_of(tokens, std::min<std::int64_t>(s.lse.segment * s.rules.d, positions)), false};
  }
  const std::int64_t tokens = std::int64_t{s.rules.n_sel} * s.rules.l_sel;
  return {1, tokens, s.rules.n_sel * ((s.rules.l_sel - 1) / tile_tokens + 1), true};
}

std::size_t scratch_of(Branch branch, bool masked, const LayerShape& s, const QueryTile& tile) {
  const Extent extent = extent_of(branch, masked, s, tile);
  const Widths w(s, extent.rows);
  Arena arena;
  for (int t = 0; t < threads(); ++t) {
    Worker(arena, s, w);
    Job(arena, s, w, extent.tokens, extent.most_tiles, extent.packs);
  }
  return arena.used();
}

/// Rows of the weights for every tile; the tasks' places in one list of all tiles.
std::vector<std::pair<int, int>> number_tiles(std::vector<Job>& jobs, int count, const Extent& extent) {
  std::vector<std::pair<int, int>> all;
  for (int i = 0; i < count; ++i) {
    std::int64_t row = 0;
    for (Tile& tile : jobs[i].tiles) {
      tile.row = row;
      if (!tile.halo) row += tile.run.tokens;
      all.emplace_back(i, static_cast<int>(&tile - jobs[i].tiles.data()));
    }
    if (row > extent.tokens || std::ssize(jobs[i].tiles) > extent.most_tiles)
      throw InternalError("dense attention: more tokens or tiles than its buffers hold");
  }
  return all;
}

void attend(Branch branch, bool masked, const AttendArgs& args) {
  const LayerShape& s = args.shape;
  const Kind& kind = masked ? masked_kinds[branch] : sdpa_kinds[branch];
  const Extent extent = extent_of(branch, masked, s, args.tile);
  const Widths w(s, extent.rows);
  Arena arena(args.scratch, args.scratch_bytes);
  std::vector<Worker> workers;
  std::vector<Job> jobs;
  for (int t = 0; t < threads(); ++t) {
    workers.emplace_back(arena, s, w);
    jobs.emplace_back(arena, s, w, extent.tokens, extent.most_tiles, extent.packs);
  }
  const std::int64_t tasks = tasks_of(s, args.tile, extent.rows);
  const int panels = (w.v + panel - 1) / panel;
  for (std::int64_t first = 0; first < tasks; first += std::ssize(jobs)) {
    const int count = static_cast<int>(std::min<std::int64_t>(std::ssize(jobs), tasks - first));
#pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < count; ++i) {
      Worker worker = workers[omp_get_thread_num()];
      jobs[i].task = task_of(args, extent.rows, first + i);
      jobs[i].tiles = kind.tiles(args, jobs[i].task);
      worker.queries = jobs[i].queries;
      load_queries(args, w, jobs[i].task, worker);
    }
    const std::vector<std::pair<int, int>> tiles = number_tiles(jobs, count, extent);
#pragma omp parallel
    {
      Worker& worker = workers[omp_get_thread_num()];
#pragma omp for schedule(dynamic, 4)
      for (std::size_t i = 0; i < tiles.size(); ++i)
        weigh_tile(args, kind, w, worker, jobs[tiles[i].first], tiles[i].second);
#pragma omp for schedule(dynamic)
      for (int i = 0; i < count * panels; ++i) {
        const Job& job = jobs[i / panels];
        const int e = i % panels * panel;
        merge_all(args, kind, w, worker, job, e == 0);
        sum_panel(args, kind, w, worker, job, e);
        write_panel(args, w, worker, job, e);
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
  constexpr std::size_t most = std::size_t{1} << 30;
  return masked_scratch(s, tile) <= most * threads();
}

void attend_cmp_sdpa(const AttendArgs& args, Stream*) { attend(cmp, false, args); }
void attend_sel_sdpa(const AttendArgs& args, Stream*) { attend(sel, false, args); }
void attend_win_sdpa(const AttendArgs& args, Stream*) { attend(win, false, args); }
void attend_sel_masked(const AttendArgs& args, Stream*) { attend(sel, true, args); }
void attend_win_masked(const AttendArgs& args, Stream*) { attend(win, true, args); }

}  // namespace nsa::host
