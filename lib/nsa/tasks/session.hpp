#pragma once
// What a rank keeps while the points of an input run.

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "comm/collectives/process_grid.hpp"
#include "comm/stop_request.hpp"
#include "kernels/interface/backend.hpp"

namespace nsa {

/// The last measurement of copy_bandwidth.
struct CopyRate {
  double bytes_per_second = 0;  ///< 0: not measured
  std::chrono::steady_clock::time_point measured = {};
};

/// Bytes of each of the two buffers of a copy, on one of `sharers` ranks that share a memory with `free` bytes (0:
/// unknown): what run.copy_bytes asks for. 0 is auto: together they are larger than most caches, and take at most 1 GiB
/// and half of the free memory.
std::size_t copy_bytes_of(std::int64_t asked, std::int64_t free, std::int64_t sharers);

/// What a rank needs to run points, collectively over `world`.
struct Session {
  ControlComm world;
  Backend backend;
  std::shared_ptr<ProcessGrid> grid;  ///< reused by all points
  std::shared_ptr<StopPoll> stop;     ///< polled between steps and points
  std::string input_hash;             ///< SHA-256 of [input] file, on rank 0; empty without one
  std::string selection_hash;         ///< the same of [input] selection
  bool strict = false;                ///< a fallback makes the point INVALID
  std::size_t copy_bytes = 0;         ///< of each buffer of the copy that copy_bandwidth measures
  std::shared_ptr<CopyRate> copy_rate = std::make_shared<CopyRate>();
};

/// `progress(done, total, what)` is called on every rank from time to time.
using Progress = std::function<void(double done, double total, const std::string& what)>;

}  // namespace nsa
