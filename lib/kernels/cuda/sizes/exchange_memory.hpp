#pragma once
// Layout of the memory through which the ranks of a host exchange.

#include <cstddef>
#include <cstdint>

namespace nsa::gpu {

constexpr std::size_t exchange_threads = 256, thread_bytes = 16;  ///< threads of a CTA; bytes that a thread carries
constexpr std::size_t cta_bytes = exchange_threads * thread_bytes;

/// Largest message, of all ranks together. NCCL is slower up to this size and beyond (docs/kernels/README.md), but it
/// holds its memory anyway, and the gain shrinks as messages grow.
constexpr std::size_t max_total_bytes = std::size_t{4} << 20;

/// Layout of the memory that peers write to: [2][ranks] slots of 2 * max_exchange_bytes, then the epochs, uint32
/// [ranks][CTAs]. Initially zero.
constexpr std::size_t epochs_offset = 4 * max_total_bytes;
/// Then what kernels exchange that do so between their own phases (decode/sharded/exchange.cuh).
constexpr std::size_t step_exchange_offset = epochs_offset + max_total_bytes / cta_bytes * sizeof(std::uint32_t);
constexpr std::size_t step_exchange_bytes = std::size_t{40} << 20;
constexpr std::size_t peer_memory_bytes = step_exchange_offset + step_exchange_bytes;

}  // namespace nsa::gpu
