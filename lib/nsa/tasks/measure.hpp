#pragma once
// The modes of measuring (design section 4) and their raw samples.

#include <string>
#include <vector>

#include "comm/session.hpp"
#include "comm/stop_request.hpp"
#include "nsa/forward/stage_timer.hpp"
#include "nsa/forward/stages.hpp"

namespace nsa {

/// One measured way of running a step.
struct ModeRun {
  std::string name;  ///< "branches", "total", "ablation_cmp", "one_hot_sel", ...
  StepOptions options;
  bool stages = false;  ///< stages timed apart
};
std::vector<ModeRun> mode_runs(const Config& config, const Point& point);

/// This rank's samples: by mode, rep by rep.
struct Samples {
  std::vector<std::string> modes;
  std::vector<std::vector<StageTimes>> times;
};

/// Runs one pass of a mode after the other until each has measured min_time seconds, by the slowest rank, so that
/// all ranks stop together. `pass(mode, sink)` runs all steps and hands each one's times to the sink; false: the run
/// was asked to stop within it, and its samples do not count. Returns the reason of the stop, "steps", "min_time" or,
/// where every mode had a whole pass by then, "interrupted"; else throws Interrupted.
template <class Pass>
std::string measure(const ControlComm& world, const std::vector<ModeRun>& runs, double min_time, Samples& samples,
                    Pass&& pass) {
  bool repeated = false;
  for (const ModeRun& run : runs) {
    samples.modes.push_back(run.name);
    std::vector<StageTimes>& taken = samples.times.emplace_back();
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
      measured += world.max(seconds);
      if (measured >= min_time) break;
      repeated = true;
    }
  }
  return repeated ? "min_time" : "steps";
}

/// Samples of all ranks, on rank 0.
TimeTable gather_times(const ControlComm& world, const Samples& samples);

/// Bytes/s, read and written, of a copy of `bytes` on this rank's device while all ranks copy.
double copy_bandwidth(const Backend& backend, const ControlComm& world, std::size_t bytes);

}  // namespace nsa
