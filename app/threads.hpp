#pragma once
// Cores and threads of this rank.

#include "comm/session.hpp"
#include "nsa/results/records.hpp"

namespace nsa {

/// Ranks of one host with the same affinity share their cores, as all do when the launcher binds nobody.
struct Cores {
  int cores = 1;    ///< that this rank may run on
  int sharers = 1;  ///< ranks that may run on the same ones, itself among them
};

/// Collective.
Cores cores_of_rank(const ControlComm& world);

/// Sets the host backend's threads to the rank's share of its cores, unless OMP_NUM_THREADS says how many.
void choose_host_threads(const Cores& mine);

/// Fills threads, cores, sharers and environment of every rank. Collective.
void describe_threads(const ControlComm& world, const Cores& mine, RunRecord& run);

/// "4 ranks with 1 thread each share 2 cores of node7: ..." of the first rank with more threads than cores, or on GPUs
/// of the first without one of its own; empty: none.
std::string oversubscribed(const RunRecord& run);

}  // namespace nsa
