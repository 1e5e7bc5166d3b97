#pragma once
// Tensor maps and tensor copies (TMA, capability 9.0): boxes of rows of a K, V or Q buffer go to shared memory under
// the 128-byte swizzle that wgmma and ldmatrix read without bank conflicts.
//
// A box is 64 columns (128 bytes) by some rows; rows past the buffer's end come as zeros.

#include <cuda.h>

#include <cstdint>

#include "kernels/cuda/primitives/mbarrier.cuh"

namespace nsa::gpu {

constexpr int box_columns = 64;

/// Of K or V [ranks][planes][rows][width]: boxes of every `row_stride`-th of `box_rows` rows, at (column, row, plane,
/// rank). Columns count from `first_column`, a multiple of 8.
CUtensorMap kv_tensor_map(const KvView& view, DType type, std::int64_t planes, int box_rows, int row_stride = 1,
                          int first_column = 0);

/// Of q [rows][heads][d_k]: boxes of `box_heads` heads by `box_queries` rows, at (column, head, row). Heads count from
/// `first_head`.
CUtensorMap query_tensor_map(const void* q, DType type, std::int64_t rows, int heads, int d_k, int box_heads,
                             int box_queries, int first_head = 0);

/// Whether one tensor map describes the buffer: whole sequences, or gathered chunks that are contiguous.
inline bool tma_accepts(const RowMap& m) {
  return m.ring == 0 && (m.chunk == INT64_MAX ? m.halo == 0 : m.rank == all_ranks && m.kv > 1);
}

/// Row i of such a buffer as tensor map coordinates. Positions are below 2^31, so one thread that issues many copies
/// divides in 32 bits.
struct RowCoordinate {
  int row, rank;
};
__device__ __forceinline__ RowCoordinate row_coordinate(const RowMap& m, int i) {
  if (m.chunk == INT64_MAX) return {i, 0};
  const int c = static_cast<int>(static_cast<unsigned>(i) / static_cast<unsigned>(m.chunk));
  const int round = static_cast<int>(static_cast<unsigned>(c) / static_cast<unsigned>(m.kv));
  return {round * static_cast<int>(m.stride) + m.halo + i - c * static_cast<int>(m.chunk), c - round * m.kv};
}

/// Rows of the largest box that divides both `tile` rows and the map's chunks.
inline int max_box_rows(const RowMap& m, int tile) {
  int rows = tile;
  if (m.chunk != INT64_MAX)
    while (m.chunk % rows != 0) rows /= 2;
  return rows;
}

/// One thread: copies a box of a kv_tensor_map() to shared memory at `to`; its bytes count at `full`.
__device__ __forceinline__ void tma_load(unsigned to, const CUtensorMap* map, unsigned full, int column, int row,
                                         int plane, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(plane), "r"(rank), "r"(full)
      : "memory");
#endif
}
/// The same for a query_tensor_map().
__device__ __forceinline__ void tma_load(unsigned to, const CUtensorMap* map, unsigned full, int column, int head,
                                         int row) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(to),
      "l"(map), "r"(column), "r"(head), "r"(row), "r"(full)
      : "memory");
#endif
}

}  // namespace nsa::gpu
