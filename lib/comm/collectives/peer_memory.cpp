// Small exchanges through the memory of the GPUs of one host, where every rank reaches every other's and NCCL is not
// told to leave it alone; what is long stays NCCL's.

#include <mpi.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <memory>
#include <string_view>
#include <vector>

#include "comm/collectives/communicator_impl.hpp"
#include "kernels/cuda/exchange/peer_exchange.hpp"
#include "kernels/diagnostics/operation_log.hpp"
#include "kernels/interface/buffer.hpp"

namespace nsa {

namespace {

// Closed by all ranks or by none: nobody frees what another still has open.
struct PeerState {
  const ControlComm::Impl control;  // of its own: the caller's may be gone before
  void* nccl = nullptr;
  CollectiveOps by_nccl{};
  MemoryAccount account;
  Buffer memory;
  int* given_up = gpu::make_host_flag();
  gpu::PeerGroup group;

  PeerState(MPI_Comm owned, const ControlComm::Impl& of) : control(owned, of.group) {
    group.rank = of.rank;
    group.size = of.size;
    group.given_up = given_up;
  }
  PeerState(const PeerState&) = delete;
  PeerState& operator=(const PeerState&) = delete;
  ~PeerState() {
    const Operation operation(OperationKind::wait, "close communicator");
    for (int rank = 0; rank < group.size; ++rank)
      if (rank != group.rank && group.memory[rank]) gpu::close_memory(group.memory[rank]);
    gpu::free_host_flag(given_up);
    if (std::uncaught_exceptions() == 0) (void)MPI_Barrier(control.comm);
  }
};

struct Offer {
  gpu::MemoryHandle handle{};
  bool stands = false;
};

bool refused() {
  const char *p2p = std::getenv("NCCL_P2P_DISABLE"), *exchange = std::getenv("NSA_EXCHANGE");
  return (p2p && std::atoi(p2p) != 0) || (exchange && std::string_view(exchange) == "nccl");
}

Offer offer(const DeviceOps& device, PeerState& peers) {
  Offer own;
  if (refused() || !peers.given_up) return own;
  try {
    peers.memory = Buffer(device, peers.account, MemoryKind::workspace, gpu::peer_memory_bytes);
  } catch (const UserError&) {
    return own;  // no room: NCCL may have what it needs
  }
  device.fill(peers.memory.data(), 0, gpu::peer_memory_bytes, nullptr);
  device.synchronize(nullptr);
  own.stands = gpu::name_memory(peers.memory.data(), own.handle);
  return own;
}

// Whether all ranks have opened all memory.
bool meet(PeerState& peers, const Offer& own) {
  const Operation operation(OperationKind::control, "meet peers", 0, peers.control.group);
  gpu::PeerGroup& group = peers.group;
  std::vector<Offer> all(static_cast<std::size_t>(group.size));
  check_mpi(MPI_Allgather(&own, sizeof own, MPI_BYTE, all.data(), sizeof own, MPI_BYTE, peers.control.comm),
            "MPI_Allgather");
  int reached = std::ranges::all_of(all, &Offer::stands);
  for (int rank = 0; reached && rank < group.size; ++rank) {
    group.memory[rank] = rank == group.rank ? peers.memory.as<std::byte>()
                                            : gpu::open_memory(all[static_cast<std::size_t>(rank)].handle);
    reached = group.memory[rank] != nullptr;
  }
  check_mpi(MPI_Allreduce(MPI_IN_PLACE, &reached, 1, MPI_INT, MPI_MIN, peers.control.comm), "MPI_Allreduce");
  return reached != 0;
}

void gather_over_peers(void* state, const void* send, void* recv, std::size_t bytes, Stream* stream) {
  const auto* peers = static_cast<const PeerState*>(state);
  if (bytes <= gpu::most_exchanged(peers->group.size))
    gpu::peer_gather(peers->group, send, recv, bytes, stream);
  else
    peers->by_nccl.all_gather(peers->nccl, send, recv, bytes, stream);
}

void sum_over_peers(void* state, float* data, std::size_t count, Stream* stream) {
  const auto* peers = static_cast<const PeerState*>(state);
  if (count * sizeof(float) <= gpu::most_exchanged(peers->group.size))
    gpu::peer_sum(peers->group, data, count, stream);
  else
    peers->by_nccl.all_reduce_sum(peers->nccl, data, count, stream);
}

// While an exception unwinds the peers may never arrive: a kernel that still waits for them is let go, and the memory
// stays until the process ends, for those that have not heard of it may still write there. (Where buffers are given
// back before this they wait for the device; then it is the watchdog that ends a rank whose peer is gone.)
void close_peers(void* state) noexcept {
  std::unique_ptr<PeerState> peers(static_cast<PeerState*>(state));
  const bool unwinding = std::uncaught_exceptions() > 0;
  if (unwinding) *static_cast<volatile int*>(peers->given_up) = 1;
  peers->by_nccl.close(peers->nccl);
  if (unwinding) (void)peers.release();
}

}  // namespace

void join_peers(const DeviceOps& device, const ControlComm::Impl& group, void*& state, CollectiveOps& ops) {
  if (group.local_size < group.size || group.size > gpu::most_peers) return;  // alike on all ranks
  std::unique_ptr<PeerState> peers;
  {
    const Operation operation(OperationKind::control, "find peers", 0, group.group);
    MPI_Comm comm = MPI_COMM_NULL;
    check_mpi(MPI_Comm_dup(group.comm, &comm), "MPI_Comm_dup");
    peers = std::make_unique<PeerState>(comm, group);
  }
  if (!meet(*peers, offer(device, *peers))) return;
  peers->nccl = state;
  peers->by_nccl = ops;
  ops = {gather_over_peers, sum_over_peers, close_peers, "peer memory", gpu::peer_memory_bytes};
  state = peers.release();
}

}  // namespace nsa
