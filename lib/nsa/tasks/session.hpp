#pragma once
// What a rank keeps while the points of an input run.

#include <cstddef>
#include <functional>
#include <memory>
#include <string>

#include "comm/collectives/process_grid.hpp"
#include "comm/stop_request.hpp"
#include "kernels/interface/backend.hpp"

namespace nsa {

/// What a rank needs to run points, collectively over `world`.
struct Session {
  ControlComm world;
  Backend backend;
  std::shared_ptr<ProcessGrid> grid;  ///< reused by all points
  std::shared_ptr<StopPoll> stop;     ///< polled between steps and points
  std::string input_hash;             ///< SHA-256 of [input] file, on rank 0; empty without one
  bool strict = false;                ///< a fallback makes the point INVALID
  /// Size of the copies that measure copy_bandwidth. Tests that do not read it set a small one.
  std::size_t copy_bytes = std::size_t{128} << 20;
};

/// `progress(done, total, what)` is called on every rank from time to time.
using Progress = std::function<void(double done, double total, const std::string& what)>;

}  // namespace nsa
