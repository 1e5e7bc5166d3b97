#include "nsa/forward/decode.hpp"

#include <algorithm>

#include "nsa/model/inputs.hpp"

namespace nsa {

namespace {

QueryTile decode_tile(const ModelShard& e, const std::int64_t* position) {
  return {0, static_cast<std::int32_t>(e.point.batch), 1, position, total_positions(e.config, e.point)};
}

// [batch][steps][width] -> [steps][batch][width]
std::vector<float> by_step(const std::vector<float>& rows, std::int64_t batch, std::int64_t steps) {
  std::vector<float> result(rows.size());
  const std::int64_t width = static_cast<std::int64_t>(rows.size()) / (batch * steps);
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t s = 0; s < steps; ++s)
      std::copy_n(rows.begin() + (b * steps + s) * width, width, result.begin() + (s * batch + b) * width);
  return result;
}

std::vector<Buffer*> rings_of(LayerCaches& cache) {
  return {&cache.win.k_memory, &cache.win.v_memory, &cache.raw.k_memory, &cache.raw.v_memory};
}

}  // namespace

DecodeRunner::DecodeRunner(ModelShard& e, const TensorSource* source, bool record)
    : shard_(e),
      buffers_(e.allocator(), e.kernels(), e.config, e.partition, e.point, e.point.batch, decode_tile(e, nullptr),
               e.partition.kv > 1, record, e.choose_routes(Phase::decode, decode_tile(e, nullptr))),
      position_(e.allocator()(MemoryKind::workspace, 8)),
      step_(e.allocator()(MemoryKind::workspace, 8)) {
  const LayerShape& s = e.shape();
  const std::int64_t steps = e.config.run.steps, batch = e.point.batch,
                     storage = static_cast<std::int64_t>(size_of(s.dtype));
  const auto make = [&](std::int64_t bytes) { return e.allocator()(MemoryKind::activations, bytes); };
  selected_count_ = e.config.model.layers * e.planes() * s.rules.n_sel;
  reads_log_ = make(steps * branches * e.planes() * 8);
  selected_log_ = make(steps * selected_count_ * 4);
  if (e.config.run.scope == Scope::layer) {
    x_steps_ = make(steps * batch * s.dim * (e.config.model.layers > 1 ? 4 : storage));
  } else {
    q_steps_ = make(steps * batch * s.heads() * s.d_k * storage);
    gate_steps_ = make(steps * e.planes() * 3 * 4);
    for (const Branch c : kv_column_order) {
      if (s.shared_kv && c != sel) continue;
      k_steps_[c] = make(steps * e.planes() * s.d_k * storage);
      v_steps_[c] = make(steps * e.planes() * s.d_v * storage);
    }
  }
  for (LayerCaches& cache : e.caches)
    for (const Buffer* ring : rings_of(cache)) snapshot_.push_back(make(static_cast<std::int64_t>(ring->bytes())));
  if (source) load_inputs(*source);
}

void DecodeRunner::load_inputs(const TensorSource& source) {
  ModelShard& e = shard_;
  if (!source.from_file()) return make_inputs(source);
  const std::int64_t steps = e.config.run.steps, batch = e.point.batch;
  const auto rows = [&](const std::string& name, const Columns& columns) {
    return by_step(given_rows(source, name, columns, e.point.context, steps), batch, steps);
  };
  const auto upload_floats = [&](const std::vector<float>& values, const Buffer& to) {
    e.device().copy(to.data(), values.data(), values.size() * 4, e.streams.compute);
    e.device().synchronize(e.streams.compute);
  };
  if (e.config.run.scope == Scope::layer) {
    const std::vector<float> x = rows("x", x_columns(e.config, e.point));
    return e.config.model.layers > 1 ? upload_floats(x, x_steps_) : upload(e, x, x_steps_.data());
  }
  upload(e, rows("given/q", q_columns(e.config, e.point, e.partition)), q_steps_.data());
  upload_floats(rows("given/gate", gate_columns(e.config, e.point, e.partition)), gate_steps_);
  for (const Branch c : kv_column_order) {
    if (e.shape().shared_kv && c != sel) continue;
    upload(e, rows(kv_name(e.shape(), c, false), kv_columns(e.config, e.point, e.partition, false)),
           k_steps_[c].data());
    upload(e, rows(kv_name(e.shape(), c, true), kv_columns(e.config, e.point, e.partition, true)), v_steps_[c].data());
  }
}

