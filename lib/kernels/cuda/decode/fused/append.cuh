#pragma once
// The rows that a fused decode step appends to the caches before it attends them.

#include "kernels/cuda/decode/fused/tile_pipeline.cuh"

namespace nsa::gpu {

/// Every CTA of a work item writes the same bytes, so that no CTA waits for another before it reads them.
template <class WarpTile, int W, class Params>
struct FusedAppend {
  using T = typename WarpTile::Type;
  static constexpr int threads = 32 * W, rows = 2 * branches, rows_a_warp = (rows + W - 1) / W;
  const Params& p;
  const typename Params::Coord& at;
  uint4 vectors[rows_a_warp] = {};  // a warp has a row, or two; a lane has a vector of it

  __device__ __forceinline__ bool has_vector(int row) const {
    return row < rows && static_cast<int>(threadIdx.x % 32) * 16 < p.appended.rows[row].bytes;
  }
  /// Loads the new rows, which do not depend on the position.
  __device__ __forceinline__ void load() {
#pragma unroll
    for (int i = 0; i < rows_a_warp; ++i) {
      const int row = at.warp + i * W;
      if (!has_vector(row)) continue;
      const AppendedRows::Row& r = p.appended.rows[row];
      vectors[i] = reinterpret_cast<const uint4*>(r.from + std::int64_t{at.work_item} * r.bytes)[threadIdx.x % 32];
    }
  }
  /// Row of the cache of branch b that holds position t.
  __device__ __forceinline__ int slot_of(int b, int t) const {
    const int ring = p.appended.ring[b];
    return ring == 0 ? t : t - p.appended.by_ring[b](t) * ring;
  }
  /// The same from where the plane begins, in the page of the position where there are pages.
  __device__ __forceinline__ int row_of_position(int b) const {
    const int slot = slot_of(b, at.t);
    return b == sel && p.pages.table[1] ? p.pages.row(1, at.row, p.pages.by_blocks(p.block(at.t)), slot) : slot;
  }
  /// Where the plane begins, or its rows in the first page.
  __device__ __forceinline__ char* plane_of(int row) const {
    const AppendedRows::Row& r = p.appended.rows[row];
    return r.to + (row / 2 == sel && p.pages.table[1] ? at.group : at.work_item) * r.plane_bytes;
  }
  /// Writes the rows and the compressed token. All threads; the caches may be read afterwards.
  __device__ __forceinline__ void store() const {
#pragma unroll
    for (int i = 0; i < rows_a_warp; ++i) {
      const int row = at.warp + i * W;
      if (!has_vector(row)) continue;
      char* to = plane_of(row) + std::int64_t{row_of_position(row / 2)} * p.appended.rows[row].bytes;
      reinterpret_cast<uint4*>(to)[threadIdx.x % 32] = vectors[i];
    }
    __syncthreads();
    if (!completes_token()) return;
    compress();
    __syncthreads();
  }
  /// Whether a compressed token completes at this position whose tile is one of this CTA.
  __device__ __forceinline__ bool completes_token() const {
    const BlockRules& r = p.shape.rules;
    if (at.n == 0 || at.t + 1 - r.l != (at.n - 1) * r.d) return false;
    const int segment = p.segment(at.n - 1),
              tile = segment * tiles_per_span(cmp, p.shape) +
                     (at.n - 1 - segment * static_cast<int>(p.shape.lse.segment)) / tile_rows;
    return tile - p.by_tile_ctas(tile) * p.tile_ctas == at.tile_cta;
  }
  /// The mean of K and V of the token that completes: mean_of() of layer/append_compress.cuh, in the same order.
  __device__ __forceinline__ void compress() const {
    const int l = p.shape.rules.l, ring = p.appended.ring[cmp], first = slot_of(cmp, at.t + 1 - l), d_k = p.shape.d_k;
    const std::int64_t plane = std::int64_t{p.tile.batch_begin} * p.shape.groups + at.work_item;
    const std::int64_t to_row = p.pages.table[0] ? p.pages.row(0, at.row, p.segment(at.n - 1), at.n - 1) : at.n - 1;
#pragma unroll 1
    for (int item = threadIdx.x; item < d_k + p.shape.d_v; item += threads) {
      const bool is_v = item >= d_k;
      const KvView& cache = is_v ? p.v[cmp] : p.k[cmp];
      const int e = is_v ? item - d_k : item, width = cache.width;
      const T* raw = reinterpret_cast<const T*>(plane_of(is_v)) + e;
      float sum = 0.0f;
#pragma unroll 8
      for (int m = 0; m < l; ++m) {
        const int slot = first + m;
        sum += to_float(raw[(ring > 0 && slot >= ring ? slot - ring : slot) * std::int64_t{width}]);
      }
      const std::int64_t begin = p.pages.table[0] ? std::int64_t{at.group} * p.pages.rows[0] * width  // of the plane
                                                  : plane * cache.plane_stride;
      T* to = static_cast<T*>(cache.data) + begin + to_row * width + e;
      nsa::gpu::store(to, sum / l);
    }
  }
};

}  // namespace nsa::gpu
