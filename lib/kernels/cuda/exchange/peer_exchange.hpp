#pragma once
// Small exchanges through the memory of the GPUs of one host (exchange/peer_exchange.cu), seen from host code.

#include <array>
#include <cstddef>
#include <cstdint>

#include "kernels/interface/backend.hpp"

namespace nsa::gpu {

constexpr int most_peers = 16;                                 ///< ranks of a group
constexpr std::size_t exchange_threads = 256, line_data = 16;  ///< of a CTA; bytes that a thread carries
constexpr std::size_t cta_data = exchange_threads * line_data;

/// Bytes that are exchanged at most, of all ranks together. NCCL is slower up to there and beyond (docs/kernels.md),
/// but it has its memory anyway, and the longer a message is the less there is to gain.
constexpr std::size_t most_in_all = std::size_t{4} << 20;
/// From each of so many ranks: whole CTAs.
constexpr std::size_t most_exchanged(int ranks) { return most_in_all / ranks / cta_data * cta_data; }

/// What a rank has for its peers to write to, [2][ranks] slots of 2 * most_exchanged bytes, and behind it its counts,
/// uint32 [ranks][CTAs]. All zero at first.
constexpr std::size_t counts_at = 4 * most_in_all;
constexpr std::size_t peer_memory_bytes = counts_at + most_in_all / cta_data * sizeof(std::uint32_t);

struct PeerGroup {
  int rank = 0, size = 1;
  std::byte* memory[most_peers] = {};  ///< by rank, in this process's addresses
  const int* given_up = nullptr;       ///< on the host: not 0 when nobody wants the data any more
};

/// recv [size][bytes] on every rank, send may be recv + rank * bytes; bytes <= most_exchanged(size), alike on all
/// ranks.
void peer_gather(const PeerGroup& group, const void* send, void* recv, std::size_t bytes, Stream* stream);
/// data [count] = sum over ranks, by rising rank, in place; 4 * count <= most_exchanged(size), alike on all ranks.
/// Between the same ranks both are queued in the same order, on one stream or ordered by events.
void peer_sum(const PeerGroup& group, float* data, std::size_t count, Stream* stream);

/// A GPU's memory as another process of the host may open it.
using MemoryHandle = std::array<char, 64>;
bool name_memory(void* memory, MemoryHandle& handle) noexcept;  ///< whether the driver gives it a name
std::byte* open_memory(const MemoryHandle& handle) noexcept;    ///< null where this GPU does not reach it
void close_memory(std::byte* memory) noexcept;                  ///< once the device has done what was queued

/// Zero, readable by kernels while the host writes it. Null where there is none to have.
int* make_host_flag() noexcept;
void free_host_flag(int* flag) noexcept;

}  // namespace nsa::gpu
