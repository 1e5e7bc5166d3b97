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

void load(ModelShard& shard, PrefillRunner& prefill, const TensorSource& source) {
  prefill.load_rows(source);
  if (shard.config.run.scope == Scope::attention) prefill.load_kv(source);
}

// What every run of a point must reproduce: the output of the last tile, the read counters, and the caches of the first
// layer, which depend on x and the weights only. The same kernels run in the same shapes each time, and the matrix
// products run on one stream with a workspace of their own, for which cuBLAS promises the same bits; so K and V must be
// equal bit by bit. After a fallback, scores are summed in another order and blocks may change places; then the output
// is only checked for values that are not finite.
struct RunResult {
  StepOutput output;
  std::vector<std::int64_t> reads;
  std::uint64_t caches = 0;
};

constexpr std::int64_t max_compared_rows = 256;  // of a tile, which may have thousands

// The recorded run and the measured passes of a prefill point.
class PrefillPasses {
 public:
  PrefillPasses(const Session& session, ModelShard& shard, PrefillRunner& prefill, const TensorSource& source,
                PointRecord& record)
      : session_(session), shard_(shard), config_(shard.config), prefill_(prefill), source_(source), record_(record) {}

  // Runs before the measurement: records every tile, and checks the last row of some. Every measured run must reproduce
  // its result.
  void recorded();
  // False: the run was asked to stop.
  bool measured(const ModeRun& run, StageTimer& timer, const TakeSample& take);

 private:
  void compare_neighbours(const StepContext& ctx, SharedBlocks& shared) const;
  CheckResult check_tile(const StepContext& ctx, const PrefillTile& tile, std::int64_t group) const;
  RankReads reads() const;
  RunResult result() const;
  std::string problem_of(const RunResult& result, const RunResult& expected) const;

  const Session& session_;
  ModelShard& shard_;
  const Config& config_;
  PrefillRunner& prefill_;
  const TensorSource& source_;
  PointRecord& record_;
  RunResult expected_;
};

void PrefillPasses::recorded() {
  StepOptions options = step_options(shard_.point);
  options.record = true;
  const PhaseScope phase("check");
  StageTimer untimed(shard_.device(), shard_.streams.compute);
  std::unique_ptr<StepTensors> tensors;
  agreed(session_.world, [&] {
    if (config_.output.tensors || config_.output.selection)
      tensors = std::make_unique<StepTensors>(shard_, shard_.point.context);
  });
  CheckResult checked;
  SharedBlocks shared;
  std::int64_t seen = 0;
  const std::int64_t first = config_.run.prefix, positions = total_positions(config_, shard_.point);
  const std::int64_t stride = std::max<std::int64_t>(1, prefill_.tile_count() * shard_.point.batch / 8);
  load(shard_, prefill_, source_);
  prefill_.restore();
  prefill_.run(untimed, options, [&](const StepContext& ctx, const PrefillTile& tile) {
    shard_.device().synchronize(shard_.streams.compute);
    if (tensors) tensors->take(ctx, tile.first_position - first, false);
    compare_neighbours(ctx, shared);
    if (!config_.run.check || seen++ % stride != 0) return;
    checked.merge(check_tile(ctx, tile, seen / stride % shard_.shape().groups));
  });
  const double scale = keep_records(session_.world, shard_, source_, checked, tensors.get(),
                                    std::vector<std::int64_t>(shard_.point.batch, positions), record_);
  record_shared(session_.world, shared, record_);
  expected_ = result();
  expected_.output.scale = scale;
  if (config_.run.check) gather_problems(session_.world, problem_of(expected_, expected_), record_);
}

bool PrefillPasses::measured(const ModeRun& run, StageTimer& timer, const TakeSample& take) {
  const bool check = config_.run.check && computes_point_step(run, shard_.point);
  std::string problem;
  for (std::int64_t rep = 0; rep < config_.run.steps; ++rep) {
    if (session_.stop->check_periodically()) return false;
    if (config_.model.layers > 1) prefill_.load_rows(source_);  // the last run overwrote the residual stream
    prefill_.restore();
    take(timer.step([&] { prefill_.run(timer, run.options); }));
    if (check && problem.empty()) problem = problem_of(result(), expected_);
  }
  gather_problems(session_.world, problem, record_);
  if (run.options.leave_out < 0) record_reads(session_.world, shard_, reads(), record_);
  return true;
}

