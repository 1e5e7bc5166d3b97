#pragma once
// Times a step on its stream: each stage between its own events, or only the whole step.

#include <array>
#include <vector>

#include "kernels/diagnostics/operation_log.hpp"
#include "kernels/interface/backend.hpp"
#include "nsa/results/records.hpp"

namespace nsa {

using StageTimes = std::array<double, stage_count>;  ///< seconds, NaN where not timed

class StageTimer {
 public:
  StageTimer(const DeviceOps& device, Stream* stream) : device_(device), stream_(stream) {}
  ~StageTimer();
  StageTimer(const StageTimer&) = delete;
  StageTimer& operator=(const StageTimer&) = delete;

  /// Whether each stage is timed. Then all stages run one after the other on the one stream.
  void set_per_stage(bool on) { stages_on_ = on; }
  bool per_stage() const { return stages_on_; }

  /// Runs `body`, which queues on the stream; its time is added to that of the stage.
  template <class Body>
  void time(Stage stage, Body&& body) {
    set_stage(stage_names[static_cast<std::size_t>(stage)]);
    if (!stages_on_) return body();
    const Span span{stage, next_event(), next_event()};
    device_.record(span.from, stream_);
    body();
    device_.record(span.to, stream_);
    spans_.push_back(span);
  }

  /// Runs `body` as one step, waits for it, and returns the times; that of Stage::step is always there.
  template <class Body>
  StageTimes step(Body&& body) {
    spans_.clear();
    used_ = 0;
    const Span whole{Stage::step, next_event(), next_event()};
    device_.record(whole.from, stream_);
    body();
    device_.record(whole.to, stream_);
    spans_.push_back(whole);
    return collect();
  }

 private:
  struct Span {
    Stage stage;
    Event *from, *to;
  };
  Event* next_event();
  StageTimes collect();

  const DeviceOps& device_;
  Stream* stream_;
  bool stages_on_ = false;
  std::vector<Event*> events_;
  std::size_t used_ = 0;
  std::vector<Span> spans_;
};

}  // namespace nsa
