#pragma once
// Cores and threads of the ranks.

#include <string>
#include <vector>

#include "comm/session.hpp"
#include "nsa/results/records.hpp"

namespace nsa {

/// Ranks of one machine with the same affinity share their cores. Without binding by the launcher all of them do.
struct Cores {
  int cores = 1;        ///< in the affinity mask of this rank, and within the quota of its control groups
  int sharers = 1;      ///< ranks of this machine with the same affinity mask, this one included
  int on_machine = 0;   ///< cores of all ranks of this machine
  int of_launcher = 0;  ///< cores that mpirun itself has; 0: unknown
};

/// Collective.
Cores cores_of_rank(const ControlComm& world);

/// Throws AgreedError where the launcher has started several processes that MPI does not connect: each would do the
/// whole run.
void check_launch(const ControlComm& world);

/// Threads that OMP_NUM_THREADS asks for; 0 where it is not set or no positive number.
int requested_threads();

/// Sets the threads of the host backend to requested_threads(), else to cores / sharers. Throws UserError(device) where
/// the system refuses so many threads.
void set_default_host_threads(const Cores& own);

/// Fills in threads, cores, sharers and environment of every rank, on rank 0. Collective.
void describe_threads(const ControlComm& world, const Cores& own, RunRecord& run);

/// "4 ranks with 1 thread each share 2 cores of node7 (...)" for the first rank with more threads than cores; on GPUs
/// for the first GPU that ranks share. Empty if there is none.
std::string oversubscribed(const RunRecord& run);

/// What the user should know of the launch: an OMP_NUM_THREADS that is ignored, cores that mpirun keeps from the ranks,
/// and `oversubscribed`.
std::vector<std::string> launch_notes(const RunRecord& run, const Cores& own);

}  // namespace nsa
