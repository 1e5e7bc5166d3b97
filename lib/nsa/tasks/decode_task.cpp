#include <algorithm>
#include <limits>
#include <memory>
#include <optional>
#include <utility>

#include "kernels/diagnostics/fault_injection.hpp"
#include "kernels/diagnostics/operation_log.hpp"
#include "nsa/forward/decode.hpp"
#include "nsa/forward/prefill.hpp"
#include "nsa/model/inputs.hpp"
#include "nsa/tasks/captured_steps.hpp"
#include "nsa/tasks/measure.hpp"
#include "nsa/tasks/mixed_chunk.hpp"
#include "nsa/tasks/task.hpp"
#include "nsa/verify/float64_check.hpp"
#include "nsa/verify/quantisation.hpp"
#include "nsa/verify/read_counts.hpp"
#include "nsa/verify/repeat_check.hpp"
#include "nsa/verify/tensor_dump.hpp"

namespace nsa {

namespace {

// Fills the caches with synthetic rows, so that decode at a long context needs no prefill.
void fill_directly(ModelShard& shard, const TensorSource& source, std::int64_t positions) {
  const BlockRules& r = shard.shape().rules;
  for (LayerCaches& cache : shard.caches)
    for (const SequenceRange& some : equal_sequences(shard.point)) {
      const std::int64_t end = end_of(shard.point, some, positions);
      fill_kv(shard, source, sel, cache.sel, 0, end, &some);
      fill_kv(shard, source, win, cache.win, std::max<std::int64_t>(0, end - r.w), end, &some);
      fill_kv(shard, source, cmp, cache.raw, std::max<std::int64_t>(0, end - r.l), end, &some);
      fill_compressed(shard, source, cache.cmp, 0, compressed_tokens(r, end - 1), some);
    }
}

// The times of a mode that does not time this step.
StageTimes untimed_step() {
  StageTimes times;
  times.fill(std::numeric_limits<double>::quiet_NaN());
  return times;
}

// The recorded pass and the measured passes of a decode point.
class DecodePasses {
 public:
  // `chunk` of mixed steps, else null.
  DecodePasses(const Session& session, ModelShard& shard, DecodeRunner& decode, MixedChunk* chunk, PointRecord& record)
      : session_(session), shard_(shard), config_(shard.config), decode_(decode), chunk_(chunk), record_(record) {}

  // Runs before the measurement: records every step, and checks sampled rows of the first and the last one. Every
  // measured pass must reproduce its output.
  void recorded(const TensorSource& source);
  // False: the run was asked to stop.
  bool measured(const ModeRun& run, StageTimer& timer, const TakeSample& take);
  /// Of the recorded pass with FP8 caches: what each step chose and gave.
  const std::vector<StepOutput>& recorded_steps() const { return recorded_steps_; }
  // A pass of its own: reading clocks takes time. Where a step is one launch, and was timed as such.
  void measure_phases();

 private:
  bool run_one_by_one(const ModeRun& run, CapturedSteps& steps, StageTimer& timer, const TakeSample& take);
  bool run_queued(const ModeRun& run, CapturedSteps& steps);
  // The times of the steps since restore by the device's clock. The last queued step has no successor, and no time.
  void take_stamps(const ModeRun& run, const TakeSample& take);
  std::string latest_problem() const;
  CheckResult check_rows(const StepContext& ctx, std::int64_t step) const;
  RankReads reads() const;
  std::vector<std::int64_t> totals() const;  // what all ranks must read together, [branch][step]
  SharedBlocks shared_blocks() const;
  // The reads of each sequence of a ragged batch. Collective.
  void record_batch() const;
  StepOutput output() const;
  void flip_caches() const;
  std::int64_t rows() const { return shard_.point.batch * shard_.point.query_tokens; }

