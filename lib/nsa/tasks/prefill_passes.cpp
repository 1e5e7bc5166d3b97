#include "nsa/tasks/prefill_passes.hpp"

#include <algorithm>

#include "kernels/diagnostics/operation_log.hpp"
#include "nsa/model/inputs.hpp"

namespace nsa {

namespace {

constexpr std::int64_t max_compared_rows = 256;  // of a tile, which may have thousands

}  // namespace

void PrefillPasses::load() {
  prefill_.load_rows(source_);
  if (config_.run.scope == Scope::attention) prefill_.load_kv(source_);
}

void PrefillPasses::reload() {
  if (config_.model.layers > 1) prefill_.load_rows(source_);  // the last run overwrote the residual stream
  prefill_.restore();
}

void PrefillPasses::begin_recording() {
  agreed(session_.world, [&] {
    if (config_.output.tensors || config_.output.selection)
      tensors_ = std::make_unique<StepTensors>(shard_, shard_.point.context);
  });
  load();
  prefill_.restore();
}

void PrefillPasses::take_tile(const StepContext& ctx, const PrefillTile& tile) {
  const std::int64_t stride = std::max<std::int64_t>(1, prefill_.tile_count() * shard_.point.batch / 8);
  shard_.device().synchronize(shard_.streams.compute);
  if (tensors_) tensors_->take(ctx, tile.first_position - config_.run.prefix, false);
  compare_neighbours(ctx);
  if (!config_.run.check || tiles_seen_++ % stride != 0) return;
  checked_.merge(check_tile(ctx, tile, tiles_seen_ / stride % shard_.shape().groups));
}

void PrefillPasses::end_recording() {
  const std::int64_t positions = total_positions(config_, shard_.point);
  const double scale = keep_records(session_.world, shard_, source_, checked_, tensors_.get(),
                                    std::vector<std::int64_t>(shard_.point.batch, positions), record_);
  tensors_.reset();
  record_shared(session_.world, shared_, record_);
  expected_ = result();
  expected_.output.scale = scale;
  if (config_.run.check) gather_problems(session_.world, problem_of(expected_), record_);
}

void PrefillPasses::recorded() {
  StepOptions options = step_options(shard_.point);
  options.record = true;
  const PhaseScope phase("check");
  StageTimer untimed(shard_.device(), shard_.streams.compute);
  begin_recording();
  prefill_.run(untimed, options, [&](const StepContext& ctx, const PrefillTile& tile) { take_tile(ctx, tile); });
  end_recording();
}

bool PrefillPasses::measured(const ModeRun& run, StageTimer& timer, const TakeSample& take) {
  const bool check = config_.run.check && computes_point_step(run, shard_.point);
  std::string found;
  for (std::int64_t rep = 0; rep < config_.run.steps; ++rep) {
    if (session_.stop->check_periodically()) return false;
    reload();
    take(timer.step([&] { prefill_.run(timer, run.options); }));
    if (check && found.empty()) found = problem();
  }
  gather_problems(session_.world, found, record_);
  if (run.options.leave_out < 0) record_reads(session_.world, reads(), total_reads(config_, shard_.point), record_);
  return true;
}

// Of the last layer, within a tile.
void PrefillPasses::compare_neighbours(const StepContext& ctx) {
  const QueryTile& tile = ctx.stage.tile;
  const std::int64_t lists = shard_.shape().groups, n = shard_.shape().rules.n_sel, count = tile.rows() * lists * n;
  const auto selected =
      download_ints(shard_, ctx.buffers.selected.as<std::int32_t>() + (config_.model.layers - 1) * count, count);
  for (std::int64_t b = 0; b < tile.batches; ++b)
    shared_.add(selected.data() + b * tile.tokens * lists * n, tile.tokens, lists, static_cast<std::int32_t>(n));
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

std::string PrefillPasses::problem() const { return problem_of(result()); }

std::string PrefillPasses::problem_of(const RunResult& result) const {
  if (result.caches != expected_.caches) return "K or V differs from that of the checked run";
  if (result.reads != expected_.reads) return "reads are counted otherwise than in the checked run";
  const bool same_arithmetic = result.output.fallbacks == expected_.output.fallbacks;
  return output_problem(result.output, same_arithmetic ? expected_.output : StepOutput(), shard_.shape().dtype);
}

}  // namespace nsa
