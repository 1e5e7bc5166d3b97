#include <algorithm>
#include <memory>
#include <optional>

#include "kernels/diagnostics/operation_log.hpp"
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

void load(ModelShard& e, PrefillRunner& prefill, const TensorSource& source) {
  prefill.load_rows(source);
  if (e.config.run.scope == Scope::attention) prefill.load_kv(source);
}

RankReads count_reads(ModelShard& e, PrefillRunner& prefill) {
  const std::int64_t planes = e.planes();
  const auto counters = download_longs(e, prefill.buffers().reads.data(), branches * planes);
  RankReads reads(1);
  for (std::int64_t i = 0; i < std::ssize(counters); ++i) reads.counted[i / planes] += counters[i];
  expect_prefill(reads, e.partition, e.point.context, planes * e.config.model.layers);
  return reads;
}

/// What every run of a point has to leave: the last tile's output, the read counters, and the caches of the first
/// layer, which hang on nothing but x and the weights. On every backend the same kernels run in the same shapes each
/// time, the matrix products on one stream with a workspace of their own: cuBLAS promises the same bits then, and so
/// K and V may be held against theirs. Where a fallback has come between, scores are added up in another way, blocks
/// may change places, and the output is only looked at for what is not finite.
struct Left {
  StepOutput output;
  std::vector<std::int64_t> reads;
  std::uint64_t caches = 0;
};

constexpr std::int64_t compared_rows = 256;  // of a tile: it may have thousands

Left left_by(ModelShard& e, PrefillRunner& prefill) {
  Left left;
  left.output = latest_output(e, prefill.buffers(), std::min(compared_rows, prefill.last_tile_rows()), false);
  left.output.fallbacks = e.routes.fallbacks(Phase::prefill).size();
  left.reads = download_longs(e, prefill.buffers().reads.data(), branches * e.planes());
  left.caches = cache_checksum(e, e.point.context, 1);
  return left;
}

std::string problem_of(const ModelShard& e, const Left& left, const Left& expected) {
  if (left.caches != expected.caches) return "K or V differs from that of the checked run";
  if (left.reads != expected.reads) return "reads are counted otherwise than in the checked run";
  const bool same_way = left.output.fallbacks == expected.output.fallbacks;
  return output_problem(left.output, same_way ? expected.output : StepOutput(), e.shape().dtype);
}

// One run outside the measurement: every tile is recorded; the last row of some tiles is checked.
Left record_run(const Session& session, ModelShard& e, PrefillRunner& prefill, const TensorSource& source,
                const StepOptions& base, PointRecord& record) {
  StepOptions options = base;
  options.record = true;
  const PhaseScope phase("check");
  StageTimer untimed(e.device(), e.streams.compute);
  std::unique_ptr<StepTensors> tensors;
  agreed(session.world, [&] {
    if (e.config.output.tensors) tensors = std::make_unique<StepTensors>(e, e.point.context);
  });
  CheckResult checked;
  std::int64_t seen = 0;
  const std::int64_t stride = std::max<std::int64_t>(1, prefill.tile_count() * e.point.batch / 8);
  load(e, prefill, source);
  prefill.run(untimed, options, [&](const StepContext& ctx, const PrefillTile& tile) {
    e.device().synchronize(e.streams.compute);
    if (tensors) tensors->take(ctx, tile.first_position, false);
    if (!e.config.run.check || seen++ % stride != 0) return;
    const StepOutput output = latest_output(e, ctx.buffers, std::min(compared_rows, ctx.stage.tile.rows()), false);
    if (checked.problem.empty()) checked.problem = output_problem(output, {}, e.shape().dtype);
    const std::int64_t row = tile.tokens - 1, group = seen / stride % e.shape().groups;
    checked.merge(check_row(ctx, std::int64_t{ctx.stage.tile.batch_begin} * e.shape().groups + group, row,
                            tile.first_position + row));
  });
  keep_records(session.world, e, source, checked, tensors.get(), e.point.context, record);
  const Left left = left_by(e, prefill);
  if (e.config.run.check) fail_where(session.world, problem_of(e, left, left), record);
  return left;
}

}  // namespace

MemoryAccount run_prefill(const Session& session, const Config& config, const Point& point, const TensorSource& source,
                          PointRecord& record, const Progress& progress) {
  const ControlComm& world = session.world;
  const PhaseScope phase("prefill");
  std::optional<ModelShard> shard;
  agreed(world, [&] { shard.emplace(session.backend, world, config, point, source); });
  ModelShard& e = *shard;
  std::optional<PrefillRunner> held;
  agreed(world, [&] {
    held.emplace(e, point.context, config.run.check || config.output.tensors);
    load(e, *held, source);
  });
  e.connect(*session.grid);
  PrefillRunner& prefill = *held;

  const std::vector<ModeRun> runs = mode_runs(config, point);
  StepOptions base;
  base.force_branch = point.force_branch;
  prefill.watch([&](double done) { progress(done, 1, "checking"); });
  Left expected;
  if (config.run.check || config.output.tensors) expected = record_run(session, e, prefill, source, base, record);
  prefill.watch(nullptr);  // nothing beside the timed work

  StageTimer timer(e.device(), e.streams.compute);
  Samples samples;
  const double all = static_cast<double>(runs.size()), steps = static_cast<double>(config.run.steps);
  double passes = 0;
  // What failed on some rank is replaced on all of them, and then nothing measured before is of use.
  do {
    samples = {};
    passes = 0;
    record.stop_reason = measure(world, runs, config.run.min_time, samples, [&](const ModeRun& run, auto&& sink) {
      timer.set_per_stage(run.stages);
      const bool same_step = run.options.leave_out < 0 && run.options.force_branch == base.force_branch;
      std::string problem;
      for (std::int64_t rep = 0; rep < config.run.steps; ++rep) {
        if (session.stop->check_periodically()) return false;
        if (config.model.layers > 1) prefill.load_rows(source);  // the residual stream was written over
        sink(timer.step([&] { prefill.run(timer, run.options); }));
        progress(std::min(passes += 1 / steps, all), all, run.name);
        if (config.run.check && same_step && problem.empty()) problem = problem_of(e, left_by(e, prefill), expected);
      }
      fail_where(world, problem, record);
      if (run.options.leave_out < 0) {
        record.reads = gather_reads(world, count_reads(e, prefill));
        if (world.rank() == 0) record.fail(read_problem(record.reads, total_reads(config, point)));
      }
      return true;
    });
  } while (e.routes.agree(world));
  record.reads.nsa_vibe.push_back(nsa_vibe_reads(config.nsa, point.context - 1));
  finish_point(world, e, samples, record);
  return e.account;
}

}  // namespace nsa
