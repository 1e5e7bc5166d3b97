#pragma once
// Cores and threads of the ranks.

#include "comm/session.hpp"
#include "nsa/results/records.hpp"

namespace nsa {

/// Ranks of one host with the same affinity share their cores. Without binding by the launcher all of them do.
struct Cores {
  int cores = 1;    ///< in the affinity mask of this rank
  int sharers = 1;  ///< ranks with the same affinity mask, this one included
};

/// Collective.
Cores cores_of_rank(const ControlComm& world);

/// Sets the threads of the host backend to cores / sharers, unless OMP_NUM_THREADS is set.
void set_default_host_threads(const Cores& own);

/// Fills in threads, cores, sharers and environment of every rank, on rank 0. Collective.
void describe_threads(const ControlComm& world, const Cores& own, RunRecord& run);

/// "4 ranks with 1 thread each share 2 cores of node7 (...)" for the first rank with more threads than cores; on GPUs
/// for the first GPU that ranks share. Empty if there is none.
std::string oversubscribed(const RunRecord& run);

}  // namespace nsa