void DecodeRunner::make_inputs(const TensorSource& source) {
  ModelShard& e = shard_;
  const DType storage = e.shape().dtype;
  const auto make = [&](const std::string& name, const Columns& columns, DType type, const Buffer& steps) {
    KvView rows;  // of one step: position i, wherever it is, is the only row
    rows.map.ring = 1;
    rows.width = static_cast<std::int32_t>(elements_of(columns.count));
    rows.plane_stride = rows.width;
    const std::int64_t bytes = e.point.batch * rows.width * static_cast<std::int64_t>(size_of(type));
    for (std::int64_t step = 0; step < e.config.run.steps; ++step) {
      rows.data = steps.as<std::byte>() + step * bytes;
      make_rows(e, source, name, columns, type, rows, e.point.context + step, e.point.context + step + 1);
    }
  };
  if (e.config.run.scope == Scope::layer)
    return make("x", x_columns(e.config, e.point), e.config.model.layers > 1 ? DType::f32 : storage, x_steps_);
  make("given/q", q_columns(e.config, e.point, e.partition), storage, q_steps_);
  make("given/gate", gate_columns(e.config, e.point, e.partition), DType::f32, gate_steps_);
  for (const Branch c : kv_column_order) {
    if (e.shape().shared_kv && c != sel) continue;
    make(kv_name(e.shape(), c, false), kv_columns(e.config, e.point, e.partition, false), storage, k_steps_[c]);
    make(kv_name(e.shape(), c, true), kv_columns(e.config, e.point, e.partition, true), storage, v_steps_[c]);
  }
}

void DecodeRunner::snapshot() {
  std::size_t i = 0;
  for (LayerCaches& cache : shard_.caches)
    for (const Buffer* ring : rings_of(cache))
      shard_.device().copy(snapshot_[i++].data(), ring->data(), ring->bytes(), shard_.streams.compute);
  restore();
}

void DecodeRunner::restore() {
  const DeviceOps& device = shard_.device();
  Stream* stream = shard_.streams.compute;
  std::size_t i = 0;
  for (LayerCaches& cache : shard_.caches)
    for (const Buffer* ring : rings_of(cache)) device.copy(ring->data(), snapshot_[i++].data(), ring->bytes(), stream);
  device.copy(position_.data(), &shard_.point.context, 8, stream);
  device.fill(step_.data(), 0, 8, stream);
  device.fill(buffers_.reads.data(), 0, buffers_.reads.bytes(), stream);
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
  if (shard_.config.run.scope == Scope::layer)
    return copy(shard_.config.model.layers > 1 ? buffers_.x : buffers_.x_in, x_steps_, bytes_a_step(x_steps_));
  copy(buffers_.q, q_steps_, bytes_a_step(q_steps_));
  if (options.force_branch < 0) {
    copy(buffers_.gate, gate_steps_, bytes_a_step(gate_steps_));
  } else {
    std::vector<float> one_hot(static_cast<std::size_t>(shard_.planes() * branches), 0.0f);
    for (std::int64_t p = 0; p < shard_.planes(); ++p) one_hot[p * branches + options.force_branch] = 1.0f;
    shard_.device().copy(buffers_.gate.data(), one_hot.data(), one_hot.size() * 4, shard_.streams.compute);
    shard_.device().synchronize(shard_.streams.compute);
  }
  for (int c = 0; c < branches; ++c) {
    if (k_steps_[c].bytes() == 0) continue;
    copy(buffers_.k[c], k_steps_[c], bytes_a_step(k_steps_[c]));
    copy(buffers_.v[c], v_steps_[c], bytes_a_step(v_steps_[c]));
  }
}

void DecodeRunner::append_and_compress(StepContext& w, StageTimer& timer) {
  LayerCaches& cache = shard_.caches[w.layer];
  timer.time(Stage::append, [&] {
    append(w, sel, cache.sel.k, cache.sel.v);
    append(w, win, cache.win.k, cache.win.v);
    append(w, cmp, cache.raw.k, cache.raw.v);
  });
  timer.time(Stage::compress, [&] { compress(w); });
}

// What attention reads.
void DecodeRunner::view_caches(StepContext& w) {
  const LayerCaches& cache = shard_.caches[w.layer];
  w.k[cmp] = cache.cmp.k, w.v[cmp] = cache.cmp.v;
  w.k[sel] = cache.sel.k, w.v[sel] = cache.sel.v;
  w.k[win] = cache.win.k, w.v[win] = cache.win.v;
  w.k[win].map = w.v[win].map = shard_.partition.window_share();
}

