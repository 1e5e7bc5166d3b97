#pragma once
// Collectives through the memory of the GPUs of one host (exchange/peer_exchange.cu), declared for host code.

#include <array>
#include <cstddef>
#include <cstdint>

#include "kernels/cuda/sizes/exchange_memory.hpp"
#include "kernels/interface/backend.hpp"

namespace nsa::gpu {

constexpr int max_peers = 16;  ///< ranks of a group

/// Largest message of one of `ranks` ranks: a multiple of cta_bytes.
constexpr std::size_t max_exchange_bytes(int ranks) { return max_total_bytes / ranks / cta_bytes * cta_bytes; }

struct PeerGroup {
  int rank = 0, size = 1;
  std::byte* memory[max_peers] = {};  ///< by rank, in the address space of this process
  const int* abort_flag = nullptr;    ///< host memory; not 0: kernels stop waiting, and their results are undefined
};

/// recv [size][bytes] on every rank; send [bytes], may be recv + rank * bytes. bytes <= max_exchange_bytes(size), equal
/// on all ranks.
void peer_all_gather(const PeerGroup& group, const void* send, void* recv, std::size_t bytes, Stream* stream);
/// data [count] = sum over ranks, by rising rank, in place. 4 * count <= max_exchange_bytes(size), equal on all ranks.
/// All ranks queue both collectives in the same order, on one stream or on streams ordered by events.
void peer_all_reduce_sum(const PeerGroup& group, float* data, std::size_t count, Stream* stream);

/// An IPC handle: another process of the host can map the memory with it.
using IpcHandle = std::array<char, 64>;
bool export_memory(void* memory, IpcHandle& handle) noexcept;  ///< returns false if the driver refuses a handle
std::byte* import_memory(const IpcHandle& handle) noexcept;    ///< null if this GPU cannot access the memory
void close_imported_memory(std::byte* memory) noexcept;        ///< after synchronising the device

/// A flag in host memory, 0 at first, that kernels read while the host writes it. Null on failure.
int* allocate_host_flag() noexcept;
void free_host_flag(int* flag) noexcept;

}  // namespace nsa::gpu
