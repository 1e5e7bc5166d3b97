#pragma once
// Stopping on request. One rank may see a signal or the end of its time before the others do, and these may be inside
// a collective by then: so a request alone decides nothing. Ranks ask each other where all of them pass anyway.

#include <chrono>
#include <cstdint>
#include <functional>
#include <utility>

#include "comm/session.hpp"

namespace nsa {

/// Thrown on every rank alike when a point is given up because the run was asked to stop.
class Interrupted : public AgreedError {
 public:
  Interrupted() : AgreedError("stopped on request", ExitCode::interrupted) {}
};

class StopPoll {
 public:
  /// `asked`: whether this rank has been asked to stop; empty: never.
  StopPoll(const ControlComm& world, std::function<bool()> asked) : world_(world), asked_(std::move(asked)) {}

  /// Whether any rank has been asked. Collective; once true it stays true.
  bool now();
  /// The same for loops of short steps: the ranks ask about ten times a second and assume "no" in between. Collective
  /// in that all ranks must call it equally often.
  bool now_and_then();

 private:
  ControlComm world_;
  std::function<bool()> asked_;
  bool stopped_ = false;
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
  std::int64_t calls_ = 0, interval_ = 1;  ///< calls since the ranks last asked, and until they ask again
};

}  // namespace nsa
