#pragma once
// Stopping on request. One rank may see a signal or its time limit before the others, which may already be inside a
// collective. So a request alone does not stop a rank: the ranks reduce it at points of the program that all of them
// reach.

#include <chrono>
#include <cstdint>
#include <functional>
#include <utility>

#include "comm/session.hpp"

namespace nsa {

/// Thrown on every rank when a point is abandoned because the run was asked to stop.
class Interrupted : public AgreedError {
 public:
  Interrupted() : AgreedError("stopped on request", ExitCode::interrupted) {}
};

class StopPoll {
 public:
  /// `requested`: returns whether this rank was asked to stop; empty: never.
  StopPoll(const ControlComm& world, std::function<bool()> requested)
      : world_(world), requested_(std::move(requested)) {}

  /// Whether any rank was asked to stop. Collective. Once true it stays true.
  bool check();
  /// For loops of short steps: the ranks reduce about ten times a second and return false in between. All ranks must
  /// call it equally often.
  bool check_periodically();

 private:
  ControlComm world_;
  std::function<bool()> requested_;
  bool stopped_ = false;
  std::chrono::steady_clock::time_point last_check_ = std::chrono::steady_clock::now();
  std::int64_t calls_ = 0, interval_ = 1;  ///< calls since the last reduction, and calls between two reductions
};

}  // namespace nsa
