#include "nsa/forward/stage_timer.hpp"

#include <cmath>
#include <limits>

namespace nsa {

StageTimer::~StageTimer() {
  for (Event* event : events_) device_.destroy_event(event);
}

Event* StageTimer::next_event() {
  if (used_ == events_.size()) events_.push_back(device_.create_event());
  return events_[used_++];
}

StageTimes StageTimer::collect() {
  device_.synchronize(stream_);
  StageTimes times;
  times.fill(std::numeric_limits<double>::quiet_NaN());
  for (const Span& span : spans_) {
    double& sum = times[static_cast<int>(span.stage)];
    sum = (std::isnan(sum) ? 0.0 : sum) + device_.elapsed(span.from, span.to);
  }
  return times;
}

}  // namespace nsa
