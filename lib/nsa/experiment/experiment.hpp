#pragma once
// Runs the points of an input on all ranks.

#include <functional>
#include <memory>
#include <string>

#include "comm/collectives/process_grid.hpp"
#include "comm/stop_request.hpp"
#include "kernels/interface/buffer.hpp"
#include "nsa/config/config.hpp"
#include "nsa/model/partition.hpp"
#include "nsa/results/records.hpp"

namespace nsa {

/// What a rank needs to take part: collective over `world`.
struct Session {
  Control world;
  Backend backend;
  std::shared_ptr<Layouts> layouts;  ///< kept from point to point
  std::shared_ptr<StopPoll> stop;    ///< asked between steps and points
  std::string input_hash;            ///< SHA-256 of [input] file, on rank 0; empty without one
  bool strict = false;               ///< a fallback makes the point INVALID
};

/// Opens the backend the input asks for (automatic: CUDA where built and every rank has a device, else host).
/// `asked_to_stop` is this rank's say; empty: never.
Session open_session(const Config& config, const Control& world, std::function<bool()> asked_to_stop = {});

/// Bytes of memory a rank needs at its peak, by kind, from the shapes alone: nothing is allocated.
MemoryAccount planned_memory(const KernelTable& kernels, const Config& config, const Partition& partition,
                             const Point& point);

/// `progress(done, total, what)` is called on every rank now and then.
using Progress = std::function<void(double done, double total, const std::string& what)>;

/// Runs one point. Collective. The record is complete on rank 0; every rank gets valid, reason and stop_reason.
/// Throws UserError on every rank alike when one of them fails, and Interrupted when the run was asked to stop
/// before the point had measured every mode once.
PointRecord run_point(const Session& session, const Config& config, const Point& point, std::int64_t index,
                      const Progress& progress);

/// Names all that decides the result of a point but the program: parameters, sharding, device, input. On rank 0.
std::string fingerprint(const Session& session, const Config& config, const Point& point);

/// Facts of the run and of every rank's machine, on rank 0. Build facts and status are the caller's.
RunRecord describe_run(const Session& session, const Config& config, const std::string& input_toml,
                       const std::string& argv);

/// Fills in what is known at the end: the end's time, clocks and ECC after. Collective.
void close_run(const Session& session, RunRecord& run);

}  // namespace nsa
