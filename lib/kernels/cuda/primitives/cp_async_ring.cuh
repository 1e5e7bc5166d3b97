#pragma once
// Copies into a warp's own ring of shared-memory slots, each 32 rows of K or V: asynchronous 16-byte copies (cp.async,
// capability 8.0). Warps need no barrier between them, as many bytes are in flight as the ring holds, and rows past the
// end are zero.
//
// A row is a sequence of 16-byte vectors. Of every 8 vectors (128 bytes) vector c of row r is stored at c ^ (r / 4), so
// that one column's vectors of eight rows that are multiples of 4 apart are in different banks: those are read together
// (decode/split_kv/warp_tile_mma.cuh).

#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu {

constexpr int slot_rows = 32;

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
  // Rows of 128 bytes: four neighbours at a time. Longer rows: four that are 8 apart, which is faster on long contexts.
  constexpr int apart = RowBytes > 128 ? 8 : 1, step = RowBytes > 128 ? 1 : 4;
  const int lane = threadIdx.x % 32, row0 = lane / 8 * apart, vector = lane % 8;
  const char* source = from + row0 * RowBytes + vector * 16;
  asm("" : "+l"(source));  // one address and offsets from it, not an address a row
  const unsigned first = slot + row0 * RowBytes + ((vector ^ row0 / 4) << 4);
#pragma unroll
  for (int i = 0; i < slot_rows / 4; ++i) {
    const int row = i * step, bytes = row0 + row < rows ? 16 : 0;  // 0: nothing is read, 16 zeros are written
    const unsigned to = (first ^ row / 4 << 4) + row * RowBytes;
#pragma unroll
    for (int c = 0; c < RowBytes / 128; ++c) copy(to + c * 128, source + row * RowBytes + c * 128, bytes);
  }
}

/// Issues the copies of 32 rows, of which `rows` exist.
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
/// Issues the copy of a panel of columns of 32 rows, of which `rows` exist: `vectors` 16-byte vectors a row, rows
/// `row_bytes` apart in memory (a multiple of 32) and PitchBytes in the slot. A row's last 128 bytes of them are filled
/// up with zeros.
template <int PitchBytes>
__device__ __forceinline__ void cp_async_panel(unsigned slot, const char* from, int row_bytes, int vectors, int rows,
                                               std::uint64_t policy) {
  static_assert(PitchBytes % 128 == 0);
  const int lane = threadIdx.x % 32, row0 = lane / 8 * 8, vector = lane % 8;
  const char* source = from + row0 * row_bytes + vector * 16;
  const unsigned first = slot + row0 * PitchBytes + ((vector ^ row0 / 4) << 4);
#pragma unroll
  for (int row = 0; row < slot_rows / 4; ++row) {
    const int existing = row0 + row < rows ? vectors : 0;
    const unsigned to = (first ^ row / 4 << 4) + row * PitchBytes;
#pragma unroll
    for (int c = 0; c < PitchBytes / 128; ++c)
      if (c * 8 < vectors)
        asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(to + c * 128),
                     "l"(source + c * 128), "r"(c * 8 + vector < existing ? 16 : 0), "l"(policy)  // 0: 16 zeros
                     : "memory");
    source += row_bytes;
  }
}

/// Issues the copy of one row of at most 512 bytes, without the swizzle.
__device__ __forceinline__ void cp_async_row(unsigned to, const char* from, int row_bytes) {
  const int lane = threadIdx.x % 32;
  if (lane < row_bytes / 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + lane * 16), "l"(from + lane * 16) : "memory");
}

/// Prefetches `bytes`, a multiple of 16, into the L2 (capability 9.0). A later read sees later writes, so this may come
/// before griddep_wait().
__device__ __forceinline__ void prefetch_l2(const void* from, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

/// Issues the copy of 4 bytes, or of 4 bytes of zero.
__device__ __forceinline__ void cp_async_word(unsigned to, const void* from, bool exists) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(exists ? 4 : 0) : "memory");
}

/// Issues the copy of 16 bytes, or of 16 bytes of zero.
__device__ __forceinline__ void cp_async_vector(unsigned to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(exists ? 16 : 0) : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Arrives at an mbarrier once all copies that this thread has issued so far are complete (capability 9.0).
__device__ __forceinline__ void cp_async_arrive(unsigned barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
#endif
}

/// Until at most `Pending` of this thread's latest groups are in flight, for all lanes of the warp.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
  __syncwarp();
}

}  // namespace nsa::gpu
