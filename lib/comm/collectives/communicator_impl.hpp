#pragma once
// What a Communicator holds: a group's size and three functions of MPI or of NCCL. Only for lib/comm.

#include <cstddef>
#include <cstdint>

#include "comm/collectives/communicator.hpp"
#include "comm/mpi_group.hpp"

namespace nsa {

struct CollectiveOps {
  void (*all_gather)(void* state, const void* send, void* recv, std::size_t bytes, Stream* stream);
  void (*all_reduce_sum)(void* state, float* data, std::size_t count, Stream* stream);
  void (*close)(void* state) noexcept;
  const char* by = "MPI";        ///< what does it
  std::size_t memory_bytes = 0;  ///< of the device, held as long as the state
};

struct Communicator::Impl {
  int rank = 0, size = 1;
  std::uint64_t group = 0;
  void* state = nullptr;  ///< null for a group of one
  CollectiveOps ops{};
  Impl() = default;
  ~Impl();
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;
};

/// Collective over `group`; returns the state of a blocking NCCL communicator, bootstrapped over MPI.
void* open_nccl(const ControlComm::Impl& group, CollectiveOps& ops);

/// Collective over `group`. Where all ranks reach each other's GPU memory, `state` and `ops` become those of exchanges
/// through it, around what they were; else they stay, on all ranks alike.
void join_peers(const DeviceOps& device, const ControlComm::Impl& group, void*& state, CollectiveOps& ops);

/// "2.28.3"; empty in a build without CUDA.
std::string nccl_version();

}  // namespace nsa
