#include "nsa/tasks/measure.hpp"

#include <algorithm>
#include <chrono>
#include <limits>

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

// Returns the reason of the stop.
std::string measure_modes(const ControlComm& world, const std::vector<ModeRun>& runs, double min_time,
                          std::int64_t most_reps, Samples& samples,
                          const std::function<bool(const ModeRun&, const TakeSample&)>& pass) {
  bool repeated = false;
  for (const ModeRun& run : runs) {
    samples.modes.push_back(run.name);
    std::vector<StageTimes>& taken = samples.times.emplace_back();
    StoredPasses stored(taken, most_reps);
    for (double measured = 0;;) {
      world.barrier();
      const std::size_t before = taken.size();
      double seconds = 0;
      const bool whole = pass(run, [&](const StageTimes& times) {
        taken.push_back(times);
        seconds += times[static_cast<int>(Stage::step)];
      });
      if (!whole) {
        taken.resize(before);
        if (taken.empty() || samples.modes.size() < runs.size()) throw Interrupted();
        return "interrupted";
      }
      stored.end_pass(before);
      measured += world.max(seconds);
      if (measured >= min_time) break;
      repeated = true;
    }
  }
  return repeated ? "min_time" : "steps";
}

}  // namespace

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
  return run.options.leave_out < 0 && run.options.force_branch == point.force_branch;
}

std::vector<ModeRun> mode_runs(const Config& config, const Point& point) {
  std::vector<ModeRun> runs;
  const StepOptions base = step_options(point);
  for (const Mode mode : config.run.modes) {
    if (mode == Mode::branches) runs.push_back({"branches", base, true});
    if (mode == Mode::total) runs.push_back({"total", base, false});
    for (int c = 0; c < branches; ++c) {
      StepOptions options = base;
      if (mode == Mode::ablation) {
        options.leave_out = c;
        runs.push_back({std::string("ablation_") + branch_names[c], options, false});
      } else if (mode == Mode::one_hot) {
        options.force_branch = c;
        runs.push_back({std::string("one_hot_") + branch_names[c], options, false});
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
  Samples samples;
  do {
    samples = {};  // those taken before a fallback measured other kernels
    double passes = 0;
    task.prepare();
    const auto pass = [&](const ModeRun& run, const TakeSample& take) {
      timer.set_per_stage(run.stages);
      return task.pass(run, timer, [&](const StageTimes& times) {
        take(times);
        progress(std::min(passes += 1 / steps, all), all, run.name);
      });
    };
    record.stop_reason = measure_modes(session.world, runs, shard.config.run.min_time, most_reps, samples, pass);
  } while (shard.routes.agree(session.world));
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

std::size_t copy_bytes_of(std::int64_t free, std::int64_t sharers) {
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
      const StageTimes times = timer.step([&] { device.copy(to.data(), from.data(), bytes, stream); });
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
