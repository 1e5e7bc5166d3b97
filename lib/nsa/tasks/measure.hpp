#pragma once
// The modes of measuring (docs/METRICS.md) and their raw samples.

#include <functional>
#include <string>
#include <vector>

#include "nsa/forward/noise_meter.hpp"
#include "nsa/forward/stage_timer.hpp"
#include "nsa/forward/stages.hpp"
#include "nsa/tasks/session.hpp"

namespace nsa {

/// What a sample is the time of.
enum class Timed {
  stages,  ///< each stage, and the step around them, between two events
  step,    ///< a step between two events
  device,  ///< a step, from its begin to its end on the device's own clock
  queued   ///< from the begin of a step to that of the next on the device's clock, where nothing waits between them
};

/// One measured way of running a step.
struct ModeRun {
  std::string name;  ///< "branches", "total", "ablation_cmp", "one_hot_sel", "device", "queued", ...
  StepOptions options;
  Timed timed = Timed::step;
  std::int64_t steps_a_sample = 1;
};
/// The options of the point's own step.
StepOptions step_options(const Point& point);
std::vector<ModeRun> mode_runs(const Config& config, const Point& point);
/// Whether a step of the mode has the output of the point's own step: all branches, with the point's gates and inputs.
bool computes_point_step(const ModeRun& run, const Point& point);

/// This rank's samples: by mode, rep by rep, and what may have disturbed them.
struct Samples {
  std::vector<std::string> modes;
  std::vector<std::vector<StageTimes>> times;
  std::vector<ModeNoise> noise;
};

using TakeSample = std::function<void(const StageTimes&)>;

/// What measure_point calls. All are collective.
struct MeasuredTask {
  /// Before the first mode, and again before all modes are repeated.
  std::function<void()> prepare;
  /// One pass of a mode: all its steps, each timed and handed to `take`. False: the run was asked to stop within it.
  std::function<bool(const ModeRun& run, StageTimer& timer, const TakeSample& take)> pass;
  /// After all modes: lets every rank take a fallback of any. Whether there was a new one.
  std::function<bool()> fell_back;
};

/// Measures again what ran at a lowered clock: a pass whose mean SM clock is below run.throttle_threshold of the
/// largest one is dropped, on all ranks, and repeated after run.recovery_delay seconds; most_repeated times, then it
/// counts.
class ThrottleRecovery {
 public:
  static constexpr int most_repeated = 20;
  ThrottleRecovery(const ControlComm& world, const RunConfig& run) : world_(world), run_(run) {}
  /// After a pass. True: it does not count; this has waited. Collective.
  bool repeats(NoiseMeter& meter);

 private:
  const ControlComm& world_;
  const RunConfig& run_;
  int repeated_ = 0;
};

/// Most repetitions of a mode that a point stores: 16 MiB of samples of all modes and ranks, but two passes at least.
std::int64_t most_stored_reps(const Config& config, std::int64_t modes, std::int64_t ranks);

/// Measures the modes of a point, one after the other. The passes of a mode repeat until they have taken run.min_time
/// seconds, by the slowest rank, and until the 95% interval of the median of a step is at most run.min_interval wide,
/// or run.interval_time is over; all ranks stop together. Of more passes than most_stored_reps holds, every second one
/// is kept, then every fourth, and so on. Where a fallback took over on any rank, all ranks take it and all modes
/// repeat. An interrupted pass does not count. Records the reason of the stop: "steps", "min_time", "min_interval",
/// "interval_time", or "interrupted" where every mode has a whole pass; else throws Interrupted. Collective.
Samples measure_point(const Session& session, ModelShard& shard, const MeasuredTask& task, PointRecord& record,
                      const Progress& progress);

/// Samples of all ranks, on rank 0.
TimeTable gather_times(const ControlComm& world, const Samples& samples);

/// Phases of the steps of all ranks, on rank 0, from this rank's seconds[step][phase] (StepPhase). Collective.
PhaseRecord gather_phases(const ControlComm& world, const std::vector<double>& seconds, std::int64_t steps);

/// What may have disturbed the modes on all ranks, on rank 0; empty where none was measured. judge_noise fills in the
/// rest. Collective.
NoiseRecord gather_noise(const ControlComm& world, const DeviceOps& device, const std::vector<std::string>& modes,
                         const std::vector<ModeNoise>& noise);

/// Bytes/s, read and written, of a copy on the slowest rank's device while all ranks copy session.copy_bytes. A rate
/// that is less than a minute old is not measured again. Collective.
double copy_bandwidth(const Session& session);

}  // namespace nsa
