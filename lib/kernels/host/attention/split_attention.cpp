#include "kernels/host/attention/split_attention.hpp"

namespace nsa::host {
namespace {

void merge_state(const Widths& w, int columns, Worker& worker, State& into, const State& from, bool with_o) {
  merge_columns(w.columns, into.m, into.s, from.m, from.s, worker.keep, worker.add);
  if (!with_o) return;
  for (int c = 0; c < columns; ++c)
    merge_row(w.v, worker.keep[c], into.o + std::int64_t{c} * w.v, worker.add[c], from.o + std::int64_t{c} * w.v);
}

void write_out(const AttendArgs& args, const Widths& w, const Task& task, const State& state) {
  const LayerShape& s = args.shape;
  for (int r = 0; r < task.rows; ++r) {
    for (int j = 0; j < s.heads_per_group; ++j) {
      const int c = r * s.heads_per_group + j;
      const std::int64_t head = (task.tile_row + r) * s.heads() + task.g * s.heads_per_group + j;
      args.out.ms[head * 2] = state.m[c];
      args.out.ms[head * 2 + 1] = state.s[c];
      std::memcpy(args.out.o + head * s.d_v, state.o + std::int64_t{c} * w.v, sizeof(float) * s.d_v);
    }
  }
}

/// Few tasks: their parts are shared out too, and their states kept until all are there.
bool splits(std::int64_t tasks, int parts) { return threads() > 1 && parts > 1 && tasks < 4 * threads(); }

/// `count` elements from element `first` on; nothing where `data` is null. Reading past an array is harmless here.
void prefetch_rows(DType type, const void* data, std::int64_t first, std::int64_t count) {
  if (!data) return;
  const char* begin = static_cast<const char*>(at(type, data, first));
  const char* end = static_cast<const char*>(at(type, data, first + count));
  for (; begin < end; begin += 64) __builtin_prefetch(begin, 0, 3);
}

/// With few heads the weighted sum is too short to hide memory behind: then the scores hide both K and V.
bool prefetches_late(const LayerShape& s) { return s.heads_per_group > 8; }

void count_reads(const AttendArgs& args, const Task& task, const Worker& worker) {
  std::int64_t& reads = args.reads[std::int64_t{task.b} * args.shape.groups + task.g];
#pragma omp atomic
  reads += worker.tokens_read;
}

}  // namespace

void load_queries(const AttendArgs& args, const Widths& w, const Task& task, Worker& worker) {
  const LayerShape& s = args.shape;
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.d_k));
  std::fill_n(worker.queries, std::int64_t{s.d_k} * w.columns, 0.0f);
  for (int r = 0; r < task.rows; ++r) {
    for (int j = 0; j < s.heads_per_group; ++j) {
      const std::int64_t head = (task.tile_row + r) * s.heads() + task.g * s.heads_per_group + j;
      load(s.dtype, s.d_k, at(s.dtype, args.q, head * s.d_k), worker.k);
      float* column = worker.queries + r * s.heads_per_group + j;
      for (int e = 0; e < s.d_k; ++e) column[e * w.columns] = worker.k[e] * scale;
    }
  }
  std::fill_n(worker.first, w.columns, 0);
  std::fill_n(worker.last, w.columns, 0);
  worker.tokens_read = 0;
}

Task task_of(const AttendArgs& args, int rows_per_task, std::int64_t index) {
  const QueryTile& tile = args.tile;
  const std::int64_t blocks = (tile.tokens + rows_per_task - 1) / rows_per_task;
  Task task;
  const auto block = static_cast<std::int32_t>(index % blocks);
  task.g = static_cast<std::int32_t>(index / blocks % args.shape.groups);
  task.b = static_cast<std::int32_t>(index / blocks / args.shape.groups);
  task.row = block * rows_per_task;
  task.rows = std::min(rows_per_task, tile.tokens - task.row);
  task.t0 = *tile.first_position + task.row;
  task.plane = std::int64_t{tile.batch_begin + task.b} * args.shape.groups + task.g;
  task.tile_row = std::int64_t{task.b} * tile.tokens + task.row;
  return task;
}

std::int64_t tasks_of(const LayerShape& s, const QueryTile& tile, int rows_per_task) {
  return std::int64_t{tile.batches} * s.groups * ((tile.tokens + rows_per_task - 1) / rows_per_task);
}

