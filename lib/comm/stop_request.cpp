#include "comm/stop_request.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace nsa {

// Seconds. With this interval a request is noticed within a second even where steps suddenly take ten times as long.
constexpr double check_interval = 0.1;

bool StopPoll::check() {
  if (!stopped_) stopped_ = world_.max(std::int64_t{requested_ && requested_()}) > 0;
  return stopped_;
}

bool StopPoll::check_periodically() {
  if (stopped_ || ++calls_ < interval_) return stopped_;
  // The interval is computed from a reduced value, so that all ranks reduce at the same call.
  const auto now = std::chrono::steady_clock::now();
  const double elapsed = std::chrono::duration<double>(now - last_check_).count();
  const double seconds = world_.max(requested_ && requested_() ? std::numeric_limits<double>::infinity() : elapsed);
  stopped_ = std::isinf(seconds);
  const double calls = static_cast<double>(calls_) * check_interval / std::max(seconds, 1e-9);
  interval_ = std::clamp<std::int64_t>(std::llround(std::min(calls, 1e9)), 1, 2 * interval_);
  calls_ = 0;
  last_check_ = now;
  return stopped_;
}

}  // namespace nsa
