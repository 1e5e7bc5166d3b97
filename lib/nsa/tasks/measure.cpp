#include "nsa/tasks/measure.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <thread>
#include <utility>

#include "kernels/diagnostics/fault_injection.hpp"
#include "kernels/interface/buffer.hpp"
#include "nsa/report/statistics.hpp"
#include "nsa/tasks/task.hpp"
#include "nsa/verify/read_counts.hpp"

namespace nsa {

namespace {

/// The samples of one mode, pass by pass. Of more passes than `most_reps` holds it keeps every second, every fourth,
/// ...
class StoredPasses {
 public:
  StoredPasses(std::vector<StageTimes>& taken, std::int64_t most_reps) : taken_(taken), most_(most_reps) {}

  /// After a whole pass, whose samples follow the first `before`.
  void end_pass(std::size_t before) {
    const std::size_t steps = taken_.size() - before;
    if (passes_++ % every_ != 0) return taken_.resize(before);
    if (std::ssize(taken_) <= most_) return;
    std::size_t kept = 0;
    for (std::size_t at = 0; at < taken_.size(); at += 2 * steps, kept += steps)
      std::copy_n(taken_.begin() + static_cast<std::ptrdiff_t>(at), steps,
                  taken_.begin() + static_cast<std::ptrdiff_t>(kept));
    taken_.resize(kept);
    every_ *= 2;
  }

 private:
  std::vector<StageTimes>& taken_;
  const std::int64_t most_;
  std::int64_t passes_ = 0, every_ = 1;
};

using Pass = std::function<bool(const ModeRun&, const TakeSample&)>;

// The width of the 95% interval of a mode's median, as a fraction of the median, by the slowest rank of each step.
class IntervalWidth {
 public:
  IntervalWidth(const ControlComm& world, std::int64_t warmup) : world_(world), warmup_(warmup) {}

  // The time of a step on this rank.
  void add(double step) {
    if (count_++ >= warmup_) own_.push_back(step);
  }
  // The times since the pass began are of one that does not count.
  void drop_pass() {
    count_ = kept_count_;
    own_.resize(kept_own_);
  }
  void keep_pass() {
    kept_count_ = count_;
    kept_own_ = own_.size();
  }
  // Sorts the samples again only when a tenth more are there: the cost of all calls stays in proportion to the samples.
  // Every rank gets the same width; infinite before there is an interval.
  double update() {
    if (count_ - warmup_ < next_) return width_;
    next_ = count_ - warmup_ + std::max<std::int64_t>(1, (count_ - warmup_) / 10);
    const std::vector<double> own = std::exchange(own_, {}), all = world_.gather(own);  // by rank, on rank 0
    for (std::size_t i = 0; i < own.size() && !all.empty(); ++i) {
      double slowest = std::numeric_limits<double>::quiet_NaN();  // as that of a step within a graph of several
      for (std::size_t at = i; at < all.size(); at += own.size()) slowest = std::fmax(slowest, all[at]);
      slowest_.push_back(slowest);
    }
    const Summary s = summarise(slowest_);
    const double here = std::isnan(s.low) ? std::numeric_limits<double>::infinity() : (s.high - s.low) / s.median;
    return width_ = world_.max(all.empty() ? 0.0 : here);
  }

