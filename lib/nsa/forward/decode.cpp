#include "nsa/forward/decode.hpp"

#include <algorithm>
#include <iterator>
#include <utility>

#include "comm/agreement.hpp"

namespace nsa {

namespace {

// Positions that the backend keeps: one for all sequences, or one each.
bool own_positions(const Config& config, const Point& point) {
  return point.ragged() || !accepts_all(acceptance_of(config, point));
}
std::int64_t position_count(const Config& config, const Point& point) {
  return own_positions(config, point) ? point.batch : 1;
}

std::int64_t query_rows(const Point& point) { return point.batch * point.query_tokens; }

// A draft token that its step rejects has the negative of the values of the token that takes its place.
float sign_of(const StepPositions& positions, std::int64_t step, std::int64_t b, std::int64_t j) {
  return j < positions.kept(step, b) ? 1.0f : -1.0f;
}

// Values of all positions that the steps reach, from each sequence's first one on, [batch][positions][width], as
// [steps][batch][query tokens][width].
template <class T>
std::vector<T> by_step(const std::vector<T>& values, const Point& point, const StepPositions& positions,
                       std::int64_t steps) {
  const std::int64_t tokens = point.query_tokens, reached = steps * tokens,
                     width = static_cast<std::int64_t>(values.size()) / (point.batch * reached);
  std::vector<T> result;
  result.reserve(values.size());
  for (std::int64_t step = 0; step < steps; ++step)
    for (std::int64_t b = 0; b < point.batch; ++b)
      for (std::int64_t j = 0; j < tokens; ++j) {
        const auto sign = static_cast<T>(sign_of(positions, step, b, j));
        const auto from = values.begin() + (b * reached + positions(step, b) + j - point.length(b)) * width;
        std::transform(from, from + width, std::back_inserter(result), [&](T value) { return sign * value; });
      }
  return result;
}

}  // namespace

QueryTile decode_tile(const ModelShard& shard, const std::int64_t* positions) {
  const Point& point = shard.point;
  return {.batches = static_cast<std::int32_t>(point.batch),
          .tokens = static_cast<std::int32_t>(point.query_tokens),
          .first_position = positions,
          .max_positions = total_positions(shard.config, point),
          .position_stride = own_positions(shard.config, point),
          .mean_positions = point.context + shard.config.run.steps * point.query_tokens,
          .decodes = true};
}

DecodeRunner::DecodeRunner(ModelShard& shard, const TensorSource* source, bool record)
    : shard_(shard),
      buffers_(shard.allocator(), shard.kernels(), shard.config, shard.partition, shard.point, query_rows(shard.point),
               decode_tile(shard, nullptr), shard.partition.kv > 1, record, {},
               shard.choose_routes(Phase::decode, decode_tile(shard, nullptr), {})),
      positions_(shard.allocator()(MemoryKind::workspace, 8 * position_count(shard.config, shard.point))),
      step_(shard.allocator()(MemoryKind::workspace, 8)),
      stamps_(shard.allocator()(MemoryKind::workspace, 8 * (1 + 2 * shard.config.run.steps))),
      step_positions_(shard.config, shard.point),
      rings_(shard) {
  const LayerShape& s = shard.shape();
  const std::int64_t steps = shard.config.run.steps, rows = query_rows(shard.point), lists = rows * s.groups,
                     storage = static_cast<std::int64_t>(size_of(s.dtype));
  const auto make = [&](std::int64_t bytes) { return shard.allocator()(MemoryKind::activations, bytes); };
  selected_count_ = shard.config.model.layers * lists * s.rules.n_sel;
  reads_log_ = make(steps * branches * shard.planes() * 8);
  selected_log_ = make(steps * selected_count_ * 4);
  if (shard.partition.kv > 1) readings_ = shard.allocator()(MemoryKind::workspace, lists * step_readings * 8);
  if (shard.config.run.scope == Scope::layer) {
    x_steps_ = make(steps * rows * s.dim * (shard.config.model.layers > 1 ? 4 : storage));
  } else {
    q_steps_ = make(steps * rows * s.heads() * s.d_k * storage);
    gate_steps_ = make(steps * lists * 3 * 4);
    for (const Branch c : kv_column_order) {
      if (s.shared_kv && c != sel) continue;
      k_steps_[c] = make(steps * lists * s.d_k * storage);
      v_steps_[c] = make(steps * lists * s.d_v * storage);
    }
  }
  if (replays(shard.config)) recorded_steps_ = make(steps * selected_count_ * 4);
  if (source) load_inputs(*source);
}

std::vector<GivenTensor> DecodeRunner::step_inputs() const {
  const Config& config = shard_.config;
  const Point& point = shard_.point;
  const Partition& p = shard_.partition;
  const DType storage = p.shape.dtype;
  if (config.run.scope == Scope::layer)
    return {{"x", x_columns(config, point), config.model.layers > 1 ? DType::f32 : storage, &x_steps_}};
  std::vector<GivenTensor> inputs = {{"given/q", q_columns(config, point, p), storage, &q_steps_},
                                     {"given/gate", gate_columns(config, point, p), DType::f32, &gate_steps_}};
  for (const Branch c : kv_column_order) {
    if (p.shape.shared_kv && c != sel) continue;
    inputs.push_back({kv_name(p.shape, c, false), kv_columns(config, point, p, false), storage, &k_steps_[c]});
    inputs.push_back({kv_name(p.shape, c, true), kv_columns(config, point, p, true), storage, &v_steps_[c]});
  }
  return inputs;
}

void DecodeRunner::load_inputs(const TensorSource& source) {
  for (const GivenTensor& input : step_inputs())
    source.from_file() ? load_from_file(source, input) : generate(source, input);
  if (replays(shard_.config)) load_selections();
}

void DecodeRunner::load_selections() {
  const std::int64_t steps = shard_.config.run.steps;
  const std::vector<std::int32_t> lists =
      by_step(recorded_lists(shard_.config, shard_.point, shard_.partition, shard_.point.context, steps), shard_.point,
              step_positions_, steps);
  shard_.device().copy(recorded_steps_.data(), lists.data(), recorded_steps_.bytes(), shard_.streams.compute);
  shard_.device().synchronize(shard_.streams.compute);
}

void DecodeRunner::load_from_file(const TensorSource& source, const GivenTensor& input) {
  const std::int64_t steps = shard_.config.run.steps;
  std::vector<float> rows;  // [batch][positions][width]
  for (const SequenceRange& some : equal_sequences(shard_.point)) {
    const std::vector<float> own = given_rows(source, input.name, input.columns, shard_.point.length(some.begin),
                                              steps * shard_.point.query_tokens, some);
    rows.insert(rows.end(), own.begin(), own.end());
  }
  upload(shard_, by_step(rows, shard_.point, step_positions_, steps), input.type, input.memory->data());
}

void DecodeRunner::generate(const TensorSource& source, const GivenTensor& input) {
  const Point& point = shard_.point;
  KvView rows;  // of one query token of a step: a ring of one row, which every position maps to
  rows.map.ring = 1;
  rows.width = static_cast<std::int32_t>(elements_of(input.columns.count));
  rows.plane_stride = point.query_tokens * rows.width;
  const std::int64_t bytes = rows.width * static_cast<std::int64_t>(size_of(input.type));
  const std::vector<SequenceRange> equal =
      own_positions(shard_.config, point) ? single_sequences(point) : equal_sequences(point);
  for (std::int64_t step = 0; step < shard_.config.run.steps; ++step)
    for (std::int64_t j = 0; j < point.query_tokens; ++j) {
      rows.data = input.memory->as<std::byte>() + (step * query_rows(point) + j) * bytes;
      for (const SequenceRange& some : equal) {
        const std::int64_t position = step_positions_(step, some.begin) + j;
        make_rows(shard_, source, input.name, input.columns, input.type, rows, position, position + 1, &some,
                  sign_of(step_positions_, step, some.begin, j));
      }
    }
}

void DecodeRunner::snapshot() {
  rings_.save();
  restore();
}

void DecodeRunner::restore() {
  const DeviceOps& device = shard_.device();
  Stream* stream = shard_.streams.compute;
  rings_.restore();
  const Point& point = shard_.point;
  std::vector<std::int64_t> first;
  for (std::int64_t b = 0; b < position_count(shard_.config, point); ++b) first.push_back(point.length(b));
  device.copy(positions_.data(), first.data(), positions_.bytes(), stream);
  device.fill(step_.data(), 0, 8, stream);
  device.fill(stamps_.data(), 0, 8, stream);
  device.fill(buffers_.reads.data(), 0, buffers_.reads.bytes(), stream);
  device.fill(reads_log_.data(), 0, reads_log_.bytes(), stream);
  device.synchronize(stream);
}

void DecodeRunner::load(std::int64_t step, const StepOptions& options) {
  const auto copy = [&](const Buffer& to, const Buffer& steps, std::int64_t bytes) {
    shard_.device().copy(to.data(), steps.as<std::byte>() + step * bytes, static_cast<std::size_t>(bytes),
                         shard_.streams.compute);
  };
  const auto bytes_a_step = [&](const Buffer& steps) {
    return static_cast<std::int64_t>(steps.bytes()) / shard_.config.run.steps;
  };
  if (recorded_steps_.bytes() > 0) copy(buffers_.selected, recorded_steps_, bytes_a_step(recorded_steps_));
  if (shard_.config.run.scope == Scope::layer)
    return copy(shard_.config.model.layers > 1 ? buffers_.x : buffers_.x_in, x_steps_, bytes_a_step(x_steps_));
  copy(buffers_.q, q_steps_, bytes_a_step(q_steps_));
  if (options.force_branch < 0) {
    copy(buffers_.gate, gate_steps_, bytes_a_step(gate_steps_));
  } else {
    const std::int64_t lists = query_rows(shard_.point) * shard_.shape().groups;
    std::vector<float> one_hot(static_cast<std::size_t>(lists * branches), 0.0f);
    for (std::int64_t i = 0; i < lists; ++i) one_hot[i * branches + options.force_branch] = 1.0f;
    shard_.device().copy(buffers_.gate.data(), one_hot.data(), one_hot.size() * 4, shard_.streams.compute);
    shard_.device().synchronize(shard_.streams.compute);
  }
  for (int c = 0; c < branches; ++c) {
    if (k_steps_[c].bytes() == 0) continue;
    copy(buffers_.k[c], k_steps_[c], bytes_a_step(k_steps_[c]));
    copy(buffers_.v[c], v_steps_[c], bytes_a_step(v_steps_[c]));
  }
}

StepContext DecodeRunner::context(std::int64_t layer, const StepOptions& options, const StepPlan& plan) {
  const LayerCaches& cache = shard_.caches[static_cast<std::size_t>(layer)];
  const auto windowed = [&](KvView view) {
    view.map = shard_.partition.window_share();
    return view;
  };
  const StageArgs stage{shard_.shape(),
                        decode_tile(shard_, positions_.as<std::int64_t>()),
                        {},
                        buffers_.scratch.data(),
                        buffers_.scratch.bytes()};
  return {.shard = shard_,
          .buffers = buffers_,
          .options = options,
          .phase = Phase::decode,
          .layer = layer,
          .first_row = 0,
          .exchanges = shard_.partition.kv > 1,
          .sharded = plan.attention == Attention::sharded,
          .one_launch = plan.one_launch && !options.record,
          .stage = stage,
          .k = {cache.cmp.k, cache.sel.k, windowed(cache.win.k)},
          .v = {cache.cmp.v, cache.sel.v, windowed(cache.win.v)}};
}

void DecodeRunner::staged_prologue(const StepContext& ctx, StageTimer& timer) {
  LayerCaches& cache = shard_.caches[static_cast<std::size_t>(ctx.layer)];
  if (ctx.whole_layer()) timer.time(Stage::project, [&] { project(ctx); });
  timer.time(Stage::append, [&] {
    append(ctx, sel, cache.sel.k, cache.sel.v);
    append(ctx, win, cache.win.k, cache.win.v);
    append(ctx, cmp, cache.raw.k, cache.raw.v);
  });
  timer.time(Stage::compress, [&] { compress(ctx); });
}

void DecodeRunner::exchange(const StepContext& ctx, StageTimer& timer, void (*what)(const StepContext&, Stream*)) {
  if (ctx.exchanges) timer.time(Stage::comm, [&] { what(ctx, ctx.stream()); });
}

void DecodeRunner::on_side_stream(const StepContext& ctx, void (*what)(const StepContext&, Stream*)) {
  shard_.streams.on_side([&](Stream* side) { what(ctx, side); });
}

void DecodeRunner::staged_attention(const StepContext& ctx, StageTimer& timer) {
  timer.time(Stage::attend_cmp, [&] { attend(ctx, cmp); });
  const bool overlap = ctx.exchanges && !timer.per_stage();  // the window branch hides the exchange of lse
  overlap ? on_side_stream(ctx, exchange_lse) : exchange(ctx, timer, exchange_lse);
  if (!ctx.leaves_out(win)) timer.time(Stage::attend_win, [&] { attend(ctx, win); });
  if (overlap) shard_.streams.wait_side();
  if (ctx.ranks_blocks()) {
    timer.time(Stage::rank, [&] { score_blocks(ctx); });
    exchange(ctx, timer, exchange_candidates);
    if (ctx.exchanges) timer.time(Stage::rank, [&] { select_blocks(ctx); });
  }
  if (!ctx.leaves_out(sel)) timer.time(Stage::attend_sel, [&] { attend(ctx, sel); });
  exchange(ctx, timer, exchange_partials);
  timer.time(Stage::combine, [&] { combine(ctx); });
}

void DecodeRunner::sharded_attention(const StepContext& ctx, StageTimer& timer) {
  const bool gated = ctx.exchanges_gated();
  local_attention(ctx);
  exchange(ctx, timer, exchange_lse);
  if (ctx.leaves_out(sel)) {
    if (gated) normalise_partials(ctx, ctx.stream());
  } else {
    score_blocks(ctx);
    if (gated) on_side_stream(ctx, normalise_partials);  // only the last exchange waits for it
    exchange(ctx, timer, exchange_candidates);
    select_blocks(ctx);
    attend(ctx, sel);
    if (gated) shard_.streams.wait_side();
  }
  exchange(ctx, timer, exchange_partials);
  gated ? merge_ranks(ctx) : combine(ctx);
}

void DecodeRunner::output_projection(const StepContext& ctx, StageTimer& timer) {
  if (!ctx.whole_layer()) return;
  timer.time(Stage::output, [&] { output(ctx); });
  timer.time(Stage::comm, [&] { sum_outputs(ctx, query_rows(shard_.point)); });
}

StepPlan DecodeRunner::probe() {
  StageTimer untimed(shard_.device(), shard_.streams.compute);
  const auto launches = [&](auto&& body) {
    try {
      body();
      shard_.device().synchronize(shard_.streams.compute);
    } catch (const LaunchError&) {
      return false;
    }
    return true;
  };
  StepPlan plan;
  const Attention wanted = shard_.partition.kv > 1 ? Attention::sharded : Attention::fused;
  const StepContext ctx = context(0, {}, {.attention = wanted});
  restore();
  load(0, {});
  if (!ctx.exchanges && !replays(shard_.config) && has_decode_layer(ctx, step_log()) &&
      launches([&] { decode_layer(ctx, step_log(), false); })) {
    plan.fused_layer = true;
    restore();
    return plan;
  }
  if (has_fused_prologue(ctx) && launches([&] { fused_prologue(ctx); }))
    plan.prologue = Prologue::fused;
  else
    staged_prologue(ctx, untimed);
  if (replays(shard_.config)) {  // a fused operation ranks blocks too
    restore();
    return plan;
  }
  plan.one_launch = has_sharded_step(ctx) && launches([&] { try_sharded_step(ctx); });
  plan.fused_layer = plan.one_launch && has_decode_layer(ctx, step_log());
  const bool launched = wanted == Attention::fused ? has_fused_attention(ctx) && launches([&] { fused_attention(ctx); })
                                                   : has_sharded_attention(ctx) && launches([&] {
                                                       local_attention(ctx);
                                                       normalise_partials(ctx, ctx.stream());
                                                       merge_ranks(ctx);
                                                     });
  if (launched) plan.attention = wanted;
  restore();
  return plan;
}

void DecodeRunner::choose_plan(const ControlComm& world) {
  StepPlan plan;
  agreed(world, [&] { plan = probe(); });
  const auto any = [&](bool here) { return world.max(std::int64_t{here}) == 1; };
  if (any(plan.prologue == Prologue::staged)) plan.prologue = Prologue::staged;
  if (any(plan.attention == Attention::staged)) plan.attention = Attention::staged;
  if (any(!plan.one_launch)) plan.one_launch = false;
  if (any(!plan.fused_layer) || (shard_.partition.kv > 1 && !plan.one_launch)) plan.fused_layer = false;
  plan_ = plan;
}

void DecodeRunner::step(const StepOptions& options, StageTimer& timer) {
  StepPlan plan = timer.per_stage() ? StepPlan{} : plan_;  // the default plan runs stage by stage
  if (options.record && shard_.partition.kv > 1) plan.fused_layer = false;
  for (std::int64_t layer = 0; layer < shard_.config.model.layers; ++layer) {
    const StepContext ctx = context(layer, options, plan);
    if (plan.fused_layer) {
      decode_layer(ctx, step_log(), layer + 1 == shard_.config.model.layers);
    } else {
      plan.prologue == Prologue::fused ? fused_prologue(ctx) : staged_prologue(ctx, timer);
      attention(plan.attention, ctx, timer);
    }
    output_projection(ctx, timer);
    if (rest_) rest_(layer, options, timer);
  }
  if (!plan.fused_layer) shard_.kernels().advance(step_log(), shard_.streams.compute);
}

void DecodeRunner::attention(Attention attention, const StepContext& ctx, StageTimer& timer) {
  if (ctx.one_launch) return sharded_step(ctx);
  switch (attention) {
    case Attention::fused:
      return fused_attention(ctx);
    case Attention::sharded:
      return sharded_attention(ctx, timer);
    case Attention::staged:
      return staged_attention(ctx, timer);
  }
}

AdvanceArgs DecodeRunner::step_log() const {
  AdvanceArgs args;
  args.position = positions_.as<std::int64_t>();
  args.positions = position_count(shard_.config, shard_.point);
  args.acceptance = acceptance_of(shard_.config, shard_.point);
  args.step = step_.as<std::int64_t>();
  args.reads = buffers_.reads.as<std::int64_t>();
  args.reads_log = reads_log_.as<std::int64_t>();
  args.counters = branches * shard_.planes();
  args.log_steps = shard_.config.run.steps;
  args.selected = buffers_.selected.as<std::int32_t>();
  args.selected_log = selected_log_.as<std::int32_t>();
  args.selected_count = selected_count_;
  return args;
}

void DecodeRunner::stamp() { shard_.device().stamp(stamps_.as<std::int64_t>(), shard_.streams.compute); }

std::vector<std::int64_t> DecodeRunner::stamps() const {
  std::vector<std::int64_t> ring(1 + 2 * static_cast<std::size_t>(shard_.config.run.steps));
  shard_.device().copy(ring.data(), stamps_.data(), ring.size() * 8, shard_.streams.compute);
  shard_.device().synchronize(shard_.streams.compute);
  const auto count = static_cast<std::ptrdiff_t>(ring.front());
  return {ring.begin() + 1, ring.begin() + 1 + count};
}

void DecodeRunner::align(const StepOptions& options) {
  const StepContext ctx = last_layer(options);
  if (ctx.one_launch) align_ranks(ctx);
}

void DecodeRunner::complete_output(const StepOptions& options) {
  const StepContext ctx = last_layer(options);
  if (ctx.one_launch) gather_heads(ctx);
}

StepOptions DecodeRunner::with_readings(StepOptions options) {
  options.readings = readings_.as<std::int64_t>();
  return options;
}

void DecodeRunner::clear_readings() {
  shard_.device().fill(readings_.data(), 0, readings_.bytes(), shard_.streams.compute);
}

// Cycles become seconds by what both clocks say of all work items.
std::vector<double> DecodeRunner::phase_seconds() const {
  const auto readings = download_longs(shard_, readings_.data(), static_cast<std::int64_t>(readings_.bytes() / 8));
  std::vector<double> cycles(step_phase_count, 0.0);
  double all_cycles = 0, all_seconds = 0;
  for (auto item = readings.begin(); item != readings.end(); item += step_readings) {
    std::int64_t last = item[0];
    for (int phase = 0; phase < step_phase_count; ++phase) {
      const std::int64_t end = std::max(last, item[phase + 1]);  // 0: the step had no such phase
      cycles[static_cast<std::size_t>(phase)] += static_cast<double>(end - std::exchange(last, end));
    }
    all_cycles += static_cast<double>(last - item[0]);
    all_seconds += 1e-9 * static_cast<double>(item[step_phase_count + 2] - item[step_phase_count + 1]);
  }
  for (double& x : cycles) x *= all_seconds / all_cycles * step_readings / static_cast<double>(readings.size());
  return cycles;
}

StepContext DecodeRunner::last_layer(const StepOptions& options) {
  return context(shard_.config.model.layers - 1, options, plan_);
}

}  // namespace nsa
