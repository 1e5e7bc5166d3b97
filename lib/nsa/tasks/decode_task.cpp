#include <algorithm>
#include <memory>
#include <optional>

#include "kernels/diagnostics/fault_injection.hpp"
#include "kernels/diagnostics/operation_log.hpp"
#include "nsa/forward/decode.hpp"
#include "nsa/forward/prefill.hpp"
#include "nsa/model/inputs.hpp"
#include "nsa/tasks/measure.hpp"
#include "nsa/tasks/task.hpp"
#include "nsa/verify/float64_check.hpp"
#include "nsa/verify/read_counts.hpp"
#include "nsa/verify/repeat_check.hpp"
#include "nsa/verify/tensor_dump.hpp"

namespace nsa {

namespace {

// Caches filled with synthetic rows, so that decode at a long context needs no prefill of it.
void fill_directly(ModelShard& e, const TensorSource& source) {
  const BlockRules& r = e.shape().rules;
  const std::int64_t context = e.point.context;
  for (std::size_t layer = 0; layer < e.caches.size(); ++layer) {
    LayerCaches& cache = e.caches[layer];
    fill_kv(e, source, sel, cache.sel, 0, context);
    fill_kv(e, source, win, cache.win, std::max<std::int64_t>(0, context - r.w), context);
    fill_kv(e, source, cmp, cache.raw, std::max<std::int64_t>(0, context - r.l), context);
    fill_kv(e, source, cmp, cache.cmp, 0, compressed_tokens(r, context - 1));
  }
}

void fill_caches(const Session& session, ModelShard& e, const TensorSource& source, const Progress& progress) {
  const PhaseScope phase("fill caches");
  if (e.config.run.fill == CacheFill::synthetic) {
    fill_directly(e, source);
    return e.connect(*session.grid);
  }
  std::optional<PrefillRunner> prefill;
  StageTimer untimed(e.device(), e.streams.compute);
  agreed(session.world, [&] {
    prefill.emplace(e, e.point.context, false);
    if (e.config.run.scope == Scope::attention)
      prefill->load_kv(source);
    else
      prefill->load_rows(source);
  });
  e.connect(*session.grid);
  prefill->watch([&](double done) { progress(done, 1, "filling caches"); });
  prefill->fill_caches(untimed);
  e.device().synchronize(e.streams.compute);
}

RankReads read_log(ModelShard& e, DecodeRunner& decode) {
  const std::int64_t steps = e.config.run.steps, planes = e.planes();
  const auto log = download_longs(e, decode.reads_log().data(), steps * branches * planes);
  const auto selected = download_ints(e, decode.selected_log().data(), steps * decode.selected_count());
  RankReads reads(steps);
  for (std::int64_t i = 0; i < std::ssize(log); ++i)
    reads.counted[i / planes % branches * steps + i / (planes * branches)] += log[i];
  expect_decode(reads, e.partition, e.point.context, planes * e.config.model.layers, selected);
  return reads;
}

StepOutput left_by(ModelShard& e, DecodeRunner& decode) {
  StepOutput left = latest_output(e, decode.buffers(), e.point.batch, true);
  left.selected = download_ints(e, decode.selected_log().data(), e.config.run.steps * decode.selected_count());
  left.fallbacks = e.routes.fallbacks(Phase::decode).size();
  return left;
}

// One pass outside the measurement: every step is recorded, sampled rows of the first and last are checked. Returns
// what it left, which every measured pass has to leave too.
StepOutput record_pass(const Session& session, ModelShard& e, DecodeRunner& decode, const TensorSource& source,
                       const StepOptions& base, PointRecord& record) {
  StepOptions options = base;
  options.record = true;
  const PhaseScope phase("check");
  StageTimer untimed(e.device(), e.streams.compute);
  std::unique_ptr<StepTensors> tensors;
  agreed(session.world, [&] {
    if (e.config.output.tensors) tensors = std::make_unique<StepTensors>(e, e.config.run.steps);
  });
  CheckResult checked;
  std::string problem;
  decode.restore();
  for (std::int64_t step = 0; step < e.config.run.steps; ++step) {
    if (session.stop->check_periodically()) throw Interrupted();
    decode.load(step, options);
    decode.step(options, untimed);
    const StepContext ctx = decode.last_layer(options);
    e.device().synchronize(e.streams.compute);
    if (tensors) tensors->take(ctx, step, true);
    if (!e.config.run.check) continue;
    if (problem.empty())
      problem = output_problem(latest_output(e, decode.buffers(), e.point.batch, true), {}, e.shape().dtype);
    if (step != 0 && step + 1 != e.config.run.steps) continue;
    const std::int64_t stride = std::max<std::int64_t>(1, e.planes() / 2);
    for (std::int64_t plane = 0; plane < e.planes(); plane += stride)
      checked.merge(check_row(ctx, plane, plane / e.shape().groups, e.point.context + step));
  }
  keep_records(session.world, e, source, checked, tensors.get(), total_positions(e.config, e.point), record);
  fail_where(session.world, problem, record);
  return left_by(e, decode);
}

// A step as it would run: one graph where the backend has them.
class WholeStep {
 public:
  WholeStep(ModelShard& e, DecodeRunner& decode, StageTimer& timer, const ModeRun& run)
      : shard_(e), decode_(decode), timer_(timer), options_(run.options) {
    if (run.stages || !e.device().capture) return;
    const std::size_t known = e.routes.fallbacks(Phase::decode).size();
    try {
      capture();
    } catch (const UserError&) {
      // A launch that fails may spoil the capture it is part of; the step is then queued again without it.
      if (e.routes.fallbacks(Phase::decode).size() == known) throw;
      capture();
    }
  }
  ~WholeStep() {
    if (graph_) shard_.device().destroy_graph(graph_);
  }
  WholeStep(const WholeStep&) = delete;
  WholeStep& operator=(const WholeStep&) = delete;
  void run() {
    fault::at("decode.step");
    if (graph_)
      shard_.device().launch(graph_, shard_.streams.compute);
    else
      queue();
  }