 private:
  const ControlComm& world_;
  const std::int64_t warmup_;
  std::int64_t count_ = 0, next_ = 1;
  std::int64_t kept_count_ = 0;  // before this pass; kept_own_ likewise
  std::size_t kept_own_ = 0;
  std::vector<double> own_;  // since the last exchange
  double width_ = std::numeric_limits<double>::infinity();
  std::vector<double> slowest_;  // on rank 0
};

// Why a mode stopped; of several modes the largest counts.
enum class Stop { steps, min_time, min_interval, interval_time, interrupted };
constexpr const char* stop_names[] = {"steps", "min_time", "min_interval", "interval_time", "interrupted"};

Stop measure_mode(const ControlComm& world, const ModeRun& run, const RunConfig& goal, std::int64_t most_reps,
                  NoiseMeter& meter, std::vector<StageTimes>& taken, const Pass& pass) {
  IntervalWidth interval(world, goal.warmup);
  StoredPasses stored(taken, most_reps);
  ThrottleRecovery recovery(world, goal);
  Stop stop = Stop::steps;
  for (double measured = 0;;) {
    world.barrier();
    const std::size_t before = taken.size();
    double seconds = 0;
    meter.begin();
    const bool whole = pass(run, [&](const StageTimes& times) {
      taken.push_back(times);
      const double sample = times[static_cast<int>(Stage::step)];
      if (goal.min_interval > 0) interval.add(sample);
      if (!std::isnan(sample)) seconds += sample * static_cast<double>(run.steps_a_sample);
      meter.stepped();
    });
    if (!whole) {
      taken.resize(before);
      return Stop::interrupted;
    }
    if (recovery.repeats(meter)) {
      taken.resize(before);
      interval.drop_pass();
      continue;
    }
    stored.end_pass(before);
    measured += world.max(seconds);
    const bool narrow = goal.min_interval <= 0 || interval.update() <= goal.min_interval;
    interval.keep_pass();
    const bool late = measured >= goal.interval_time;
    if (measured >= goal.min_time && (narrow || late)) return narrow ? stop : Stop::interval_time;
    stop = std::max(stop, measured >= goal.min_time ? Stop::min_interval : Stop::min_time);
  }
}

// Returns the reason of the stop.
std::string measure_modes(const ControlComm& world, const std::vector<ModeRun>& runs, const RunConfig& goal,
                          std::int64_t most_reps, NoiseMeter& meter, Samples& samples, const Pass& pass) {
  Stop stop = Stop::steps;
  for (const ModeRun& run : runs) {
    samples.modes.push_back(run.name);
    std::vector<StageTimes>& taken = samples.times.emplace_back();
    stop = std::max(stop, measure_mode(world, run, goal, most_reps, meter, taken, pass));
    samples.noise.push_back(meter.take());
    if (stop == Stop::interrupted && (taken.empty() || samples.modes.size() < runs.size())) throw Interrupted();
  }
  return stop_names[static_cast<int>(stop)];
}

}  // namespace

bool ThrottleRecovery::repeats(NoiseMeter& meter) {
  const bool low = meter.end() < run_.throttle_threshold && repeated_ < most_repeated;
  if (world_.max(std::int64_t{low}) == 0) {
    meter.keep();
    return false;
  }
  ++repeated_;
  meter.drop();
  std::this_thread::sleep_for(std::chrono::duration<double>(run_.recovery_delay));
  return true;
}

std::int64_t most_stored_reps(const Config& config, std::int64_t modes, std::int64_t ranks) {
  constexpr std::int64_t most_bytes = std::int64_t{16} << 20;
  const std::int64_t bytes_a_rep = 8 * modes * stage_count * ranks;
  return std::max(2 * config.run.steps, most_bytes / bytes_a_rep);
}

StepOptions step_options(const Point& point) {
  StepOptions options;
  options.force_branch = point.force_branch;
  return options;
}

bool computes_point_step(const ModeRun& run, const Point& point) {
  const bool own_inputs = run.timed != Timed::queued && run.steps_a_sample == 1;
  return own_inputs && run.options.leave_out < 0 && run.options.force_branch == point.force_branch;
}

std::vector<ModeRun> mode_runs(const Config& config, const Point& point) {
  std::vector<ModeRun> runs;
  const StepOptions base = step_options(point);
  for (const Mode mode : config.run.modes) {
    if (mode == Mode::branches) runs.push_back({"branches", base, Timed::stages});
    if (mode == Mode::total) runs.push_back({"total", base, Timed::step, config.run.steps_per_graph});
    if (mode == Mode::launches) {
      runs.push_back({"device", base, Timed::device});
      runs.push_back({"queued", base, Timed::queued});
    }
    for (int c = 0; c < branches; ++c) {
      StepOptions options = base;
      if (mode == Mode::ablation) {
        options.leave_out = c;
        runs.push_back({std::string("ablation_") + branch_names[c], options, Timed::step, config.run.steps_per_graph});
      } else if (mode == Mode::one_hot) {
        options.force_branch = c;
        runs.push_back({std::string("one_hot_") + branch_names[c], options, Timed::step, config.run.steps_per_graph});
      }
    }
  }
  return runs;
}

Samples measure_point(const Session& session, ModelShard& shard, const MeasuredTask& task, PointRecord& record,
                      const Progress& progress) {
  const std::vector<ModeRun> runs = mode_runs(shard.config, shard.point);
  const double all = static_cast<double>(runs.size()), steps = static_cast<double>(shard.config.run.steps);
  const std::int64_t most_reps = most_stored_reps(shard.config, std::ssize(runs), session.world.size());
  StageTimer timer(shard.device(), shard.streams.compute);
  NoiseMeter meter(shard.device(), shard.streams.compute);
  Samples samples;
  do {
    samples = {};  // those taken before a fallback measured other kernels
    double passes = 0;
    task.prepare();
    const auto pass = [&](const ModeRun& run, const TakeSample& take) {
      timer.set_per_stage(run.timed == Timed::stages);
      return task.pass(run, timer, [&](const StageTimes& times) {
        take(times);
        progress(std::min(passes += 1 / steps, all), all, run.name);
      });
    };
    record.stop_reason = measure_modes(session.world, runs, shard.config.run, most_reps, meter, samples, pass);
  } while (task.fell_back());
  return samples;
}

TimeTable gather_times(const ControlComm& world, const Samples& samples) {
  TimeTable table;
  table.modes = samples.modes;
  table.ranks = world.size();
  for (const auto& reps : samples.times) table.reps = std::max(table.reps, std::ssize(reps));
  const std::int64_t modes = std::ssize(samples.modes), reps = table.reps;
  std::vector<double> own(static_cast<std::size_t>(modes * stage_count * reps),
                          std::numeric_limits<double>::quiet_NaN());
  for (std::int64_t m = 0; m < modes; ++m)
    for (std::int64_t rep = 0; rep < std::ssize(samples.times[m]); ++rep)
      for (int stage = 0; stage < stage_count; ++stage)
        own[(m * stage_count + stage) * reps + rep] = samples.times[m][rep][stage];
  const std::vector<double> all = world.gather(own);  // [rank][mode][stage][rep]
  table.seconds.resize(all.size());
  for (std::int64_t r = 0; !all.empty() && r < table.ranks; ++r)
    for (std::int64_t row = 0; row < modes * stage_count; ++row)
      std::copy_n(all.begin() + (r * modes * stage_count + row) * reps, reps,
                  table.seconds.begin() + (row * table.ranks + r) * reps);
  return table;
}

PhaseRecord gather_phases(const ControlComm& world, const std::vector<double>& seconds, std::int64_t steps) {
  const std::vector<double> all = world.gather(seconds);  // [rank][step][phase]
  PhaseRecord record;
  if (all.empty()) return record;
  record.phases.assign(step_phase_names.begin(), step_phase_names.end());
  record.ranks = world.size(), record.reps = steps;
  for (std::int64_t phase = 0; phase < step_phase_count; ++phase)
    for (std::int64_t row = 0; row < record.ranks * steps; ++row)
      record.seconds.push_back(all[static_cast<std::size_t>(row * step_phase_count + phase)]);
  return record;
}

NoiseRecord gather_noise(const ControlComm& world, const DeviceOps& device, const std::vector<std::string>& modes,
                         const std::vector<ModeNoise>& noise) {
  if (noise.empty()) return {};
  const DeviceInfo info = device.info();
  std::vector<double> reals{info.clock_max_mhz};
  std::vector<std::int64_t> counts{info.cache_bytes};
  for (const ModeNoise& n : noise) {
    reals.insert(reals.end(), {n.seconds, n.counters.steal, n.sm_clock_mhz});
    counts.insert(counts.end(),
                  {n.counters.voluntary_switches, n.counters.involuntary_switches, n.counters.minor_faults,
                   n.counters.major_faults, n.throttle_reasons, n.throttled_passes});
  }
  const auto all_reals = world.gather(reals);
  const auto all_counts = world.gather(counts);
  NoiseRecord record;
  if (world.rank() != 0) return record;
  record.modes = modes;
  record.ranks = world.size();
  const auto pick = [&](auto& column, const auto& all, std::size_t width, std::size_t at) {
    for (std::size_t r = 0; r < all.size(); r += width) column.push_back(all[r + at]);
  };
  pick(record.sm_clock_max_mhz, all_reals, reals.size(), 0);
  pick(record.cache_bytes, all_counts, counts.size(), 0);
  for (std::size_t mode = 0; mode < noise.size(); ++mode) {
    std::size_t real = 1 + 3 * mode, count = 1 + 6 * mode;
    for (auto* column : {&record.seconds, &record.steal, &record.sm_clock_mhz})
      pick(*column, all_reals, reals.size(), real++);
    for (auto* column : {&record.voluntary_switches, &record.involuntary_switches, &record.minor_faults,
                         &record.major_faults, &record.throttle_reasons, &record.throttled_passes})
      pick(*column, all_counts, counts.size(), count++);
  }
  return record;
}

std::size_t copy_bytes_of(std::int64_t asked, std::int64_t free, std::int64_t sharers) {
  if (asked > 0) return static_cast<std::size_t>(asked);
  constexpr std::int64_t most = std::int64_t{128} << 20, most_of_host = std::int64_t{512} << 20;
  const std::int64_t bytes = std::min(most, most_of_host / sharers);
  return static_cast<std::size_t>(free > 0 ? std::min(bytes, free / sharers / 4) : bytes);
}

namespace {

/// On this rank's device.
double measured_copy_bandwidth(const DeviceOps& device, const ControlComm& world, std::size_t bytes) {
  MemoryAccount account;
  Buffer from, to;
  agreed(world, [&] {
    from = Buffer(device, account, MemoryKind::workspace, bytes);
    to = Buffer(device, account, MemoryKind::workspace, bytes);
  });
  Stream* stream = device.create_stream();
  std::vector<double> seconds;
  {
    StageTimer timer(device, stream);
    for (int rep = 0; rep < 7; ++rep) {
      world.barrier();
      const StageTimes times = timer.step([&] {
        fault::at("measure.copy");
        device.copy(to.data(), from.data(), bytes, stream);
      });
      seconds.push_back(times[static_cast<int>(Stage::step)]);
    }
  }
  device.destroy_stream(stream);
  seconds.erase(seconds.begin());
  return 2.0 * static_cast<double>(bytes) / summarise(seconds).median;
}

}  // namespace

double copy_bandwidth(const Session& session) {
  constexpr double good_for = 60.0;  // seconds
  CopyRate& last = *session.copy_rate;
  const auto now = std::chrono::steady_clock::now();
  const double age = session.world.max(std::chrono::duration<double>(now - last.measured).count());  // on all ranks
  if (last.bytes_per_second > 0 && age < good_for) return last.bytes_per_second;
  const double own = measured_copy_bandwidth(*session.backend.device, session.world, session.copy_bytes);
  last = {-session.world.max(-own), now};
  return last.bytes_per_second;
}

}  // namespace nsa
