#include "comm/stop_request.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace nsa {

constexpr double ask_every = 0.1;  // seconds: often enough to be ten times late where steps get slower all at once

bool StopPoll::now() {
  if (!stopped_) stopped_ = world_.max(std::int64_t{asked_ && asked_()}) > 0;
  return stopped_;
}

bool StopPoll::now_and_then() {
  if (stopped_ || ++calls_ < interval_) return stopped_;
  // The interval comes out of what all ranks share, or they would ask at different calls.
  const auto time = std::chrono::steady_clock::now();
  const double own = std::chrono::duration<double>(time - last_).count();
  const double seconds = world_.max(asked_ && asked_() ? std::numeric_limits<double>::infinity() : own);
  stopped_ = std::isinf(seconds);
  const double calls = static_cast<double>(calls_) * ask_every / std::max(seconds, 1e-9);
  interval_ = std::clamp<std::int64_t>(std::llround(std::min(calls, 1e9)), 1, 2 * interval_);
  calls_ = 0;
  last_ = time;
  return stopped_;
}

}  // namespace nsa