Run next_run(const RowMap& map, std::int64_t i, std::int64_t end) {
  const auto bounded = [&](std::int64_t stop) {
    return Run{i, static_cast<int>(std::min({stop, end, i + tile_tokens}) - i)};
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
  return bounded(map.chunk > end ? end : (c + 1) * map.chunk);
}

Piece piece_of(DType type, const KvView& k, const KvView& v, std::int64_t plane, const Run& run) {
  return {run.first, run.tokens, at(type, k.data, offset_of(k, plane, run.first)),
          at(type, v.data, offset_of(v, plane, run.first))};
}

/// A slice of the scores is a few hundred nanoseconds of arithmetic, in which memory would rest: have it bring what
/// comes next, this piece's V and the next one's K.
void score_piece(const LayerShape& s, const Widths& w, Worker& worker, const Piece& piece) {
  constexpr int slice = 8;
  for (int t = 0; t < piece.tokens; t += slice) {
    const int n = std::min(slice, piece.tokens - t);
    prefetch_rows(s.dtype, piece.v, std::int64_t{t} * s.d_v, std::int64_t{n} * s.d_v);
    if (!prefetches_late(s)) prefetch_rows(s.dtype, piece.next_k, std::int64_t{t} * s.d_k, std::int64_t{n} * s.d_k);
    load(s.dtype, std::int64_t{n} * s.d_k, at(s.dtype, piece.k, std::int64_t{t} * s.d_k), worker.k);
    product(n, w.columns, s.d_k, worker.k, s.d_k, 1, worker.queries, w.columns, worker.scores + t * w.columns,
            w.columns);
  }
}

void load_values(const LayerShape& s, const Widths& w, const Piece& piece, float* v) {
  if (s.d_v == w.v) return load(s.dtype, std::int64_t{piece.tokens} * s.d_v, piece.v, v);
  for (int t = 0; t < piece.tokens; ++t) {
    load(s.dtype, s.d_v, at(s.dtype, piece.v, std::int64_t{t} * s.d_v), v + t * w.v);
    std::fill(v + t * w.v + s.d_v, v + (t + 1) * w.v, 0.0f);
  }
}

void attend_scored(const LayerShape& s, const Widths& w, Worker& worker, const Piece& piece, int columns, bool mask,
                   State& state, bool with_o) {
  if (mask) mask_columns(piece.tokens, w.columns, worker.scores, worker.first, worker.last);
  softmax_columns(piece.tokens, w.columns, worker.scores, worker.m, worker.s);
  merge_columns(w.columns, state.m, state.s, worker.m, worker.s, worker.keep, worker.add);
  if (!with_o) return;
  load_values(s, w, piece, worker.v);
  // A panel of V stays in the first cache level while all columns use it.
  constexpr int panel = 64;
  const int groups = (columns + 3) / 4, slices = groups * ((w.v + panel - 1) / panel);
  for (int slice = 0; slice < slices; ++slice) {
    const int e = slice / groups * panel, c = slice % groups * 4;
    const int begin = piece.tokens * slice / slices, end = piece.tokens * (slice + 1) / slices;
    if (prefetches_late(s))
      prefetch_rows(s.dtype, piece.next_k, std::int64_t{begin} * s.d_k, std::int64_t{end - begin} * s.d_k);
    product_merge(std::min(4, columns - c), std::min(panel, w.v - e), piece.tokens, worker.scores + c, 1, w.columns,
                  worker.v + e, w.v, state.o + std::int64_t{c} * w.v + e, w.v, worker.keep + c, worker.add + c);
  }
}

std::size_t attend_scratch(const LayerShape& s, const QueryTile& tile, int rows_per_task, int parts) {
  Arena arena;
  const Widths w(s, rows_per_task);
  for (int t = 0; t < threads(); ++t) Worker(arena, s, w);
  const std::int64_t tasks = tasks_of(s, tile, rows_per_task);
  if (splits(tasks, parts))
    for (std::int64_t i = 0; i < tasks * parts; ++i) State(arena, w);
  return arena.used();
}

void attend_parts(const AttendArgs& args, int rows_per_task, int parts, PartFunction part) {
  const Widths w(args.shape, rows_per_task);
  const std::int64_t tasks = tasks_of(args.shape, args.tile, rows_per_task);
  const bool split = splits(tasks, parts), with_o = !args.scores_only;
  Arena arena(args.scratch, args.scratch_bytes);
  std::vector<Worker> workers;
  for (int t = 0; t < threads(); ++t) workers.emplace_back(arena, args.shape, w);
  std::vector<State> states;
  if (split)
    for (std::int64_t i = 0; i < tasks * parts; ++i) states.emplace_back(arena, w);

#pragma omp parallel
  {
    Worker& worker = workers[omp_get_thread_num()];
    if (split) {
      std::int64_t loaded = -1;  // the task whose queries the worker has
      // Guided: a thread gets parts that follow one another, so the rows it has prefetched are its own.
#pragma omp for schedule(guided)
      for (std::int64_t i = 0; i < tasks * parts; ++i) {
        const Task task = task_of(args, rows_per_task, i / parts);
        if (i / parts != loaded) load_queries(args, w, task, worker);
        loaded = i / parts;
        worker.tokens_read = 0;
        states[i].clear(w, with_o);
        part(args, w, worker, task, static_cast<int>(i % parts), states[i]);
        count_reads(args, task, worker);
      }
    }
#pragma omp for schedule(dynamic)
    for (std::int64_t i = 0; i < tasks; ++i) {
      const Task task = task_of(args, rows_per_task, i);
      const int columns = task.rows * args.shape.heads_per_group;
      if (!split) load_queries(args, w, task, worker);
      worker.total.clear(w, true);
      for (int p = 0; p < parts; ++p) {
        State& state = split ? states[i * parts + p] : worker.part;
        if (!split) {
          state.clear(w, with_o);
          part(args, w, worker, task, p, state);
        }
        merge_state(w, columns, worker, worker.total, state, with_o);
      }
      write_out(args, w, task, worker.total);
      if (!split) count_reads(args, task, worker);
    }
  }
}

}  // namespace nsa::host
