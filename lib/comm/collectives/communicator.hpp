#pragma once
// Collectives on backend memory, queued on a stream: MPI on the host, NCCL on CUDA, and there what is small straight
// through the GPUs' memory, where a group's ranks reach it: settled for all of them alike when the communicator is
// opened. A group of one rank copies nothing and calls no library.

#include <cstddef>
#include <memory>
#include <string>

#include "comm/session.hpp"
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
  /// Of NCCL; empty in a build without.
  static std::string library_version();
  int rank() const;
  int size() const;
  /// "MPI", "NCCL", or "peer memory": then NCCL does what is long. Empty for a group of one.
  std::string transport() const;
  /// Of the device, held as long as this.
  std::size_t memory_bytes() const;
  /// recv [size][bytes] on every rank. send may be recv + rank * bytes. `what` travels, a literal: for the log of
  /// operations.
  void all_gather(const char* what, const void* send, void* recv, std::size_t bytes, Stream* stream) const;
  /// data [count] = sum over ranks, in place; by rising rank, but by NCCL in an order of its own.
  void all_reduce_sum(const char* what, float* data, std::size_t count, Stream* stream) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace nsa