void DecodeRunner::exchange(StepContext& w, StageTimer& timer, void (*what)(StepContext&, Stream*)) {
  if (w.exchange) timer.time(Stage::comm, [&] { what(w, shard_.streams.compute); });
}

// Runs on the other stream beside what is queued on the compute stream until join.
void DecodeRunner::fork(StepContext& w, void (*what)(StepContext&, Stream*)) {
  const Streams& s = shard_.streams;
  s.device.record(s.forked, s.compute);
  s.device.wait(s.beside, s.forked);
  what(w, s.beside);
  s.device.record(s.joined, s.beside);
}

void DecodeRunner::join() { shard_.device().wait(shard_.streams.compute, shard_.streams.joined); }

void DecodeRunner::attend_by_stages(StepContext& w, StageTimer& timer) {
  timer.time(Stage::attend_cmp, [&] { attend(w, cmp); });
  const bool beside = w.exchange && !timer.per_stage();  // timed apart it takes its turn
  beside ? fork(w, exchange_lse) : exchange(w, timer, exchange_lse);
  if (!w.leaves_out(win)) timer.time(Stage::attend_win, [&] { attend(w, win); });
  if (beside) join();
  if (!w.leaves_out(sel)) {
    timer.time(Stage::rank, [&] { rank_blocks(w); });
    exchange(w, timer, exchange_candidates);
    if (w.exchange) timer.time(Stage::rank, [&] { select_blocks(w); });
    timer.time(Stage::attend_sel, [&] { attend(w, sel); });
  }
  exchange(w, timer, exchange_partials);
  timer.time(Stage::combine, [&] { combine(w); });
}

// Between the exchanges in the backend's own launches; a record wants the branches apart to the end.
void DecodeRunner::attend_sharded(StepContext& w, StageTimer& timer) {
  w.weighted = !w.options.record;
  open_shard(w);
  exchange(w, timer, exchange_lse);
  if (w.leaves_out(sel)) {
    if (w.weighted) weigh_shard(w, shard_.streams.compute);
  } else {
    rank_blocks(w);
    if (w.weighted) fork(w, weigh_shard);  // wanted by the last exchange only
    exchange(w, timer, exchange_candidates);
    select_blocks(w);
    attend(w, sel);
    if (w.weighted) join();
  }
  exchange(w, timer, exchange_partials);
  combine(w);
}

bool DecodeRunner::try_sharded() {
  StepContext w = start({});
  view_caches(w);
  if (!shards_at_once(w)) return false;
  restore();
  w.weighted = true;
  try {
    open_shard(w);
    weigh_shard(w, shard_.streams.compute);
    combine(w);
    shard_.device().synchronize(shard_.streams.compute);
  } catch (const LaunchError&) {
    return false;
  }
  restore();
  return true;
}

StepContext DecodeRunner::start(const StepOptions& options) {
  return {shard_, buffers_, options, shard_.partition.kv > 1, decode_tile(shard_, position_.as<std::int64_t>()), 0,
          0,      {},       {}};
}

StepContext DecodeRunner::step(const StepOptions& options, StageTimer& timer) {
  StepContext w = start(options);
  for (w.layer = 0; w.layer < shard_.config.model.layers; ++w.layer) {
    view_caches(w);
    if (timer.per_stage() || !enter_at_once(w)) {
      if (w.whole_layer()) timer.time(Stage::project, [&] { project(w); });
      append_and_compress(w, timer);
    }
    if (!timer.per_stage() && sharded_)
      attend_sharded(w, timer);
    else if (timer.per_stage() || !attend_at_once(w))
      attend_by_stages(w, timer);
    if (w.whole_layer()) {
      timer.time(Stage::output, [&] { output(w); });
      timer.time(Stage::comm, [&] { sum_outputs(w, shard_.point.batch); });
    }
  }
  AdvanceArgs args;
  args.position = position_.as<std::int64_t>();
  args.step = step_.as<std::int64_t>();
  args.reads = buffers_.reads.as<std::int64_t>();
  args.reads_log = reads_log_.as<std::int64_t>();
  args.counters = branches * shard_.planes();
  args.log_steps = shard_.config.run.steps;
  args.selected = buffers_.selected.as<std::int32_t>();
  args.selected_log = selected_log_.as<std::int32_t>();
  args.selected_count = selected_count_;
  shard_.kernels().advance(args, shard_.streams.compute);
  return w;
}

}  // namespace nsa
