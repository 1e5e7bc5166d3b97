#pragma once
// Tensor maps: how the copy engine of capability 9.0 finds boxes of rows in a K, V or Q buffer and lays them into
// shared memory under the 128-byte swizzle that wgmma and ldmatrix read without bank conflicts.
//
// A box is 64 columns (128 bytes) by some rows; rows past the buffer's end come as zeros.

#include <cuda.h>

#include <cstdint>

#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu {

constexpr int box_columns = 64;

/// Of [ranks][planes][rows][width]: boxes of every `step`-th of `box_rows` rows, found by (column, row, plane, rank).
CUtensorMap rows_map(const KvView& view, DType type, std::int64_t planes, int box_rows, int step = 1);

/// Of q [rows][heads][d_k]: boxes of `box_heads` heads by `box_queries` rows, found by (column, head, row).
CUtensorMap query_map(const void* q, DType type, std::int64_t rows, int heads, int d_k, int box_heads, int box_queries);

/// Whole sequences or gathered chunks whose boxes lie in one piece: what the tensor copies of prefill read.
inline bool map_is_whole(const RowMap& m) {
  return m.ring == 0 && (m.chunk == INT64_MAX ? m.halo == 0 : m.rank == all_ranks && m.kv > 1);
}

/// Where row i of such a map lies: its row in memory, and whose. One thread feeds many with it, so the divisions have
/// 32 bits; positions are below 2^31.
struct Place {
  int row, rank;
};
__device__ __forceinline__ Place place_of(const RowMap& m, int i) {
  if (m.chunk == INT64_MAX) return {i, 0};
  const int c = static_cast<int>(static_cast<unsigned>(i) / static_cast<unsigned>(m.chunk));
  const int turn = static_cast<int>(static_cast<unsigned>(c) / static_cast<unsigned>(m.kv));
  return {turn * static_cast<int>(m.stride) + m.halo + i - c * static_cast<int>(m.chunk), c - turn * m.kv};
}

/// Rows of the largest box that divides both `tile` rows and the map's chunks.
inline int box_rows_of(const RowMap& m, int tile) {
  int rows = tile;
  if (m.chunk != INT64_MAX)
    while (m.chunk % rows != 0) rows /= 2;
  return rows;
}

/// An mbarrier's phase with that parity is over.
__device__ __forceinline__ void wait_for(unsigned barrier, int parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra AGAIN;\n}" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
#endif
}
__device__ __forceinline__ void open_barrier(unsigned barrier, int arrivals) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
#endif
}
/// The barriers are there for the copy engine too; before the __syncthreads that shows them to everybody.
__device__ __forceinline__ void barriers_opened() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
#endif
}
__device__ __forceinline__ void arrive(unsigned barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}
/// So many arrivals.
__device__ __forceinline__ void arrive_for(unsigned barrier, int arrivals) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
#endif
}
/// Without a branch, where products are under way.
__device__ __forceinline__ void arrive_if(unsigned barrier, bool does) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %1, 0;\n@p mbarrier.arrive.shared.b64 _, [%0];\n}" ::"r"(barrier),
               "r"(static_cast<int>(does))
               : "memory");
#endif
}
/// One arrival, and so many bytes that copies will bring.
__device__ __forceinline__ void arrive_expecting(unsigned barrier, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#endif
}
__device__ __forceinline__ void copy_box(unsigned to, const CUtensorMap* map, unsigned barrier, int column, int row,
                                         int plane, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(plane), "r"(rank), "r"(barrier)
      : "memory");
#endif
}
__device__ __forceinline__ void copy_box(unsigned to, const CUtensorMap* map, unsigned barrier, int column, int head,
                                         int row) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(to),
      "l"(map), "r"(column), "r"(head), "r"(row), "r"(barrier)
      : "memory");
#endif
}

/// A place in a ring of slots and the parity of its round.
template <int Slots>
struct Turn {
  int slot = 0, phase = 0;
  __device__ __forceinline__ void next() {
    if (++slot == Slots) slot = 0, phase ^= 1;
  }
};

}  // namespace nsa::gpu
