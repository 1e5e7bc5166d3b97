// The three branches: the K/V rows that a split of an item covers. Tiling, bytes and bound: split_attention.hpp.

#include "kernels/host/attention/score_layout.hpp"
#include "kernels/host/attention/split_attention.hpp"

namespace nsa::host {

void store_scores(const AttendArgs& args, const Widths& w, const ThreadBuffers& buffers, const WorkItem& item,
                  std::int64_t slot, int tokens) {
  const LayerShape& s = args.shape;
  float* scores = static_cast<float*>(args.scores);
  const std::int64_t row_heads = args.tile.rows() * s.heads();
  for (int done = 0; done < tokens;) {
    const int n = static_cast<int>(std::min<std::int64_t>(tokens - done, score_block - (slot + done) % score_block));
    for (int r = 0; r < item.rows; ++r) {
      const std::int64_t row_head = (item.tile_row + r) * s.heads() + item.g * s.heads_per_group;
      const float* from = buffers.scores + std::int64_t{done} * w.columns + r * s.heads_per_group;
      transpose(n, s.heads_per_group, from, w.columns, scores + score_offset(slot + done, row_heads, row_head),
                score_block);
    }
    done += n;
  }
}

void store_lse_bucket(const AttendArgs& args, const WorkItem& item, std::int64_t slot, const SoftmaxState& state) {
  const LayerShape& s = args.shape;
  for (int r = 0; r < item.rows; ++r) {
    for (int j = 0; j < s.heads_per_group; ++j) {
      const std::int64_t head = (item.tile_row + r) * s.heads() + item.g * s.heads_per_group + j;
      float* ms = args.lse + (slot * args.tile.rows() * s.heads() + head) * 2;
      ms[0] = state.m[r * s.heads_per_group + j];
      ms[1] = state.s[r * s.heads_per_group + j];
    }
  }
}

RowRun selected_block(const AttendArgs& args, const WorkItem& item, int index) {
  const LayerShape& s = args.shape;
  const std::int64_t j = args.selected[(item.tile_row * s.groups + item.g) * s.rules.n_sel + index];
  const std::int64_t begin = j * s.rules.l_sel;
  if (j < 0 || !has_chunk(args.k.map, chunk_of(args.k.map, begin))) return {};
  return {begin, static_cast<int>(std::min<std::int64_t>(s.rules.l_sel, item.t0 + 1 - begin))};
}

namespace {

constexpr std::int32_t min_shared_rows = 8;  ///< rows of a sequence from which attend_sel_shared is faster

/// Scores of chunk c's halo: the tokens are neither attended nor counted as read.
void score_halo(const AttendArgs& args, const Widths& w, ThreadBuffers& buffers, const WorkItem& item, std::int64_t c,
                std::int64_t valid) {
  const RowMap& map = args.k.map;
  const std::int64_t begin = std::max<std::int64_t>(0, c * map.chunk - map.halo);
  const std::int64_t end = std::min(c * map.chunk, valid);
  for (std::int64_t i = begin; i < end; i += kv_tile_tokens) {
    const int n = static_cast<int>(std::min<std::int64_t>(end - i, kv_tile_tokens));
    score_tile(args.shape, w, buffers, {i, n, cached_rows(args.shape.dtype, args.k, item.plane, c, i), {}});
    store_scores(args, w, buffers, item, score_slot(map, c, i), n);
  }
}

/// K of the tile this thread attends after `run`: of the bucket's next segment, or of the next bucket's first segment.
CachedRows next_k_in_bucket(const AttendArgs& args, std::int64_t plane, const RowRun& run, std::int64_t valid) {
  const LayerShape& s = args.shape;
  const std::int64_t segment = run.first / s.lse.segment, stride = holds_all_chunks(args.k.map) ? 1 : args.k.map.kv;
  std::int64_t next = run.first + run.tokens;
  if (next >= (segment + 1) * s.lse.segment) next = (segment + s.lse.buckets) * s.lse.segment;
  if (next >= valid) next = (segment % s.lse.buckets + stride) * s.lse.segment;
  return next < valid ? cached_rows(s.dtype, args.k, plane, next) : CachedRows{};
}

void cmp_split(const AttendArgs& args, const Widths& w, ThreadBuffers& buffers, const WorkItem& item, int bucket,
               SoftmaxState& state) {
  const LayerShape& s = args.shape;
  const RowMap& map = args.k.map;
  const bool all = holds_all_chunks(map);
  if (!all && bucket % map.kv != map.rank) return;
  const std::int64_t valid = compressed_tokens(s.rules, item.t0 + item.rows - 1);  // of the last row
  const std::int64_t halo = all ? 0 : map.halo;
  for (std::int64_t segment = bucket; segment * s.lse.segment - halo < valid; segment += s.lse.buckets) {
    if (halo > 0) score_halo(args, w, buffers, item, segment, valid);
    for_each_run(args.k, segment * s.lse.segment, std::min((segment + 1) * s.lse.segment, valid),
                 [&](const RowRun& run) {
                   KvTile kv_tile = kv_tile_of(s.dtype, args.k, args.v, item.plane, run);
                   kv_tile.next_k = next_k_in_bucket(args, item.plane, run, valid);
                   score_tile(s, w, buffers, kv_tile);
                   store_scores(args, w, buffers, item, score_slot(map, segment, run.first), run.tokens);
                   attend_tile(
                       s, w, buffers, kv_tile, item, state, !args.scores_only, [](int) { return 0; },
                       [&](int r) { return compressed_tokens(s.rules, item.t0 + r); });
                 });
  }
  store_lse_bucket(args, item, all ? bucket : bucket / map.kv, state);
}

void attend_causal_tile(const AttendArgs& args, const Widths& w, ThreadBuffers& buffers, const WorkItem& item,
                        const KvTile& kv_tile, SoftmaxState& state) {
  score_tile(args.shape, w, buffers, kv_tile);
  attend_tile(
      args.shape, w, buffers, kv_tile, item, state, true, [](int) { return 0; },
      [&](int r) { return item.t0 + r + 1; });
}

void sel_split(const AttendArgs& args, const Widths& w, ThreadBuffers& buffers, const WorkItem& item, int index,
               SoftmaxState& state) {
  const RowRun block = selected_block(args, item, index);
  const RowRun next = index + 1 < args.shape.rules.n_sel ? selected_block(args, item, index + 1) : RowRun{};
  for_each_run(args.k, block.first, block.first + block.tokens, [&](const RowRun& run) {
    KvTile kv_tile = kv_tile_of(args.shape.dtype, args.k, args.v, item.plane, run);
    if (next.tokens > 0) kv_tile.next_k = cached_rows(args.shape.dtype, args.k, item.plane, next.first);
    attend_causal_tile(args, w, buffers, item, kv_tile, state);
  });
}

void win_split(const AttendArgs& args, const Widths& w, ThreadBuffers& buffers, const WorkItem& item, int index,
               SoftmaxState& state) {
  const LayerShape& s = args.shape;
  // Spans begin at multiples of 64 positions: those of a row do not depend on the rows of its item.
  const std::int64_t first = window_begin(s.rules, item.t0), span = (first / kv_tile_tokens + index) * kv_tile_tokens;
  const std::int64_t begin = std::max(first, span), end = std::min(span + kv_tile_tokens, item.t0 + item.rows);
  for_each_run(args.k, begin, end, [&](const RowRun& run) {
    KvTile kv_tile = kv_tile_of(s.dtype, args.k, args.v, item.plane, run);
    const RowRun next = next_run(args.k, run.first + run.tokens, item.t0 + item.rows);
    if (next.tokens > 0) kv_tile.next_k = cached_rows(s.dtype, args.k, item.plane, next.first);
    score_tile(s, w, buffers, kv_tile);
    attend_tile(
        s, w, buffers, kv_tile, item, state, true, [&](int r) { return window_begin(s.rules, item.t0 + r); },
        [&](int r) { return item.t0 + r + 1; });
  });
}

}  // namespace

int cmp_splits(const LayerShape& s, const QueryTile&) { return s.lse.buckets; }

int win_splits(const LayerShape& s, const QueryTile& tile) {
  const std::int64_t rows = item_rows(s, tile);
  const std::int64_t span = std::min<std::int64_t>(s.rules.w + rows - 1, std::max<std::int64_t>(tile.max_positions, 1));
  return static_cast<int>((span + 2 * kv_tile_tokens - 2) / kv_tile_tokens);  // of a window that begins anywhere
}

void attend_cmp(const AttendArgs& args, Stream*) {
  const RowMap& map = args.k.map;
  if (!holds_all_chunks(map) && map.chunk != args.shape.lse.segment)
    throw InternalError(
        "compressed chunks differ from the LSE segment (the map is cut otherwise than shape.lse.segment)");
  std::int64_t longest = 0;
  for (std::int64_t i = 0; i < args.tile.batches; ++i) longest = std::max(longest, first_position(args.tile, i));
  const std::int64_t last = compressed_tokens(args.shape.rules, longest + args.tile.tokens - 1) - 1;
  for (std::int64_t c = chunk_of(map, std::max<std::int64_t>(last, 0)); !holds_all_chunks(map) && last >= 0; ++c) {
    if (c * map.chunk - map.halo > last) break;
    const std::int64_t row = row_in_chunk(map, c, std::min(c * map.chunk, last));
    if (has_chunk(map, c) && (row + 1) * args.k.width > args.k.plane_stride)
      throw InternalError("the compressed cache has no memory for the halo in front of a chunk that has no token yet");
  }
  attend_splits(args, item_rows(args.shape, args.tile), cmp_splits(args.shape, args.tile), cmp_split);
}

void attend_sel_direct(const AttendArgs& args, Stream* stream) {
  if (args.tile.tokens >= min_shared_rows) return attend_sel_shared(args, stream);
  attend_splits(args, 1, args.shape.rules.n_sel, sel_split);
}

void attend_win(const AttendArgs& args, Stream*) {
  attend_splits(args, item_rows(args.shape, args.tile), win_splits(args.shape, args.tile), win_split);
}

}  // namespace nsa::host
