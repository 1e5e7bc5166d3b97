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
/// `asked_to_stop` says whether this rank was asked to stop; empty: never.
Session open_session(const Config& config, const ControlComm& world, std::function<bool()> asked_to_stop = {});

/// Peak bytes of memory of a rank, by kind, from the shapes alone: nothing is allocated.
MemoryAccount planned_memory(const Backend& backend, const Config& config, const Partition& partition,
                             const Point& point);

/// Runs one point. Collective. The record is complete on rank 0; every rank gets valid, reason and stop_reason.
/// Throws the same UserError on every rank when one of them fails, and Interrupted when the run was asked to stop
/// before the point had measured every mode once.
PointRecord run_point(const Session& session, const Config& config, const Point& point, std::int64_t index,
                      const Progress& progress);

/// SHA-256 of everything but the program that decides the result of a point: parameters, sharding, device, input file.
/// On rank 0.
std::string fingerprint(const Session& session, const Config& config, const Point& point);

/// Describes the run and every rank's machine, on rank 0. The caller fills in the build's facts and the status.
RunRecord describe_run(const Session& session, const Config& config, const std::string& input_toml,
                       const std::string& argv);

/// Fills in the time of the end, and clocks and ECC errors after the last point. Collective.
void close_run(const Session& session, RunRecord& run);

}  // namespace nsa