  const Session& session_;
  ModelShard& shard_;
  const Config& config_;
  DecodeRunner& decode_;
  MixedChunk* chunk_;
  PointRecord& record_;
  StepOutput expected_;
  std::vector<StepOutput> recorded_steps_;
};

void DecodePasses::recorded(const TensorSource& source) {
  StepOptions options = step_options(shard_.point);
  options.record = true;
  const PhaseScope phase("check");
  StageTimer untimed(shard_.device(), shard_.streams.compute);
  std::unique_ptr<StepTensors> tensors;
  agreed(session_.world, [&] {
    if (config_.output.tensors || config_.output.selection)
      tensors = std::make_unique<StepTensors>(shard_, config_.run.steps * shard_.point.query_tokens);
  });
  CheckResult checked;
  std::string problem;
  decode_.restore();
  for (std::int64_t step = 0; step < config_.run.steps; ++step) {
    if (session_.stop->check_periodically()) throw Interrupted();
    decode_.load(step, options);
    if (chunk_) step == 0 ? chunk_->begin_recording() : chunk_->reload();
    decode_.step(options, untimed);
    const StepContext ctx = decode_.last_layer(options);
    shard_.device().synchronize(shard_.streams.compute);
    if (chunk_) step == 0 ? chunk_->end_recording() : chunk_->end_step(step, config_.run.check);
    if (tensors) tensors->take(ctx, step * shard_.point.query_tokens, true);
    if (!config_.run.check) continue;
    if (shard_.shape().quantises()) recorded_steps_.push_back(recorded_step(ctx));
    if (problem.empty()) problem = latest_problem();
    if (step == 0 || step + 1 == config_.run.steps) checked.merge(check_rows(ctx, step));
  }
  const double scale =
      keep_records(session_.world, shard_, source, checked, tensors.get(), decode_.positions().ends(), record_);
  gather_problems(session_.world, problem, record_);
  if (chunk_) gather_problems(session_.world, chunk_->take_problem(), record_);
  expected_ = output();
  expected_.scale = scale;
  record_shared(session_.world, shared_blocks(), record_);
}

// Neighbours are the query tokens of a sequence, across steps too.
SharedBlocks DecodePasses::shared_blocks() const {
  const std::int64_t tokens = shard_.point.query_tokens, width = shard_.shape().groups * shard_.shape().rules.n_sel,
                     sequences = config_.model.layers * shard_.point.batch, steps = config_.run.steps;
  std::vector<std::int32_t> by_token(expected_.selected.size());  // [steps][query tokens][layers][batch][groups, n]
  for (std::int64_t i = 0; i < steps * sequences * tokens; ++i) {
    const std::int64_t step = i / (sequences * tokens), sequence = i / tokens % sequences;
    std::copy_n(expected_.selected.begin() + i * width, width,
                by_token.begin() + ((step * tokens + i % tokens) * sequences + sequence) * width);
  }
  SharedBlocks shared;
  shared.add(by_token.data(), steps * tokens, sequences * shard_.shape().groups, shard_.shape().rules.n_sel);
  return shared;
}

bool DecodePasses::measured(const ModeRun& run, StageTimer& timer, const TakeSample& take) {
  CapturedSteps steps(shard_, decode_, timer, run, chunk_ != nullptr);
  decode_.restore();
  if (!(run.timed == Timed::queued ? run_queued(run, steps) : run_one_by_one(run, steps, timer, take))) return false;
  if (run.timed == Timed::device || run.timed == Timed::queued) take_stamps(run, take);
  if (run.timed == Timed::queued) return true;  // its steps have the inputs of the first one
  if (chunk_) gather_problems(session_.world, chunk_->take_problem(), record_);
  if (run.options.leave_out < 0) record_reads(session_.world, reads(), totals(), record_);
  if (run.options.leave_out < 0 && shard_.point.ragged()) record_batch();
  if (!config_.run.check || !computes_point_step(run, shard_.point)) return true;
  if (run.timed != Timed::stages) decode_.complete_output(run.options);
  // The prologue of a step whose stages are timed one by one may round a compressed token otherwise.
  const bool same_inputs = config_.run.scope == Scope::attention && run.timed != Timed::stages;
  gather_problems(session_.world, pass_problem(session_.world, shard_, output(), expected_, same_inputs), record_);
  return true;
}

void DecodePasses::measure_phases() {
  const auto& modes = config_.run.modes;
  if (chunk_ || !decode_.has_phases() || std::find(modes.begin(), modes.end(), Mode::total) == modes.end()) return;
  const PhaseScope phase("phases");
  ModeRun run{"phases", decode_.with_readings(step_options(shard_.point))};
  StageTimer timer(shard_.device(), shard_.streams.compute);
  timer.set_per_stage(false);
  CapturedSteps steps(shard_, decode_, timer, run, false);
  decode_.restore();
  std::vector<double> own;  // [step][phase]
  for (std::int64_t step = 0; step < config_.run.steps; ++step) {
    if (session_.stop->check_periodically()) return;
    decode_.load(step, run.options);
    decode_.clear_readings();
    shard_.device().synchronize(shard_.streams.compute);
    decode_.align(run.options);
    timer.step([&] { steps.run(); });
    const std::vector<double> seconds = decode_.phase_seconds();
    own.insert(own.end(), seconds.begin(), seconds.end());
  }
  record_.phases = gather_phases(session_.world, own, config_.run.steps);
}

bool DecodePasses::run_one_by_one(const ModeRun& run, CapturedSteps& steps, StageTimer& timer, const TakeSample& take) {
  for (std::int64_t step = 0; step < config_.run.steps; step += run.steps_a_sample) {
    if (session_.stop->check_periodically()) return false;
    decode_.load(step, run.options);
    if (chunk_) chunk_->reload();
    shard_.device().synchronize(shard_.streams.compute);
    flip_caches();
    if (run.timed != Timed::stages) decode_.align(run.options);
    StageTimes times = timer.step([&] { steps.run(); });
    if (chunk_) chunk_->end_step(step, config_.run.check && computes_point_step(run, shard_.point));
    if (run.timed == Timed::device) continue;
    for (std::int64_t i = 1; i < run.steps_a_sample; ++i) take(untimed_step());
    times[static_cast<int>(Stage::step)] /= static_cast<double>(run.steps_a_sample);
    take(times);
  }
  return true;
}

bool DecodePasses::run_queued(const ModeRun& run, CapturedSteps& steps) {
  decode_.load(0, run.options);
  shard_.device().synchronize(shard_.streams.compute);
  for (std::int64_t step = 0; step < config_.run.steps; ++step) {
    if (session_.stop->check_periodically()) return false;
    steps.run();
  }
  return true;
}

void DecodePasses::take_stamps(const ModeRun& run, const TakeSample& take) {
  const std::vector<std::int64_t> stamps = decode_.stamps();  // begin and end of each step
  for (std::size_t begin = 0; begin < stamps.size(); begin += 2) {
    StageTimes times = untimed_step();
    const std::size_t end = run.timed == Timed::queued ? begin + 2 : begin + 1;
    if (end < stamps.size())
      times[static_cast<int>(Stage::step)] = 1e-9 * static_cast<double>(stamps[end] - stamps[begin]);
    take(times);
  }
}

std::string DecodePasses::latest_problem() const {
  return output_problem(latest_output(shard_, decode_.buffers(), rows(), true), {}, shard_.shape().dtype);
}

CheckResult DecodePasses::check_rows(const StepContext& ctx, std::int64_t step) const {
  CheckResult checked;
  const std::int64_t stride = std::max<std::int64_t>(1, shard_.planes() / 2), tokens = shard_.point.query_tokens;
  for (std::int64_t plane = 0; plane < shard_.planes(); plane += stride) {
    const std::int64_t b = plane / shard_.shape().groups;
    for (std::int64_t j = 0; j < tokens; j += std::max<std::int64_t>(1, tokens - 1))  // the first and the last one
      checked.merge(check_row(ctx, plane, b * tokens + j, decode_.positions()(step, b) + j));
  }
  return checked;
}

RankReads DecodePasses::reads() const {
  const std::int64_t steps = config_.run.steps, planes = shard_.planes();
  const auto log = download_longs(shard_, decode_.reads_log().data(), steps * branches * planes);
  const auto selected = download_ints(shard_, decode_.selected_log().data(), steps * decode_.selected_count());
  RankReads reads(steps);
  for (std::int64_t i = 0; i < std::ssize(log); ++i)
    reads.counted[i / planes % branches * steps + i / (planes * branches)] += log[i];
  expect_decode(reads, config_, shard_.partition, shard_.point, selected);
  if (chunk_) chunk_->add_reads(reads);
  return reads;
}

std::vector<std::int64_t> DecodePasses::totals() const {
  std::vector<std::int64_t> totals = total_reads(config_, shard_.point);
  if (chunk_) chunk_->add_totals(totals);
  return totals;
}

void DecodePasses::record_batch() const {
  const Point& point = shard_.point;
  const std::int64_t planes = shard_.planes(), groups = shard_.shape().groups, last = config_.run.steps - 1;
  const auto log = download_longs(shard_, decode_.reads_log().data(), config_.run.steps * branches * planes);
  std::vector<std::int64_t> own(static_cast<std::size_t>(branches * point.batch), 0);
  for (std::int64_t i = 0; i < branches * planes; ++i) own[i / groups] += log[last * branches * planes + i];
  const std::vector<std::int64_t> ranks = session_.world.gather(own);
  if (ranks.empty()) return;
  BatchRecord& batch = record_.batch;
  batch.reads.assign(own.size(), 0);
  for (std::size_t i = 0; i < ranks.size(); ++i) batch.reads[i % own.size()] += ranks[i];
  batch.reads_expected = sequence_reads(config_, point, decode_.positions(), last);
  for (std::int64_t i = 0; i < std::ssize(batch.reads); ++i)
    if (batch.reads[i] != batch.reads_expected[i])
      record_.fail(std::string("reads of ") + branch_names[i / point.batch] + " of sequence " +
                   std::to_string(i % point.batch) + " at the last step: counted " + std::to_string(batch.reads[i]) +
                   ", expected " + std::to_string(batch.reads_expected[i]));
}

StepOutput DecodePasses::output() const {
  StepOutput output = latest_output(shard_, decode_.buffers(), rows(), true);
  output.selected = download_ints(shard_, decode_.selected_log().data(), config_.run.steps * decode_.selected_count());
  output.fallbacks = shard_.routes.fallbacks(Phase::decode).size();
  return output;
}

void DecodePasses::flip_caches() const {
  const KvPair& cache = shard_.caches[0].sel;
  Stream* stream = shard_.streams.compute;
  fault::flip("cache.k", shard_.device(), cache.k_memory.data(), cache.k_memory.bytes(), stream);
  fault::flip("cache.v", shard_.device(), cache.v_memory.data(), cache.v_memory.bytes(), stream);
}

// nsa-vibe's formula, and the query tokens that each step keeps of all sequences.
void record_steps(const StepPositions& positions, const Config& config, const Point& point, PointRecord& record) {
  for (std::int64_t step = 0; step < config.run.steps; ++step) {
    std::int64_t kept = 0, reads = 0;
    for (std::int64_t b = 0; b < point.batch; ++b) kept += positions.kept(step, b);
    const std::int64_t moved = positions(step, 0) - point.length(0);
    for (std::int64_t j = 0; j < point.query_tokens; ++j)
      reads += nsa_vibe_reads(config.nsa, point.context + moved + j);
    record.reads.nsa_vibe.push_back(reads);
    if (point.query_tokens > 1) record.tokens_kept.push_back(kept);
  }
}

void describe_batch(const ModelShard& shard, BatchRecord& batch) {
  const Point& point = shard.point;
  batch.lengths = point.lengths;
  batch.length_imbalance = static_cast<double>(point.longest()) / static_cast<double>(point.context);
  if (const auto imbalance = shard.kernels().schedule_imbalance)
    batch.schedule_imbalance = imbalance(shard.shape(), decode_tile(shard, nullptr), point.lengths);
}

}  // namespace

void fill_caches(const Session& session, ModelShard& shard, const TensorSource& source, std::int64_t positions,
                 const Progress& progress) {
  const PhaseScope phase("fill caches");
  if (shard.config.run.fill == CacheFill::synthetic) {
    fill_directly(shard, source, positions);
    return shard.connect(*session.grid);
  }
  std::optional<PrefillRunner> prefill;
  StageTimer untimed(shard.device(), shard.streams.compute);
  agreed(session.world, [&] {
    prefill.emplace(shard, PrefillRange{0, positions}, false);
    if (shard.config.run.scope == Scope::attention)
      prefill->load_kv(source);
    else
      prefill->load_rows(source);
  });
  shard.connect(*session.grid);
  prefill->watch([&](double done) { progress(done, 1, "filling caches"); });
  prefill->fill_caches(untimed);
  shard.device().synchronize(shard.streams.compute);
}

namespace {

// Runs the recorded steps on unquantised caches, and records what FP8 caches change. Where their memory is not there,
// it stays unknown. Collective.
void compare_with_unquantised(const Session& session, const Config& quantised, const Point& point,
                              const TensorSource& source, const std::vector<StepOutput>& steps, PointRecord& record,
                              const Progress& progress) {
  const PhaseScope phase("unquantised caches");
  Config config = quantised;
  config.model.kv_precision = config.model.cmp_precision = KvPrecision::same;
  std::optional<ModelShard> shard;
  std::optional<DecodeRunner> decode;
  try {
    agreed(session.world, [&] { shard.emplace(session.backend, session.world, config, point, source); });
    fill_caches(session, *shard, source, point.longest(), progress);
    agreed(session.world, [&] { decode.emplace(*shard, &source, true); });
  } catch (const UserError& error) {
    if (error.code() != ExitCode::device) throw;
    return;
  }
  decode->snapshot();
  StepOptions options = step_options(point);
  options.record = true;
  StageTimer untimed(shard->device(), shard->streams.compute);
  QuantisationSums sums;
  for (std::int64_t step = 0; step < std::ssize(steps); ++step) {
    if (session.stop->check_periodically()) throw Interrupted();
    decode->load(step, options);
    decode->step(options, untimed);
    shard->device().synchronize(shard->streams.compute);
    std::vector<std::int64_t> positions;
    for (std::int64_t row = 0; row < point.batch * point.query_tokens; ++row)
      positions.push_back(decode->positions()(step, row / point.query_tokens) + row % point.query_tokens);
    sums.add(decode->last_layer(options), positions, steps[static_cast<std::size_t>(step)]);
  }
  record.quantisation = sums.reduce(session.world);
}

// Decode steps; where `part` is the chunk of mixed steps, these.
MemoryAccount run_steps(const Session& session, const Config& config, const Point& point, const Part* part,
                        const TensorSource& source, PointRecord& record, const Progress& progress) {
  const ControlComm& world = session.world;
  const bool records = config.records();
  std::optional<ModelShard> shard;
  std::optional<MixedChunk> chunk;
  agreed(world, [&] {
    shard.emplace(session.backend, world, config, point, source);
    if (part) chunk.emplace(session, *shard, *part, source, record);
  });
  fill_caches(session, *shard, source, point.longest(), progress);
  if (chunk) chunk->fill_prefix(progress);
  std::optional<DecodeRunner> decode;
  agreed(world, [&] {
    decode.emplace(*shard, &source, records);
    if (chunk) chunk->open();
  });
  decode->snapshot();
  decode->choose_plan(world);
  if (chunk) {
    chunk->snapshot();
    decode->also_run([&](std::int64_t layer, const StepOptions& options, StageTimer& timer) {
      chunk->run_layer(layer, options, timer);
    });
  }
  DecodePasses passes(session, *shard, *decode, chunk ? &*chunk : nullptr, record);
  if (records) passes.recorded(source);
  decode->restore();
  const std::uint64_t checksum = config.run.check ? cache_checksum(*shard, config.model.layers) : 0;

  const MeasuredTask task{
      [&] { decode->choose_plan(world); },
      [&](const ModeRun& run, StageTimer& timer, const TakeSample& take) { return passes.measured(run, timer, take); },
      [&] {
        const bool rows = shard->routes.agree(world), beside = chunk && chunk->agree();
        return rows || beside;
      }};
  const Samples samples = measure_point(session, *shard, task, record, progress);
  passes.measure_phases();
  if (config.run.check) {
    decode->restore();
    const bool same = cache_checksum(*shard, config.model.layers) == checksum;
    gather_problems(world, same ? "" : "the cached K or V changed while the steps ran", record);
  }
  record_steps(decode->positions(), config, point, record);
  record.first_position = point.longest();
  if (point.ragged()) describe_batch(*shard, record.batch);
  finish_point(world, *shard, samples, record);
  if (chunk) chunk->finish();
  const MemoryAccount account = shard->account;
  const std::vector<StepOutput> steps = passes.recorded_steps();
  decode.reset();
  chunk.reset();
  shard.reset();
  if (!steps.empty()) compare_with_unquantised(session, config, point, source, steps, record, progress);
  return account;
}

}  // namespace

MemoryAccount run_decode(const Session& session, const Config& config, const Point& point, const TensorSource& source,
                         PointRecord& record, const Progress& progress) {
  const PhaseScope phase("decode");
  return run_steps(session, config, point, nullptr, source, record, progress);
}

MemoryAccount run_mixed(const Session& session, const Config& config, const Point& point, const TensorSource& source,
                        PointRecord& record, const Progress& progress) {
  const PhaseScope phase("mixed");
  const Part rows = decode_rows_of(config, point), chunk = prefill_chunk_of(config, point);
  return run_steps(session, rows.config, rows.point, &chunk, source, record, progress);
}

}  // namespace nsa
