// Collectives over NCCL, bootstrapped over MPI. The only source that includes nccl.h.

#include <cuda_runtime_api.h>
#include <nccl.h>

#include <cstdlib>
#include <exception>
#include <string>

#include "comm/collectives/communicator_impl.hpp"
#include "kernels/diagnostics/operation_log.hpp"

namespace nsa {

namespace {

void check_nccl(ncclResult_t code, const char* call, ncclComm_t comm = nullptr) {
  if (code == ncclSuccess) return;
  throw UserError(std::string(call) + " failed (" + ncclGetErrorString(code) + ": " + ncclGetLastError(comm) +
                      "); set NCCL_DEBUG=WARN to see more",
                  ExitCode::communication);
}

ncclComm_t comm_of(void* state) { return static_cast<ncclComm_t>(state); }
cudaStream_t cuda(Stream* stream) { return reinterpret_cast<cudaStream_t>(stream); }

void all_gather_nccl(void* state, const void* send, void* recv, std::size_t bytes, Stream* stream) {
  check_nccl(ncclAllGather(send, recv, bytes, ncclUint8, comm_of(state), cuda(stream)), "ncclAllGather",
             comm_of(state));
}

void all_reduce_sum_nccl(void* state, float* data, std::size_t count, Stream* stream) {
  check_nccl(ncclAllReduce(data, data, count, ncclFloat32, ncclSum, comm_of(state), cuda(stream)), "ncclAllReduce",
             comm_of(state));
}

// While an exception unwinds, the peers may never arrive; ncclCommAbort does not wait for them.
void close_nccl(void* state) noexcept {
  const Operation operation(OperationKind::wait, "close communicator");
  if (std::uncaught_exceptions() > 0)
    (void)ncclCommAbort(comm_of(state));
  else
    (void)ncclCommDestroy(comm_of(state));
}

// Broadcasts the id from rank 0. If rank 0 could not make one, every rank throws.
ncclUniqueId broadcast_id(const ControlComm::Impl& group) {
  struct Message {
    ncclUniqueId id;
    int code;
  } message{};
  if (group.rank == 0) message.code = ncclGetUniqueId(&message.id);
  check_mpi(MPI_Bcast(&message, sizeof message, MPI_BYTE, 0, group.comm), "MPI_Bcast");
  check_nccl(static_cast<ncclResult_t>(message.code), "ncclGetUniqueId");
  return message.id;
}

}  // namespace

void* open_nccl(const ControlComm::Impl& group, CollectiveOps& ops) {
  // NVLink multicast needs a fabric manager, which some hosts lack, and its failure leaves their GPUs unusable. The
  // messages of a decode step are too small to gain from it. A value that the user has set is kept.
  setenv("NCCL_NVLS_ENABLE", "0", 0);
  const ncclUniqueId id = broadcast_id(group);
  ncclComm_t comm = nullptr;
  check_nccl(ncclCommInitRank(&comm, group.size, id, group.rank), "ncclCommInitRank");
  ops = {all_gather_nccl, all_reduce_sum_nccl, close_nccl, "NCCL"};
  return comm;
}

std::string nccl_version() {
  int version = 0;
  check_nccl(ncclGetVersion(&version), "ncclGetVersion");
  return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
         std::to_string(version % 100);
}

}  // namespace nsa
