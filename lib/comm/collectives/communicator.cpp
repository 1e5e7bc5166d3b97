#include "comm/collectives/communicator.hpp"

#include <mpi.h>

#include <algorithm>
#include <climits>
#include <cstdint>
#include <cstring>
#include <vector>

#include "comm/collectives/communicator_impl.hpp"
#include "kernels/diagnostics/fault_injection.hpp"
#include "kernels/diagnostics/operation_log.hpp"

namespace nsa {

namespace {

MPI_Comm comm_of(void* state) { return static_cast<const ControlComm::Impl*>(state)->comm; }

// MPI counts are int: a message longer than INT_MAX bytes is sent as 8-byte integers.
void all_gather_mpi(void* state, const void* send, void* recv, std::size_t bytes, Stream*) {
  const auto* group = static_cast<const ControlComm::Impl*>(state);
  char* own = static_cast<char*>(recv) + bytes * group->rank;
  if (send != own) std::memcpy(own, send, bytes);
  const bool wide = bytes > INT_MAX;
  if (bytes / 8 > INT_MAX || (wide && bytes % 8 != 0))
    throw InternalError("all_gather of " + std::to_string(bytes) + " bytes a rank (more than MPI can count)");
  check_mpi(MPI_Allgather(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, recv, static_cast<int>(wide ? bytes / 8 : bytes),
                          wide ? MPI_INT64_T : MPI_BYTE, group->comm),
            "MPI_Allgather");
}

// Adds by rising rank, so that the sum does not depend on the algorithm that MPI chooses.
void all_reduce_sum_mpi(void* state, float* data, std::size_t count, Stream*) {
  const auto* group = static_cast<const ControlComm::Impl*>(state);
  constexpr std::size_t chunk = std::size_t{1} << 20;
  std::vector<float> all(std::min(chunk, count) * group->size);
  for (std::size_t offset = 0; offset < count; offset += chunk) {
    const std::size_t n = std::min(chunk, count - offset);
    check_mpi(MPI_Allgather(data + offset, static_cast<int>(n), MPI_FLOAT, all.data(), static_cast<int>(n), MPI_FLOAT,
                            comm_of(state)),
              "MPI_Allgather");
    std::copy_n(all.data(), n, data + offset);
    for (int r = 1; r < group->size; ++r)
      for (std::size_t i = 0; i < n; ++i) data[offset + i] += all[r * n + i];
  }
}

void close_mpi(void* state) noexcept { delete static_cast<ControlComm::Impl*>(state); }

void* open_mpi(const ControlComm::Impl& group, CollectiveOps& ops) {
  MPI_Comm comm = MPI_COMM_NULL;
  check_mpi(MPI_Comm_dup(group.comm, &comm), "MPI_Comm_dup");
  ops = {all_gather_mpi, all_reduce_sum_mpi, close_mpi};
  return new ControlComm::Impl(comm, group.group_id);
}

}  // namespace

#if !NSA_CUDA
void* open_nccl(const ControlComm::Impl&, CollectiveOps&) { throw InternalError("NCCL in a build without CUDA"); }
void open_peer_memory(const DeviceOps&, const ControlComm::Impl&, void*&, CollectiveOps&) {}
std::string nccl_version() { return {}; }
#endif

Communicator::Communicator() : impl_(std::make_unique<Impl>()) {}

Communicator::Communicator(const Backend& backend, const ControlComm& group) : impl_(std::make_unique<Impl>()) {
  impl_->rank = group.rank();
  impl_->size = group.size();
  impl_->group_id = group.impl().group_id;
  if (impl_->size == 1) return;
  const bool host = backend.kind == BackendKind::host;
  {
    const Operation operation(OperationKind::control, "open communicator", 0, impl_->group_id);
    impl_->state = host ? open_mpi(group.impl(), impl_->ops) : open_nccl(group.impl(), impl_->ops);
  }
  if (!host) open_peer_memory(*backend.device, group.impl(), impl_->state, impl_->ops);
}

Communicator::Impl::~Impl() {
  if (state) ops.close(state);
}

Communicator::~Communicator() = default;
Communicator::Communicator(Communicator&&) noexcept = default;
Communicator& Communicator::operator=(Communicator&&) noexcept = default;

std::string Communicator::library_version() { return nccl_version(); }
int Communicator::rank() const { return impl_->rank; }
int Communicator::size() const { return impl_->size; }
std::string Communicator::transport() const { return impl_->state ? impl_->ops.transport : ""; }
const PeerMemory* Communicator::peer_memory() const { return impl_->ops.peers; }
std::uint64_t Communicator::group_id() const { return impl_->group_id; }
std::size_t Communicator::memory_bytes() const { return impl_->ops.memory_bytes; }

void Communicator::all_gather(const char* what, const void* send, void* recv, std::size_t bytes, Stream* stream) const {
  const fault::Fault fault = fault::at("comm.all_gather");
  if (impl_->size == 1 || fault.is(fault::Action::skip)) return;
  if (fault.is(fault::Action::shorten)) bytes /= 2;
  const Operation operation(OperationKind::exchange, "all_gather", bytes, impl_->group_id, what);
  if (bytes > 0) impl_->ops.all_gather(impl_->state, send, recv, bytes, stream);
}

void Communicator::all_reduce_sum(const char* what, float* data, std::size_t count, Stream* stream) const {
  const fault::Fault fault = fault::at("comm.all_reduce");
  if (impl_->size == 1 || fault.is(fault::Action::skip)) return;
  if (fault.is(fault::Action::shorten)) count /= 2;
  const Operation operation(OperationKind::exchange, "all_reduce", count * sizeof(float), impl_->group_id, what);
  if (count > 0) impl_->ops.all_reduce_sum(impl_->state, data, count, stream);
}

}  // namespace nsa