 private:
  void capture() {
    graph_ = shard_.device().capture(
        shard_.streams.compute, [](void* self) { static_cast<WholeStep*>(self)->queue(); }, this);
  }
  void queue() { decode_.step(options_, timer_); }
  ModelShard& shard_;
  DecodeRunner& decode_;
  StageTimer& timer_;
  StepOptions options_;
  Graph* graph_ = nullptr;
};

}  // namespace

MemoryAccount run_decode(const Session& session, const Config& config, const Point& point, const TensorSource& source,
                         PointRecord& record, const Progress& progress) {
  const ControlComm& world = session.world;
  const PhaseScope phase("decode");
  std::optional<ModelShard> shard;
  agreed(world, [&] { shard.emplace(session.backend, world, config, point, source); });
  ModelShard& e = *shard;
  fill_caches(session, e, source, progress);
  std::optional<DecodeRunner> held;
  agreed(world, [&] { held.emplace(e, &source, config.run.check || config.output.tensors); });
  DecodeRunner& decode = *held;
  decode.snapshot();

  const std::vector<ModeRun> runs = mode_runs(config, point);
  StepOptions base;
  base.force_branch = point.force_branch;
  decode.choose_plan(world);
  StepOutput expected;
  if (config.run.check || config.output.tensors) expected = record_pass(session, e, decode, source, base, record);
  decode.restore();
  const std::uint64_t caches = config.run.check ? cache_checksum(e, point.context, config.model.layers) : 0;

  StageTimer timer(e.device(), e.streams.compute);
  Samples samples;
  const double all = static_cast<double>(runs.size()), steps = static_cast<double>(config.run.steps);
  double passes = 0;
  // What failed on some rank is replaced on all of them, and then nothing measured before is of use.
  do {
    samples = {};
    passes = 0;
    decode.choose_plan(world);
    record.stop_reason = measure(world, runs, config.run.min_time, samples, [&](const ModeRun& run, auto&& sink) {
      timer.set_per_stage(run.stages);
      WholeStep whole(e, decode, timer, run);
      decode.restore();
      for (std::int64_t step = 0; step < config.run.steps; ++step) {
        if (session.stop->check_periodically()) return false;
        decode.load(step, run.options);
        e.device().synchronize(e.streams.compute);
        fault::flip("cache.k", e.device(), e.caches[0].sel.k_memory.data(), e.caches[0].sel.k_memory.bytes(),
                    e.streams.compute);
        fault::flip("cache.v", e.device(), e.caches[0].sel.v_memory.data(), e.caches[0].sel.v_memory.bytes(),
                    e.streams.compute);
        sink(timer.step([&] { whole.run(); }));
        progress(std::min(passes += 1 / steps, all), all, run.name);
      }
      if (run.options.leave_out < 0) {
        const RankReads reads = read_log(e, decode);
        record.reads = gather_reads(world, reads);
        if (world.rank() == 0) record.fail(read_problem(record.reads, total_reads(config, point)));
      }
      const bool same_step = run.options.leave_out < 0 && run.options.force_branch == base.force_branch;
      if (config.run.check && same_step)
        fail_where(world, pass_problem(world, e, left_by(e, decode), expected), record);
      return true;
    });
  } while (e.routes.agree(world));
  if (config.run.check) {
    decode.restore();
    const bool same = cache_checksum(e, point.context, config.model.layers) == caches;
    fail_where(world, same ? "" : "the cached K or V changed while the steps ran", record);
  }
  for (std::int64_t step = 0; step < config.run.steps; ++step)
    record.reads.nsa_vibe.push_back(nsa_vibe_reads(config.nsa, point.context + step));
  record.first_position = point.context;
  finish_point(world, e, samples, record);
  return e.account;
}

}  // namespace nsa
