#pragma once
// What the three branches share on the host: query columns, the running (m, s, o) of a range of K/V rows, and the
// split of the work.
//
// A task is (sequence, group, block of rows). Its K/V range is cut into parts (cmp: lanes; sel: blocks; win: spans of
// 64 positions) and each part into pieces of at most 64 rows. Pieces are merged into their part and parts into the
// result by rising index, whether one thread does all parts or several share them: so the thread count cannot
// be seen in the result.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/host/runtime/arena.hpp"
#include "kernels/host/simd/loops.hpp"
#include "kernels/interface/kernel_table.hpp"

namespace nsa::host {

constexpr int max_columns = 64;  ///< rows of a task are as many as give about that many query columns

/// Widths a task's buffers have, in floats.
struct Widths {
  Widths(const LayerShape& s, int rows)
      : columns(static_cast<int>(round_up(std::int64_t{rows} * s.heads_per_group, lanes))),
        v(static_cast<int>(round_up(s.d_v, lanes))) {}
  int columns;  ///< query columns, column = row * h + head, padded
  int v;        ///< Dv, padded
};

inline int rows_of_task(const LayerShape& s, const QueryTile& tile) {
  return std::clamp(max_columns / s.heads_per_group, 1, tile.tokens);
}

/// Unnormalised attention of every column over some K/V rows.
struct State {
  float *m, *s;  ///< [columns]
  float* o;      ///< [columns][v]
  State(Arena& arena, const Widths& w)
      : m(arena.take<float>(w.columns)), s(arena.take<float>(w.columns)), o(arena.take<float>(w.columns * w.v)) {}
  void clear(const Widths& w, bool with_o) {
    std::fill_n(m, w.columns, -std::numeric_limits<float>::infinity());
    std::fill_n(s, w.columns, 0.0f);
    if (with_o) std::fill_n(o, w.columns * w.v, 0.0f);
  }
};

/// Rows [row, row + rows) of sequence b of the tile, one group, at positions t0, t0 + 1, …
struct Task {
  std::int32_t b, g, row, rows;
  std::int64_t t0;
  std::int64_t plane;     ///< of the K/V views
  std::int64_t tile_row;  ///< first row's index in the tile
};

/// One thread's buffers.
struct Worker {
  Worker(Arena& arena, const LayerShape& s, const Widths& w)
      : queries(arena.take<float>(std::int64_t{s.d_k} * w.columns)),
        k(arena.take<float>(std::int64_t{tile_tokens} * s.d_k)),
        v(arena.take<float>(std::int64_t{tile_tokens} * w.v)),
        scores(arena.take<float>(std::int64_t{tile_tokens} * w.columns)),
        m(arena.take<float>(w.columns)),
        s(arena.take<float>(w.columns)),
        keep(arena.take<float>(w.columns)),
        add(arena.take<float>(w.columns)),
        first(arena.take<std::int32_t>(w.columns)),
        last(arena.take<std::int32_t>(w.columns)),
        part(arena, w),
        total(arena, w) {}
  float* queries;  ///< [Dk][columns], scaled by 1/sqrt(Dk)
  float *k, *v;    ///< a tile in fp32: [64][Dk], [64][v]
  float* scores;   ///< [64][columns]
  float *m, *s, *keep, *add;
  std::int32_t *first, *last;
  State part, total;
  std::int64_t tokens_read = 0;  ///< of the task at hand
};

/// K/V rows that lie behind one another in memory.
struct Piece {
  std::int64_t first;            ///< position, or compressed token
  int tokens;                    ///< <= 64
  const void *k, *v;             ///< storage type
  const void* next_k = nullptr;  ///< rows this thread will read next, as many, if it knows
};

/// Scores of a piece in worker.scores [tokens][columns].
void score_piece(const LayerShape& s, const Widths& w, Worker& worker, const Piece& piece);

/// Attends a scored piece: row r of the task takes part for tokens in [begin(r), end(r)). Counts what is read.
template <class Begin, class End>
void attend_piece(const LayerShape& s, const Widths& w, Worker& worker, const Piece& piece, const Task& task,
                  State& state, bool with_o, Begin&& begin, End&& end);

/// The first held, contiguous run of rows in [i, end): at most 64 long. tokens = 0: none.
struct Run {
  std::int64_t first = 0;
  int tokens = 0;
};
Run next_run(const RowMap& map, std::int64_t i, std::int64_t end);

Piece piece_of(DType type, const KvView& k, const KvView& v, std::int64_t plane, const Run& run);

/// Calls `body(run)` for every held run of rows [begin, end).
template <class Body>
void for_runs(const RowMap& map, std::int64_t begin, std::int64_t end, Body&& body) {
  for (Run run = next_run(map, begin, end); run.tokens > 0; run = next_run(map, run.first + run.tokens, end)) body(run);
}

/// `part(worker, task, index, state)` attends part `index` into the cleared state. Writes args.out and adds to
/// args.reads.
using PartFunction = void (*)(const AttendArgs&, const Widths&, Worker&, const Task&, int index, State&);
void attend_parts(const AttendArgs& args, int rows_per_task, int parts, PartFunction part);

/// Bytes of scratch attend_parts takes.
std::size_t attend_scratch(const LayerShape& s, const QueryTile& tile, int rows_per_task, int parts);

int cmp_parts(const LayerShape& s, const QueryTile& tile);
int win_parts(const LayerShape& s, const QueryTile& tile);

/// attention/sdpa.cpp
void attend_cmp_sdpa(const AttendArgs& args, Stream*);
void attend_sel_sdpa(const AttendArgs& args, Stream*);
void attend_win_sdpa(const AttendArgs& args, Stream*);
void attend_sel_masked(const AttendArgs& args, Stream*);
void attend_win_masked(const AttendArgs& args, Stream*);
std::size_t sdpa_scratch(const LayerShape& s, const QueryTile& tile);    ///< of any branch
std::size_t masked_scratch(const LayerShape& s, const QueryTile& tile);  ///< of either branch
bool masked_accepts(const LayerShape& s, const QueryTile& tile);

/// Steps that several implementations share.
Task task_of(const AttendArgs& args, int rows_per_task, std::int64_t index);
std::int64_t tasks_of(const LayerShape& s, const QueryTile& tile, int rows_per_task);
/// q of the task as [Dk][columns], scaled, in worker.queries.
void load_queries(const AttendArgs& args, const Widths& w, const Task& task, Worker& worker);
/// Leaves worker.scores of `tokens` tokens for rank, from `slot` on.
void keep_scores(const AttendArgs& args, const Widths& w, const Worker& worker, const Task& task, std::int64_t slot,
                 int tokens);
void write_lane(const AttendArgs& args, const Task& task, std::int64_t slot, const State& state);
/// Positions of the chosen block, cut at the row's own position; empty where another rank holds it.
Run block_range(const AttendArgs& args, const Task& task, int index);

void attend_cmp(const AttendArgs& args, Stream*);
void attend_sel_direct(const AttendArgs& args, Stream*);
void attend_sel_shared(const AttendArgs& args, Stream*);  ///< many rows: those with a block in common together
void attend_win(const AttendArgs& args, Stream*);
std::size_t attend_shared_scratch(const LayerShape& s, const QueryTile& tile);

/// V of a piece in fp32: [tokens][w.v], padded with zeros.
void load_values(const LayerShape& s, const Widths& w, const Piece& piece, float* v);

/// Attends the columns of a piece that was scored: see above.
void attend_scored(const LayerShape& s, const Widths& w, Worker& worker, const Piece& piece, int columns, bool mask,
                   State& state, bool with_o);

template <class Begin, class End>
void attend_piece(const LayerShape& s, const Widths& w, Worker& worker, const Piece& piece, const Task& task,
                  State& state, bool with_o, Begin&& begin, End&& end) {
  bool mask = false;
  for (int r = 0; r < task.rows; ++r) {
    const std::int64_t n = piece.tokens;
    const auto lo = static_cast<std::int32_t>(std::clamp<std::int64_t>(begin(r) - piece.first, 0, n));
    const auto hi = static_cast<std::int32_t>(std::clamp<std::int64_t>(end(r) - piece.first, lo, n));
    mask = mask || lo > 0 || hi < n;
    std::fill_n(worker.first + r * s.heads_per_group, s.heads_per_group, lo);
    std::fill_n(worker.last + r * s.heads_per_group, s.heads_per_group, hi);
    worker.tokens_read += hi - lo;
  }
  attend_scored(s, w, worker, piece, task.rows * s.heads_per_group, mask, state, with_o);
}

}  // namespace nsa::host
