#pragma once
// Runs the points of an input on all ranks.

#include <functional>
#include <string>

#include "kernels/interface/buffer.hpp"
#include "nsa/config/config.hpp"
#include "nsa/model/partition.hpp"
#include "nsa/results/records.hpp"
#include "nsa/tasks/session.hpp"

namespace nsa {

/// Opens the backend the input asks for (automatic: CUDA where built and every rank has a device, else host).
/// `asked_to_stop` is this rank's say; empty: never.
Session open_session(const Config& config, const ControlComm& world, std::function<bool()> asked_to_stop = {});

/// Bytes of memory a rank needs at its peak, by kind, from the shapes alone: nothing is allocated.
MemoryAccount planned_memory(const KernelTable& kernels, const Config& config, const Partition& partition,
                             const Point& point);

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
