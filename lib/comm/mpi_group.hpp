#pragma once
// The MPI communicator of a ControlComm. Only for sources of lib/comm.

#include <mpi.h>

#include <cstdint>

#include "comm/session.hpp"

namespace nsa {

struct ControlComm::Impl {
  MPI_Comm comm = MPI_COMM_NULL;
  MPI_Comm host_comm = MPI_COMM_NULL;  ///< the ranks of `comm` on this host
  int rank = 0, size = 1, local_rank = 0, local_size = 1;
  std::uint64_t group_id;                 ///< equal on its ranks; identifies the group in the operation log
  mutable std::uint64_t split_count = 0;  ///< groups split from this one
  Impl(MPI_Comm owned, std::uint64_t group_id);
  ~Impl();
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;
};

/// Throws UserError(communication) naming the call when MPI returns an error.
void check_mpi(int code, const char* call);

}  // namespace nsa
