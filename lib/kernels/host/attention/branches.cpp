// The three branches: which K/V rows a part of a task covers.

#include "kernels/host/attention/score_layout.hpp"
#include "kernels/host/attention/split_attention.hpp"

namespace nsa::host {

void keep_scores(const AttendArgs& args, const Widths& w, const Worker& worker, const Task& task, std::int64_t slot,
                 int tokens) {
  const LayerShape& s = args.shape;
  float* scores = static_cast<float*>(args.scores);
  const std::int64_t row_heads = args.tile.rows() * s.heads();
  for (int done = 0; done < tokens;) {
    const int n = static_cast<int>(std::min<std::int64_t>(tokens - done, score_block - (slot + done) % score_block));
    for (int r = 0; r < task.rows; ++r) {
      for (int j = 0; j < s.heads_per_group; ++j) {
        const std::int64_t row_head = (task.tile_row + r) * s.heads() + task.g * s.heads_per_group + j;
        float* to = scores + score_offset(slot + done, row_heads, row_head);
        const float* from = worker.scores + std::int64_t{done} * w.columns + r * s.heads_per_group + j;
        for (int t = 0; t < n; ++t) to[t] = from[t * w.columns];
      }
    }
    done += n;
  }
}

void write_lane(const AttendArgs& args, const Task& task, std::int64_t slot, const State& state) {
  const LayerShape& s = args.shape;
  for (int r = 0; r < task.rows; ++r) {
    for (int j = 0; j < s.heads_per_group; ++j) {
      const std::int64_t head = (task.tile_row + r) * s.heads() + task.g * s.heads_per_group + j;
      float* lse = args.lse + (slot * args.tile.rows() * s.heads() + head) * 2;
      lse[0] = state.m[r * s.heads_per_group + j];
      lse[1] = state.s[r * s.heads_per_group + j];
    }
  }
}

Run block_range(const AttendArgs& args, const Task& task, int index) {
  const LayerShape& s = args.shape;
  const std::int64_t j = args.selected[(task.tile_row * s.groups + task.g) * s.rules.n_sel + index];
  const std::int64_t begin = j * s.rules.l_sel;
  if (j < 0 || !has_chunk(args.k.map, chunk_of(args.k.map, begin))) return {};
  return {begin, static_cast<int>(std::min<std::int64_t>(s.rules.l_sel, task.t0 + 1 - begin))};
}

namespace {

constexpr std::int32_t shared_from = 8;  ///< rows of a sequence from which sharing blocks among them pays

/// Chunk c's copies of the tokens before it: scored, neither attended nor counted.
void score_halo(const AttendArgs& args, const Widths& w, Worker& worker, const Task& task, std::int64_t c,
                std::int64_t valid) {
  const RowMap& map = args.k.map;
  const std::int64_t begin = std::max<std::int64_t>(0, c * map.chunk - map.halo);
  const std::int64_t end = std::min(c * map.chunk, valid);
  for (std::int64_t i = begin; i < end; i += tile_tokens) {
    const int n = static_cast<int>(std::min<std::int64_t>(end - i, tile_tokens));
    const void* k = at(args.shape.dtype, args.k.data, offset_in_chunk(args.k, task.plane, c, i));
    score_piece(args.shape, w, worker, {i, n, k, nullptr});
    keep_scores(args, w, worker, task, score_slot(map, c, i), n);
  }
}

/// K of the piece this thread attends after `run`: of the lane's next leaf, or of the next lane's first.
const void* next_in_lane(const AttendArgs& args, std::int64_t plane, const Run& run, std::int64_t valid) {
  const LayerShape& s = args.shape;
  const std::int64_t leaf = run.first / s.lse.segment, step = holds_all(args.k.map) ? 1 : args.k.map.kv;
  std::int64_t next = run.first + run.tokens;
  if (next >= (leaf + 1) * s.lse.segment) next = (leaf + s.lse.buckets) * s.lse.segment;
  if (next >= valid) next = (leaf % s.lse.buckets + step) * s.lse.segment;
  return next < valid ? at(s.dtype, args.k.data, offset_of(args.k, plane, next)) : nullptr;
}

void cmp_part(const AttendArgs& args, const Widths& w, Worker& worker, const Task& task, int lane, State& state) {
  const LayerShape& s = args.shape;
  const RowMap& map = args.k.map;
  const bool all = holds_all(map);
  if (!all && lane % map.kv != map.rank) return;
  const std::int64_t valid = compressed_tokens(s.rules, task.t0 + task.rows - 1);  // of the last row
  const std::int64_t halo = all ? 0 : map.halo;
  for (std::int64_t leaf = lane; leaf * s.lse.segment - halo < valid; leaf += s.lse.buckets) {
    if (halo > 0) score_halo(args, w, worker, task, leaf, valid);
    for_runs(map, leaf * s.lse.segment, std::min((leaf + 1) * s.lse.segment, valid), [&](const Run& run) {
      Piece piece = piece_of(s.dtype, args.k, args.v, task.plane, run);
      piece.next_k = next_in_lane(args, task.plane, run, valid);
      score_piece(s, w, worker, piece);
      keep_scores(args, w, worker, task, score_slot(map, leaf, run.first), run.tokens);
      attend_piece(
          s, w, worker, piece, task, state, !args.scores_only, [](int) { return 0; },
          [&](int r) { return compressed_tokens(s.rules, task.t0 + r); });
    });
  }
  write_lane(args, task, all ? lane : lane / map.kv, state);
}

void attend_whole(const AttendArgs& args, const Widths& w, Worker& worker, const Task& task, const Piece& piece,
                  State& state) {
  score_piece(args.shape, w, worker, piece);
  attend_piece(
      args.shape, w, worker, piece, task, state, true, [](int) { return 0; }, [&](int r) { return task.t0 + r + 1; });
}

void sel_direct_part(const AttendArgs& args, const Widths& w, Worker& worker, const Task& task, int index,
                     State& state) {
  const Run block = block_range(args, task, index);
  const Run next = index + 1 < args.shape.rules.n_sel ? block_range(args, task, index + 1) : Run{};
  for_runs(args.k.map, block.first, block.first + block.tokens, [&](const Run& run) {
    Piece piece = piece_of(args.shape.dtype, args.k, args.v, task.plane, run);
    if (next.tokens > 0) piece.next_k = at(args.shape.dtype, args.k.data, offset_of(args.k, task.plane, next.first));
    attend_whole(args, w, worker, task, piece, state);
  });
}

void win_part(const AttendArgs& args, const Widths& w, Worker& worker, const Task& task, int index, State& state) {
  const LayerShape& s = args.shape;
  const std::int64_t begin = window_begin(s.rules, task.t0) + std::int64_t{index} * tile_tokens;
  const std::int64_t end = std::min(begin + tile_tokens, task.t0 + task.rows);
  for_runs(args.k.map, begin, end, [&](const Run& run) {
    Piece piece = piece_of(s.dtype, args.k, args.v, task.plane, run);
    const Run next = next_run(args.k.map, run.first + run.tokens, task.t0 + task.rows);
    if (next.tokens > 0) piece.next_k = at(s.dtype, args.k.data, offset_of(args.k, task.plane, next.first));
    score_piece(s, w, worker, piece);
    attend_piece(
        s, w, worker, piece, task, state, true, [&](int r) { return window_begin(s.rules, task.t0 + r); },
        [&](int r) { return task.t0 + r + 1; });
  });
}

}  // namespace

int cmp_parts(const LayerShape& s, const QueryTile&) { return s.lse.buckets; }

int win_parts(const LayerShape& s, const QueryTile& tile) {
  const std::int64_t rows = rows_of_task(s, tile);
  const std::int64_t span = std::min<std::int64_t>(s.rules.w + rows - 1, std::max<std::int64_t>(tile.max_positions, 1));
  return static_cast<int>((span + tile_tokens - 1) / tile_tokens);
}

void attend_cmp(const AttendArgs& args, Stream*) {
  const RowMap& map = args.k.map;
  if (!holds_all(map) && map.chunk != args.shape.lse.segment)
    throw InternalError("compressed chunks differ from the LSE leaf (the map is cut otherwise than shape.lse.segment)");
  const std::int64_t last = compressed_tokens(args.shape.rules, *args.tile.first_position + args.tile.tokens - 1) - 1;
  for (std::int64_t c = chunk_of(map, std::max<std::int64_t>(last, 0)); !holds_all(map) && last >= 0; ++c) {
    if (c * map.chunk - map.halo > last) break;
    const std::int64_t row = row_in_chunk(map, c, std::min(c * map.chunk, last));
    if (has_chunk(map, c) && (row + 1) * args.k.width > args.k.plane_stride)
      throw InternalError("the compressed cache has no memory for the halo in front of a chunk that has no token yet");
  }
  attend_parts(args, rows_of_task(args.shape, args.tile), cmp_parts(args.shape, args.tile), cmp_part);
}

void attend_sel_direct(const AttendArgs& args, Stream* stream) {
  if (args.tile.tokens >= shared_from) return attend_sel_shared(args, stream);
  attend_parts(args, 1, args.shape.rules.n_sel, sel_direct_part);
}

void attend_win(const AttendArgs& args, Stream*) {
  attend_parts(args, rows_of_task(args.shape, args.tile), win_parts(args.shape, args.tile), win_part);
}

}  // namespace nsa::host
