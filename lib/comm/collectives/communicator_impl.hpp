#pragma once
// The state of a Communicator: its group, and three functions over MPI, NCCL or peer memory. Only for lib/comm.

#include <cstddef>
#include <cstdint>

#include "comm/collectives/communicator.hpp"
#include "comm/mpi_group.hpp"

namespace nsa {

struct CollectiveOps {
  void (*all_gather)(void* state, const void* send, void* recv, std::size_t bytes, Stream* stream);
  void (*all_reduce_sum)(void* state, float* data, std::size_t count, Stream* stream);
  void (*close)(void* state) noexcept;
  const char* transport = "MPI";
  std::size_t memory_bytes = 0;       ///< device memory that the state holds
  const PeerMemory* peers = nullptr;  ///< of ranks that have a GPU each
};

struct Communicator::Impl {
  int rank = 0, size = 1;
  std::uint64_t group_id = 0;
  void* state = nullptr;  ///< null for a group of one
  CollectiveOps ops{};
  Impl() = default;
  ~Impl();
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;
};

/// Opens a blocking NCCL communicator, bootstrapped over MPI, and returns its state. Collective over `group`.
void* open_nccl(const ControlComm::Impl& group, CollectiveOps& ops);

/// Collective over `group`. If all ranks can access each other's GPU memory, replaces `state` and `ops` on all ranks by
/// collectives through peer memory, which keep the given ones for long messages. Else changes nothing on any rank.
void open_peer_memory(const DeviceOps& device, const ControlComm::Impl& group, void*& state, CollectiveOps& ops);

/// "2.28.3"; empty in a build without CUDA.
std::string nccl_version();

}  // namespace nsa
