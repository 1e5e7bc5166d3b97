#pragma once
// A warp's own ring of shared-memory slots, each 32 rows of K or V, filled by asynchronous 16-byte copies (cp.async,
// capability 8.0): no barrier between warps, as many bytes under way as the ring holds, and rows past the end are zero.
//
// A row is cut into 16-byte pieces; of every 8 pieces (128 bytes) piece c of row r lies at c ^ (r % 8), so that eight
// rows' pieces of one column fall into different banks.

#include "kernels/cuda/common.cuh"

namespace nsa::gpu {

constexpr int slot_rows = 32;

__device__ __forceinline__ unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

/// Queues 32 rows of RowBytes (a multiple of 128), of which `rows` exist. All lanes.
template <int RowBytes>
__device__ __forceinline__ void copy_slot(unsigned slot, const char* from, int rows) {
  const int lane = threadIdx.x % 32, row0 = lane / 8, piece = lane % 8;
  const char* source = from + row0 * RowBytes + piece * 16;
  const unsigned even = slot + row0 * RowBytes + ((piece ^ row0) << 4), odd = even ^ 64;
#pragma unroll
  for (int i = 0; i < slot_rows / 4; ++i) {
    const int bytes = row0 + 4 * i < rows ? 16 : 0;  // 0: nothing is read, 16 zeros are written
    const unsigned to = (i & 1 ? odd : even) + i * 4 * RowBytes;
#pragma unroll
    for (int c = 0; c < RowBytes / 128; ++c)
      asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to + c * 128),
                   "l"(source + i * 4 * RowBytes + c * 128), "r"(bytes)
                   : "memory");
  }
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Until at most `Pending` of this thread's latest groups are under way; then for the whole warp.
template <int Pending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
  __syncwarp();
}

}  // namespace nsa::gpu
