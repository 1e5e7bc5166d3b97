// Collectives through peer memory for small messages within one host, if every rank can access the GPU memory of every
// other and the environment does not disable it. NCCL carries long messages.

#include <mpi.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <exception>
#include <memory>
#include <set>
#include <string_view>
#include <vector>

#include "comm/collectives/communicator_impl.hpp"
#include "kernels/cuda/exchange/peer_exchange.hpp"
#include "kernels/diagnostics/operation_log.hpp"
#include "kernels/interface/buffer.hpp"

namespace nsa {

namespace {

// Closed by all ranks or by none: a rank must not free memory that another rank has open.
struct PeerState {
  const ControlComm::Impl control;  // a duplicate: the caller's group may be closed earlier
  void* nccl = nullptr;
  CollectiveOps nccl_ops{};
  MemoryAccount account;
  Buffer memory;
  int* abort_flag = gpu::allocate_host_flag();
  gpu::PeerGroup group;
  bool has_own_gpus = false;  ///< every rank has a GPU of its own

  PeerState(MPI_Comm owned, const ControlComm::Impl& of) : control(owned, of.group_id) {
    group.rank = of.rank;
    group.size = of.size;
    group.abort_flag = abort_flag;
  }
  PeerState(const PeerState&) = delete;
  PeerState& operator=(const PeerState&) = delete;
  ~PeerState() {
    const Operation operation(OperationKind::wait, "close communicator");
    for (int rank = 0; rank < group.size; ++rank)
      if (rank != group.rank && group.memory[rank]) gpu::close_imported_memory(group.memory[rank]);
    gpu::free_host_flag(abort_flag);
    if (std::uncaught_exceptions() == 0) (void)MPI_Barrier(control.comm);
  }
};

struct MemoryOffer {
  gpu::IpcHandle handle{};
  std::array<char, 64> gpu{};  // its uuid
  bool available = false;
};

bool disabled_by_environment() {
  const char *p2p = std::getenv("NCCL_P2P_DISABLE"), *exchange = std::getenv("NSA_EXCHANGE");
  return (p2p && std::atoi(p2p) != 0) || (exchange && std::string_view(exchange) == "nccl");
}

MemoryOffer offer_memory(const DeviceOps& device, PeerState& peers) {
  MemoryOffer own;
  if (disabled_by_environment() || !peers.abort_flag) return own;
  try {
    peers.memory = Buffer(device, peers.account, MemoryKind::workspace, gpu::peer_memory_bytes);
  } catch (const UserError&) {
    return own;  // out of device memory: use NCCL, which may still fit
  }
  device.fill(peers.memory.data(), 0, gpu::peer_memory_bytes, nullptr);
  device.synchronize(nullptr);
  own.available = gpu::export_memory(peers.memory.data(), own.handle);
  device.info().uuid.copy(own.gpu.data(), own.gpu.size() - 1);
  return own;
}

// Rendezvous of all ranks. Returns whether every rank has opened the memory of all others.
bool exchange_handles(PeerState& peers, const MemoryOffer& own) {
  const Operation operation(OperationKind::control, "exchange handles", 0, peers.control.group_id);
  gpu::PeerGroup& group = peers.group;
  std::vector<MemoryOffer> all(static_cast<std::size_t>(group.size));
  check_mpi(MPI_Allgather(&own, sizeof own, MPI_BYTE, all.data(), sizeof own, MPI_BYTE, peers.control.comm),
            "MPI_Allgather");
  int opened = std::ranges::all_of(all, &MemoryOffer::available);
  std::set<std::array<char, 64>> gpus;
  for (const MemoryOffer& offer : all) gpus.insert(offer.gpu);
  peers.has_own_gpus = std::ssize(gpus) == group.size;
  for (int rank = 0; opened && rank < group.size; ++rank) {
    group.memory[rank] = rank == group.rank ? peers.memory.as<std::byte>()
                                            : gpu::import_memory(all[static_cast<std::size_t>(rank)].handle);
    opened = group.memory[rank] != nullptr;
  }
  check_mpi(MPI_Allreduce(MPI_IN_PLACE, &opened, 1, MPI_INT, MPI_MIN, peers.control.comm), "MPI_Allreduce");
  return opened != 0;
}

void all_gather_peer(void* state, const void* send, void* recv, std::size_t bytes, Stream* stream) {
  const auto* peers = static_cast<const PeerState*>(state);
  if (bytes <= gpu::max_exchange_bytes(peers->group.size))
    gpu::peer_all_gather(peers->group, send, recv, bytes, stream);
  else
    peers->nccl_ops.all_gather(peers->nccl, send, recv, bytes, stream);
}

void all_reduce_sum_peer(void* state, float* data, std::size_t count, Stream* stream) {
  const auto* peers = static_cast<const PeerState*>(state);
  if (count * sizeof(float) <= gpu::max_exchange_bytes(peers->group.size))
    gpu::peer_all_reduce_sum(peers->group, data, count, stream);
  else
    peers->nccl_ops.all_reduce_sum(peers->nccl, data, count, stream);
}

// While an exception unwinds, the peers may never arrive. The abort flag releases a kernel that waits for them, and the
// memory is kept until the process ends, because peers that do not know of the failure may still write to it. (Buffers
// released before this call wait for the device; then the watchdog ends a rank whose peer is gone.)
void close_peer_memory(void* state) noexcept {
  std::unique_ptr<PeerState> peers(static_cast<PeerState*>(state));
  const bool unwinding = std::uncaught_exceptions() > 0;
  if (unwinding) *static_cast<volatile int*>(peers->abort_flag) = 1;
  peers->nccl_ops.close(peers->nccl);
  if (unwinding) (void)peers.release();
}

}  // namespace

void open_peer_memory(const DeviceOps& device, const ControlComm::Impl& group, void*& state, CollectiveOps& ops) {
  if (group.local_size < group.size || group.size > gpu::max_peers) return;  // the same on all ranks
  std::unique_ptr<PeerState> peers;
  {
    const Operation operation(OperationKind::control, "open peer memory", 0, group.group_id);
    MPI_Comm comm = MPI_COMM_NULL;
    check_mpi(MPI_Comm_dup(group.comm, &comm), "MPI_Comm_dup");
    peers = std::make_unique<PeerState>(comm, group);
  }
  if (!exchange_handles(*peers, offer_memory(device, *peers))) return;
  peers->nccl = state;
  peers->nccl_ops = ops;
  ops = {all_gather_peer, all_reduce_sum_peer, close_peer_memory, "peer memory", gpu::peer_memory_bytes};
  // Kernels that wait for each other between their phases must run at the same time.
  if (peers->has_own_gpus) ops.peers = reinterpret_cast<const PeerMemory*>(&peers->group);
  state = peers.release();
}

}  // namespace nsa
