#pragma once
// A warp's own ring of shared-memory slots, each 32 rows of K or V, filled by asynchronous 16-byte copies (cp.async,
// capability 8.0): no barrier between warps, as many bytes under way as the ring holds, and rows past the end are zero.
//
// A row is cut into 16-byte pieces; of every 8 pieces (128 bytes) piece c of row r lies at c ^ (r / 4), so that the
// same column's pieces of eight rows that are multiples of 4 apart fall into different banks: those are read together
// (decode/split_kv/warp_tile_mma.cuh).

#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu {

constexpr int slot_rows = 32;

__device__ __forceinline__ unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

/// Order in which the L2 evicts lines: normal, first (read once) or last (read again soon).
enum class CacheHint { evict_normal, evict_first, evict_last };
__device__ __forceinline__ std::uint64_t cache_policy(CacheHint hint) {
  std::uint64_t policy;
  if (hint == CacheHint::evict_first)
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  else if (hint == CacheHint::evict_last)
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  else
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

/// Calls copy(slot address, source address, bytes that exist of 16) for 32 rows of RowBytes (a multiple of 128), of
/// which `rows` exist. All lanes.
template <int RowBytes, class Copy>
__device__ __forceinline__ void for_each_vector(unsigned slot, const char* from, int rows, Copy copy) {
  // Rows of 128 bytes: four side by side at once. Longer ones: four that are 8 apart, which long lists stream faster.
  constexpr int apart = RowBytes > 128 ? 8 : 1, step = RowBytes > 128 ? 1 : 4;
  const int lane = threadIdx.x % 32, row0 = lane / 8 * apart, piece = lane % 8;
  const char* source = from + row0 * RowBytes + piece * 16;
  asm("" : "+l"(source));  // one address and offsets from it, not an address a row
  const unsigned first = slot + row0 * RowBytes + ((piece ^ row0 / 4) << 4);
#pragma unroll
  for (int i = 0; i < slot_rows / 4; ++i) {
    const int row = i * step, bytes = row0 + row < rows ? 16 : 0;  // 0: nothing is read, 16 zeros are written
    const unsigned to = (first ^ row / 4 << 4) + row * RowBytes;
#pragma unroll
    for (int c = 0; c < RowBytes / 128; ++c) copy(to + c * 128, source + row * RowBytes + c * 128, bytes);
  }
}

/// Queues 32 rows, of which `rows` exist.
template <int RowBytes>
__device__ __forceinline__ void cp_async_tile(unsigned slot, const char* from, int rows) {
  for_each_vector<RowBytes>(slot, from, rows, [](unsigned to, const char* source, int bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(source), "r"(bytes)
                 : "memory");
  });
}
/// The same under a cache policy.
template <int RowBytes>
__device__ __forceinline__ void cp_async_tile(unsigned slot, const char* from, int rows, std::uint64_t policy) {
  for_each_vector<RowBytes>(slot, from, rows, [&](unsigned to, const char* source, int bytes) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(source),
                 "r"(bytes), "l"(policy)
                 : "memory");
  });
}
/// Queues one row, as it lies.
template <int RowBytes>
__device__ __forceinline__ void cp_async_row(unsigned to, const char* from) {
  static_assert(RowBytes <= 32 * 16);
  const int lane = threadIdx.x % 32;
  if (lane < RowBytes / 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + lane * 16), "l"(from + lane * 16) : "memory");
}

/// Asks for `bytes`, a multiple of 16, to be brought into the L2 (capability 9.0). Whoever reads them there sees what
/// was written since, so this may come before griddep_wait().
__device__ __forceinline__ void prefetch_l2(const void* from, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

/// Queues 4 bytes, or 4 bytes of zero.
__device__ __forceinline__ void cp_async_word(unsigned to, const void* from, bool exists) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(exists ? 4 : 0) : "memory");
}

/// Queues 16 bytes, or 16 bytes of zero.
__device__ __forceinline__ void cp_async_vector(unsigned to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(exists ? 16 : 0) : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Until at most `Pending` of this thread's latest groups are under way; then for the whole warp.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
  __syncwarp();
}

}  // namespace nsa::gpu
