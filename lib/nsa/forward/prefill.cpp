#include "nsa/forward/prefill.hpp"

#include <fmt/format.h>

#include <algorithm>

#include "kernels/diagnostics/error.hpp"
#include "kernels/diagnostics/fault_injection.hpp"

namespace nsa {

namespace {

AttentionPolicy policy_of(const ModelShard& shard) {
  const auto recompute = shard.routes.of(Phase::prefill, cmp).kernel->recompute_scores;
  return {recompute && recompute(shard.shape())};
}

// The most rows whose scores are within the backend's budget.
QueryTile widest_tile(const ModelShard& shard, const PrefillRange& range) {
  const KernelTable& kernels = *shard.backend.kernels;
  QueryTile tile;
  tile.max_positions = range.end;
  const std::int64_t owned = shard.partition.kv == 1 ? range.end : shard.partition.chunk_tokens;
  tile.tokens = static_cast<std::int32_t>(
      std::min({std::int64_t{kernels.max_tile_tokens}, range.end - range.first, range.chunk, owned}));
  if (policy_of(shard).recompute_scores) return tile;  // no scores are stored
  const std::int64_t rows = compressed_tokens(shard.shape().rules, range.end - 1);
  while (tile.tokens > 1 && kernels.score_bytes(shard.shape(), tile, rows) > kernels.tile_score_budget)
    tile.tokens /= 2;
  return tile;
}

// Appends this rank's tiles of positions [first, end), at most `tokens` long and none across KV chunks.
void add_tiles(std::vector<PrefillTile>& tiles, const Partition& p, std::int64_t first, std::int64_t end,
               std::int64_t tokens) {
  const RowMap map = p.tokens(false);
  std::int64_t row = 0;
  for (std::int64_t c = chunk_of(map, first); chunk_begin(map, c) < end; ++c) {
    if (!has_chunk(map, c)) continue;
    const std::int64_t last = std::min(end, chunk_begin(map, c + 1));
    for (std::int64_t t = std::max(first, chunk_begin(map, c)); t < last; t += tokens) {
      tiles.push_back({t, static_cast<std::int32_t>(std::min(tokens, last - t)), row});
      row += tiles.back().tokens;
    }
  }
}

/// The list of the tiles is in memory, and no prefill of more of them ends within days.
void check_tiles(const PrefillRange& range, std::int64_t tokens) {
  constexpr std::int64_t most = std::int64_t{1} << 27;
  const std::int64_t positions = range.end - range.first;
  if (positions / tokens > most)
    throw UserError(
        fmt::format("a prefill of {} positions takes too many tiles ({} of {} positions, {} at most); lower "
                    "run.context or raise run.prefill_chunk; decode can do without, by run.fill = "
                    "\"synthetic\"",
                    positions, positions / tokens, tokens, most));
}

std::vector<PrefillChunk> chunks_of(std::vector<PrefillTile>& tiles, const Partition& p, const PrefillRange& range,
                                    std::int64_t tokens) {
  check_tiles(range, tokens);
  std::vector<PrefillChunk> chunks;
  std::int64_t first_row = 0;
  for (const Span& span : range.chunks()) {
    PrefillChunk chunk{span, tiles.size(), 0, first_row, 0};
    add_tiles(tiles, p, chunk.first, chunk.end, tokens);
    chunk.tiles_end = tiles.size();
    if (chunk.tiles_end > chunk.tiles_begin) chunk.rows = tiles.back().local_row + tiles.back().tokens;
    first_row += chunk.rows;
    chunks.push_back(chunk);
  }
  return chunks;
}

std::int64_t rows_of(const std::vector<PrefillChunk>& chunks) {
  return chunks.empty() ? 0 : chunks.back().first_row + chunks.back().rows;
}

}  // namespace

PrefillRunner::PrefillRunner(ModelShard& shard, const PrefillRange& range, bool record)
    : shard_(shard),
      range_(range),
      policy_(policy_of(shard)),
      chunks_(chunks_of(tiles_, shard.partition, range, widest_tile(shard, range).tokens)),
      buffers_(shard.allocator(), shard.kernels(), shard.config, shard.partition, shard.point,
               shard.point.batch * rows_of(chunks_), widest_tile(shard, range), false, record, policy_,
               shard.choose_routes(Phase::prefill, widest_tile(shard, range), policy_)),
      starts_(shard.allocator()(MemoryKind::workspace, static_cast<std::int64_t>(tiles_.size() + chunks_.size()) * 8)) {
  std::vector<std::int64_t> starts;
  for (const PrefillTile& tile : tiles_) starts.push_back(tile.first_position);
  for (const PrefillChunk& chunk : chunks_) starts.push_back(chunk.first);
  shard.device().copy(starts_.data(), starts.data(), starts_.bytes(), shard.streams.compute);
  shard.device().synchronize(shard.streams.compute);

  const Partition& p = shard.partition;
  const bool is_measured = shard.config.kind == TaskKind::prefill && range.first == shard.config.run.prefix;
  if (replays(shard.config) && is_measured)
    recorded_ = shard.allocator()(MemoryKind::activations, shard.planes() * rows_of(chunks_) * p.shape.rules.n_sel * 4);
  const auto make_as = [&](KvPrecision precision, const RowMap& map, std::int64_t rows, std::int64_t ranks = 1) {
    return make_kv(shard.allocator(), MemoryKind::activations, p.shape, precision, shard.planes(), map, rows, ranks);
  };
  const auto make = [&](const RowMap& map, std::int64_t rows, std::int64_t ranks = 1) {  // raw rows of cmp
    return make_as(KvPrecision::same, map, rows, ranks);
  };
  const KvPrecision kv = p.shape.kv_precision;
  if (range.first > 0) prefix_rings_.emplace(shard);
  const std::int64_t tokens = p.capacity(p.tokens(false), range.end);
  raw_ = make(p.raw_cmp(), p.capacity(p.raw_cmp(), range.end));
  if (!p.shape.shared_kv) win_ = make_as(kv, p.tokens(false), tokens);
  const auto clear = [&](const KvPair& pair) {  // rows that a chunk does not write: see AttendArgs::v
    if (pair.v_memory.bytes() == 0) return;
    shard.device().fill(pair.v_memory.data(), 0, pair.v_memory.bytes(), shard.streams.compute);
    shard.device().synchronize(shard.streams.compute);
  };
  if (range.in_parts()) clear(win_);
  // The caches also hold the decode steps; a copy has the row count of the caches.
  const std::int64_t cached = p.capacity(p.tokens(false), total_positions(shard.config, shard.point));
  const std::int64_t compressed =
      p.capacity(p.compressed(false), compressed_tokens(p.shape.rules, total_positions(shard.config, shard.point) - 1));
  if (shard.pages) {
    sel_rows_ = make_as(kv, p.tokens(false), cached);
    cmp_rows_ = make_as(p.shape.cmp_precision, p.compressed(false), compressed);
    for (const KvPair* rows : {&sel_rows_, &cmp_rows_}) {  // past the pages of a shorter sequence too
      shard.device().fill(rows->k_memory.data(), 0, rows->k_memory.bytes(), shard.streams.compute);
      clear(*rows);
    }
  }
  if (p.kv == 1) return;
  sel_all_ = make_as(kv, p.tokens(true), cached, p.kv);
  cmp_all_ = make_as(p.shape.cmp_precision, p.compressed(true), compressed, p.kv);
  if (!p.shape.shared_kv) win_all_ = make_as(kv, p.tokens(true), tokens, p.kv);
  heads_ = make(p.raw_heads(false), p.capacity(p.raw_heads(false), range.end));
  heads_all_ = make(p.raw_heads(true), p.capacity(p.raw_heads(false), range.end), p.kv);
  ring_all_ = make(p.raw_ring(), p.raw_ring().ring, p.kv);
  if (!range.in_parts()) return;
  const std::int64_t piece = widest_chunk(p.tokens(false), range);
  piece_ = make_as(kv, p.tokens(false), piece);
  piece_all_ = make_as(kv, p.tokens(true), piece, p.kv);
  clear(sel_all_);
  clear(win_all_);
}

std::vector<GivenTensor> PrefillRunner::row_inputs() const {
  const Config& config = shard_.config;
  const Point& point = shard_.point;
  const Partition& p = shard_.partition;
  if (config.run.scope == Scope::attention)
    return {{"given/q", q_columns(config, point, p), p.shape.dtype, &buffers_.q},
            {"given/gate", gate_columns(config, point, p), DType::f32, &buffers_.gate}};
  if (config.model.layers > 1) return {{"x", x_columns(config, point), DType::f32, &buffers_.x}};
  return {{"x", x_columns(config, point), p.shape.dtype, &buffers_.x_in}};
}

void PrefillRunner::load_rows(const TensorSource& source) {
  for (const GivenTensor& input : row_inputs())
    source.from_file() ? load_from_file(source, input) : generate(source, input);
  if (recorded_.bytes() > 0) load_selections();
}

void PrefillRunner::load_selections() {
  const std::int64_t width = std::int64_t{shard_.shape().groups} * shard_.shape().rules.n_sel,
                     positions = range_.end - range_.first;
  const std::vector<std::int32_t> lists =
      recorded_lists(shard_.config, shard_.point, shard_.partition, range_.first, positions);
  for (const PrefillChunk& chunk : chunks_)
    for (std::size_t i = chunk.tiles_begin; i < chunk.tiles_end; ++i)
      for (std::int64_t b = 0; b < shard_.point.batch; ++b)
        shard_.device().copy(recorded_.as<std::int32_t>() + row_of_tile(chunk, b, tiles_[i]) * width,
                             lists.data() + (b * positions + tiles_[i].first_position - range_.first) * width,
                             static_cast<std::size_t>(tiles_[i].tokens * width) * 4, shard_.streams.compute);
  shard_.device().synchronize(shard_.streams.compute);
}

void PrefillRunner::load_from_file(const TensorSource& source, const GivenTensor& input) {
  const std::int64_t width = elements_of(input.columns.count), size = static_cast<std::int64_t>(size_of(input.type));
  for (const PrefillChunk& chunk : chunks_)
    for (std::size_t i = chunk.tiles_begin; i < chunk.tiles_end; ++i) {
      const PrefillTile& tile = tiles_[i];
      const std::vector<float> rows = given_rows(source, input.name, input.columns, tile.first_position, tile.tokens);
      for (std::int64_t b = 0; b < shard_.point.batch; ++b) {
        const auto begin = rows.begin() + b * tile.tokens * width;
        upload(shard_, std::vector<float>(begin, begin + tile.tokens * width), input.type,
               input.memory->as<std::byte>() + row_of_tile(chunk, b, tile) * width * size);
      }
    }
}

void PrefillRunner::generate(const TensorSource& source, const GivenTensor& input) {
  KvView rows;
  rows.map = shard_.partition.tokens(false);
  rows.width = static_cast<std::int32_t>(elements_of(input.columns.count));
  for (const PrefillChunk& chunk : chunks_) {
    rows.plane_stride = chunk.rows * rows.width;
    // The chunk's first row is the first that is written: earlier rows of the map would lie before the memory.
    const std::int64_t before = shard_.point.batch * chunk.first_row - owned_rows(rows.map, chunk.first);
    rows.data = input.memory->as<std::byte>() + before * rows.width * static_cast<std::int64_t>(size_of(input.type));
    make_rows(shard_, source, input.name, input.columns, input.type, rows, chunk.first, chunk.end);
  }
}

void PrefillRunner::load_kv(const TensorSource& source) {
  fill_kv(shard_, source, sel, shard_.caches[0].sel, range_.first, range_.end);
  fill_kv(shard_, source, cmp, raw_, range_.first, range_.end);
  if (!shard_.shape().shared_kv) fill_kv(shard_, source, win, win_, range_.first, range_.end);
}

void PrefillRunner::snapshot() {
  if (prefix_rings_) prefix_rings_->save();
}

void PrefillRunner::restore() {
  if (prefix_rings_) prefix_rings_->restore();
}

template <class Body>
void PrefillRunner::each_tile(const PrefillChunk& chunk, Body&& body) {
  const std::int64_t work_tiles = shard_.config.model.layers * shard_.point.batch * tile_count();
  for (std::int64_t b = 0; b < shard_.point.batch; ++b)
    for (std::size_t i = chunk.tiles_begin; i < chunk.tiles_end; ++i) {
      const QueryTile rows{static_cast<std::int32_t>(b), 1, tiles_[i].tokens, starts_.as<std::int64_t>() + i,
                           chunk.end};
      body(tiles_[i], rows, row_of_tile(chunk, b, tiles_[i]));
      if (watch_) watch_(static_cast<double>(++tiles_done_) / static_cast<double>(2 * work_tiles));
    }
}

StepContext PrefillRunner::context(std::int64_t layer, const StepOptions& options, const CacheViews& caches,
                                   const QueryTile& rows, std::int64_t first_row) {
  return {.shard = shard_,
          .buffers = buffers_,
          .options = options,
          .phase = Phase::prefill,
          .layer = layer,
          .first_row = first_row,
          .exchanges = false,
          .sharded = false,
          .one_launch = false,
          .stage = {shard_.shape(), rows, policy_, buffers_.scratch.data(), buffers_.scratch.bytes()},
          .k = {caches.k[cmp], caches.k[sel], caches.k[win]},
          .v = {caches.v[cmp], caches.v[sel], caches.v[win]}};
}

void PrefillRunner::project_rows(const PrefillChunk& chunk, std::int64_t layer, const StepOptions& options,
                                 StageTimer& timer) {
  LayerCaches& cache = shard_.caches[static_cast<std::size_t>(layer)];
  each_tile(chunk, [&](const PrefillTile&, const QueryTile& rows, std::int64_t first_row) {
    const StepContext ctx = context(layer, options, {}, rows, first_row);
    timer.time(Stage::project, [&] { project(ctx); });
    timer.time(Stage::append, [&] {
      append(ctx, sel, cache.sel.k, cache.sel.v);
      append(ctx, cmp, raw_.k, raw_.v);
      if (!shard_.shape().shared_kv) append(ctx, win, win_.k, win_.v);
    });
  });
}

void PrefillRunner::compress_rows(const PrefillChunk& chunk, std::int64_t layer) {
  const std::int64_t index = &chunk - chunks_.data();
  const QueryTile rows{0, static_cast<std::int32_t>(shard_.point.batch),
                       static_cast<std::int32_t>(chunk.end - chunk.first),
                       starts_.as<std::int64_t>() + std::ssize(tiles_) + index, chunk.end};
  CompressArgs args{{shard_.shape(), rows, policy_, buffers_.scratch.data(), buffers_.scratch.bytes()}};
  if (shard_.config.run.scope == Scope::layer) {
    args.phi_k = shard_.weights[layer].layer().phi_k;
    args.phi_v = shard_.weights[layer].layer().phi_v;
  }
  args.k_raw = raw_.k;
  args.v_raw = raw_.v;
  args.k_cmp = shard_.caches[layer].cmp.k;
  args.v_cmp = shard_.caches[layer].cmp.v;
  shard_.kernels().compress(args, shard_.streams.compute);
}

void PrefillRunner::copy_recorded(const StepContext& ctx) {
  const std::int64_t width = std::int64_t{shard_.shape().groups} * shard_.shape().rules.n_sel;
  shard_.device().copy(buffers_.selected.data(), recorded_.as<std::int32_t>() + ctx.first_row * width,
                       static_cast<std::size_t>(ctx.stage.tile.rows() * width) * 4, shard_.streams.compute);
}

void PrefillRunner::staged_attention(const StepContext& ctx, StageTimer& timer) {
  timer.time(Stage::attend_cmp, [&] { attend(ctx, cmp); });
  if (ctx.ranks_blocks()) timer.time(Stage::rank, [&] { score_blocks(ctx); });
  if (recorded_.bytes() > 0) copy_recorded(ctx);
  if (!ctx.leaves_out(sel)) timer.time(Stage::attend_sel, [&] { attend(ctx, sel); });
  if (!ctx.leaves_out(win)) timer.time(Stage::attend_win, [&] { attend(ctx, win); });
  timer.time(Stage::combine, [&] { combine(ctx); });
}

// The fused operation accepts some tiles and options only. After a launch that fails, tiles run stage by stage. Ranks
// depend on each other between layers, not between tiles, so each rank decides alone.
void PrefillRunner::attention(const StepContext& ctx, StageTimer& timer) {
  if (fuses_attention_ && !replays(shard_.config) && !timer.per_stage() && has_fused_attention(ctx)) {
    try {
      return fused_attention(ctx);
    } catch (const LaunchError&) {
      fuses_attention_ = false;
    }
  }
  staged_attention(ctx, timer);
}

void PrefillRunner::attend_rows(const PrefillChunk& chunk, std::int64_t layer, const StepOptions& options,
                                const CacheViews& caches, StageTimer& timer, const OnTile& on_tile) {
  const bool last_layer = layer + 1 == shard_.config.model.layers;
  each_tile(chunk, [&](const PrefillTile& tile, const QueryTile& rows, std::int64_t first_row) {
    const StepContext ctx = context(layer, options, caches, rows, first_row);
    attention(ctx, timer);
    if (ctx.whole_layer()) timer.time(Stage::output, [&] { output(ctx); });
    if (on_tile && last_layer) on_tile(ctx, tile);
  });
  if (shard_.config.run.scope == Scope::layer)
    timer.time(Stage::comm, [&] {
      const std::int64_t batch = shard_.point.batch;
      sum_outputs(context(layer, options, caches, {}, batch * chunk.first_row), batch * chunk.rows);
    });
}

void PrefillRunner::start() {
  fault::at("prefill.start");
  tiles_done_ = 0;
  shard_.device().fill(buffers_.reads.data(), 0, buffers_.reads.bytes(), shard_.streams.compute);
}

PrefillRunner::CacheViews PrefillRunner::make_caches(const PrefillChunk& chunk, std::int64_t layer,
                                                     const StepOptions& options, StageTimer& timer) {
  timer.time(Stage::append, [&] { read_rings(chunk, layer); });
  if (shard_.config.run.scope == Scope::layer) project_rows(chunk, layer, options, timer);
  const bool gathers = shard_.partition.kv > 1, overlap = gathers && !timer.per_stage();
  timer.time(Stage::comm, [&] { exchange_raw_halo(chunk); });
  // Compression hides the largest exchange. A communicator has one exchange under way at a time.
  if (overlap) shard_.streams.on_side([&](Stream* side) { gather_tokens(chunk, layer, side); });
  timer.time(Stage::compress, [&] { compress_rows(chunk, layer); });
  if (overlap) shard_.streams.wait_side();
  timer.time(Stage::comm, [&] {
    if (gathers && !overlap) gather_tokens(chunk, layer, shard_.streams.compute);
    if (gathers) gather_compressed(chunk, layer);
  });
  CacheViews caches;
  timer.time(Stage::append, [&] {
    caches = gathered(chunk, layer);
    fill_rings(chunk, layer, caches);
  });
  return caches;
}

void PrefillRunner::run(StageTimer& timer, const StepOptions& options, const OnTile& on_tile) {
  start();
  for (const PrefillChunk& chunk : chunks_)
    for (std::int64_t layer = 0; layer < shard_.config.model.layers; ++layer)
      run_layer(chunk, layer, timer, options, on_tile);
}

void PrefillRunner::run_layer(const PrefillChunk& chunk, std::int64_t layer, StageTimer& timer,
                              const StepOptions& options, const OnTile& on_tile) {
  const CacheViews caches = make_caches(chunk, layer, options, timer);
  const Buffer& k_sel = shard_.caches[static_cast<std::size_t>(layer)].sel.k_memory;
  fault::flip("cache.k", shard_.device(), k_sel.data(), k_sel.bytes(), shard_.streams.compute);
  attend_rows(chunk, layer, options, caches, timer, on_tile);
}

void PrefillRunner::fill_caches(StageTimer& timer) {
  start();
  for (const PrefillChunk& chunk : chunks_)
    for (std::int64_t layer = 0; layer < shard_.config.model.layers; ++layer) {
      const CacheViews caches = make_caches(chunk, layer, {}, timer);
      if (layer + 1 < shard_.config.model.layers) attend_rows(chunk, layer, {}, caches, timer, nullptr);
    }
}

}  // namespace nsa
