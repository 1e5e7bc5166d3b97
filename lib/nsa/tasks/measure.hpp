#pragma once
// The modes of measuring (docs/METRICS.md) and their raw samples.

#include <functional>
#include <string>
#include <vector>

#include "nsa/forward/stage_timer.hpp"
#include "nsa/forward/stages.hpp"
#include "nsa/tasks/session.hpp"

namespace nsa {

/// One measured way of running a step.
struct ModeRun {
  std::string name;  ///< "branches", "total", "ablation_cmp", "one_hot_sel", ...
  StepOptions options;
  bool stages = false;  ///< each stage is timed
};
/// The options of the point's own step.
StepOptions step_options(const Point& point);
std::vector<ModeRun> mode_runs(const Config& config, const Point& point);
/// Whether a step of the mode has the output of the point's own step: all branches, with the point's gates.
bool computes_point_step(const ModeRun& run, const Point& point);

/// This rank's samples: by mode, rep by rep.
struct Samples {
  std::vector<std::string> modes;
  std::vector<std::vector<StageTimes>> times;
};

using TakeSample = std::function<void(const StageTimes&)>;

/// What measure_point calls. Both are collective.
struct MeasuredTask {
  /// Before the first mode, and again before all modes are repeated.
  std::function<void()> prepare;
  /// One pass of a mode: all its steps, each timed and handed to `take`. False: the run was asked to stop within it.
  std::function<bool(const ModeRun& run, StageTimer& timer, const TakeSample& take)> pass;
};

/// Most repetitions of a mode that a point stores: 16 MiB of samples of all modes and ranks, but two passes at least.
std::int64_t most_stored_reps(const Config& config, std::int64_t modes, std::int64_t ranks);

/// Measures the modes of a point, one after the other. The passes of a mode repeat until they have taken run.min_time
/// seconds, by the slowest rank, so that all ranks stop together. Of more passes than most_stored_reps holds, every
/// second one is kept, then every fourth, and so on. Where a fallback took over on any rank, all ranks
/// take it and all modes repeat. An interrupted pass does not count. Records the reason of the stop: "steps",
/// "min_time", or "interrupted" where every mode has a whole pass; else throws Interrupted. Collective.
Samples measure_point(const Session& session, ModelShard& shard, const MeasuredTask& task, PointRecord& record,
                      const Progress& progress);

/// Samples of all ranks, on rank 0.
TimeTable gather_times(const ControlComm& world, const Samples& samples);

/// Bytes/s, read and written, of a copy on the slowest rank's device while all ranks copy session.copy_bytes. A rate
/// that is less than a minute old is not measured again. Collective.
double copy_bandwidth(const Session& session);

}  // namespace nsa