// Of the last layer, within a tile.
void PrefillPasses::compare_neighbours(const StepContext& ctx, SharedBlocks& shared) const {
  const QueryTile& tile = ctx.stage.tile;
  const std::int64_t lists = shard_.shape().groups, n = shard_.shape().rules.n_sel, count = tile.rows() * lists * n;
  const auto selected =
      download_ints(shard_, ctx.buffers.selected.as<std::int32_t>() + (config_.model.layers - 1) * count, count);
  for (std::int64_t b = 0; b < tile.batches; ++b)
    shared.add(selected.data() + b * tile.tokens * lists * n, tile.tokens, lists, static_cast<std::int32_t>(n));
}

CheckResult PrefillPasses::check_tile(const StepContext& ctx, const PrefillTile& tile, std::int64_t group) const {
  const std::int64_t rows = std::min(max_compared_rows, ctx.stage.tile.rows()), row = tile.tokens - 1;
  CheckResult checked;
  checked.problem = output_problem(latest_output(shard_, ctx.buffers, rows, false), {}, shard_.shape().dtype);
  checked.merge(check_row(ctx, std::int64_t{ctx.stage.tile.batch_begin} * shard_.shape().groups + group, row,
                          tile.first_position + row));
  return checked;
}

RankReads PrefillPasses::reads() const {
  const std::int64_t planes = shard_.planes();
  const auto counters = download_longs(shard_, prefill_.buffers().reads.data(), branches * planes);
  RankReads reads(1);
  for (std::int64_t i = 0; i < std::ssize(counters); ++i) reads.counted[i / planes] += counters[i];
  expect_prefill(reads, shard_.partition, config_.run.prefix, total_positions(config_, shard_.point),
                 planes * config_.model.layers);
  return reads;
}

RunResult PrefillPasses::result() const {
  RunResult result;
  const std::int64_t rows = std::min(max_compared_rows, prefill_.last_tile_rows());
  result.output = latest_output(shard_, prefill_.buffers(), rows, false);
  result.output.fallbacks = shard_.routes.fallbacks(Phase::prefill).size();
  result.reads = download_longs(shard_, prefill_.buffers().reads.data(), branches * shard_.planes());
  result.caches = cache_checksum(shard_, 1);
  return result;
}

std::string PrefillPasses::problem_of(const RunResult& result, const RunResult& expected) const {
  if (result.caches != expected.caches) return "K or V differs from that of the checked run";
  if (result.reads != expected.reads) return "reads are counted otherwise than in the checked run";
  const bool same_arithmetic = result.output.fallbacks == expected.output.fallbacks;
  return output_problem(result.output, same_arithmetic ? expected.output : StepOutput(), shard_.shape().dtype);
}

}  // namespace

MemoryAccount run_prefill(const Session& session, const Config& config, const Point& point, const TensorSource& source,
                          PointRecord& record, const Progress& progress) {
  const ControlComm& world = session.world;
  const PhaseScope phase("prefill");
  const bool records = config.records();
  std::optional<ModelShard> shard;
  agreed(world, [&] { shard.emplace(session.backend, world, config, point, source); });
  if (config.run.prefix > 0) fill_caches(session, *shard, source, config.run.prefix, progress);
  std::optional<PrefillRunner> prefill;
  agreed(world, [&] {
    prefill.emplace(*shard, prefill_range(config, point), records);
    load(*shard, *prefill, source);
  });
  if (config.run.prefix == 0) shard->connect(*session.grid);
  prefill->snapshot();
  PrefillPasses passes(session, *shard, *prefill, source, record);
  prefill->watch([&](double done) { progress(done, 1, "checking"); });
  if (records) passes.recorded();
  prefill->watch(nullptr);  // no callbacks within timed work

  const MeasuredTask task{[] {}, [&](const ModeRun& run, StageTimer& timer,
                                     const TakeSample& take) { return passes.measured(run, timer, take); }};
  const Samples samples = measure_point(session, *shard, task, record, progress);
  record.reads.nsa_vibe.push_back(nsa_vibe_reads(config.nsa, total_positions(config, point) - 1));
  record.first_position = config.run.prefix;
  finish_point(world, *shard, samples, record);
  return shard->account;
}

}  // namespace nsa
