#pragma once
// Collectives on backend memory, queued on a stream: over MPI on the host and over NCCL on CUDA. Small messages on CUDA
// go through peer memory if all GPUs of the group can access each other; opening the communicator decides this for all
// of its ranks together. A group of one rank copies nothing and calls no library.

#include <cstddef>
#include <memory>
#include <string>

#include "comm/session.hpp"
#include "kernels/diagnostics/operation_log.hpp"
#include "kernels/interface/backend.hpp"

namespace nsa {

class Communicator {
 public:
  Communicator();  ///< a group of one
  /// Collective over `group`.
  Communicator(const Backend& backend, const ControlComm& group);
  ~Communicator();
  Communicator(Communicator&&) noexcept;
  Communicator& operator=(Communicator&&) noexcept;
  /// The version of NCCL; empty in a build without it.
  static std::string library_version();
  int rank() const;
  int size() const;
  /// "MPI", "NCCL", or "peer memory" (NCCL then carries long messages). Empty for a group of one.
  std::string transport() const;
  /// Device memory that the communicator holds.
  std::size_t memory_bytes() const;
  /// Through which kernels exchange by themselves, each rank on a GPU of its own; null where there is none.
  const PeerMemory* peer_memory() const;
  /// Logs the exchange of that many bytes that kernels which `queue` queues do by themselves.
  template <class Queue>
  void exchange_in_kernel(const char* what, std::size_t bytes, Queue queue) const {
    const Operation operation(OperationKind::exchange, "exchange in kernel", bytes, group_id(), what);
    queue();
  }
  /// recv [size][bytes] on every rank; send [bytes], may be recv + rank * bytes. `what` names the data in the operation
  /// log; a string literal.
  void all_gather(const char* what, const void* send, void* recv, std::size_t bytes, Stream* stream) const;
  /// data [count] = sum over ranks, in place. The sum runs by rising rank; over NCCL its order is unspecified.
  void all_reduce_sum(const char* what, float* data, std::size_t count, Stream* stream) const;

 private:
  std::uint64_t group_id() const;
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace nsa
