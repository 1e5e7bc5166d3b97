#pragma once
// The rows that a fused decode step appends to the caches before it attends them. A rank that holds chunks appends
// those of its chunks, and of the rings.

#include "kernels/cuda/decode/fused/tile_pipeline.cuh"
#include "kernels/cuda/primitives/e4m3.cuh"

namespace nsa::gpu {

/// Every CTA of a work item writes the same bytes, so that no CTA waits for another before it reads them. Where caches
/// are quantised, rows come in storage type; those of cmp, the raw rows, stay so. Then a step may append nothing.
template <class WarpTile, int W, class Params>
struct FusedAppend {
  using T = typename WarpTile::Type;
  static constexpr int threads = 32 * W, rows = 2 * branches, rows_a_warp = (rows + W - 1) / W;
  const Params& p;
  const typename Params::Coord& at;
  uint4 vectors[rows_a_warp] = {};  // a warp has a row, or two; a lane has a vector of it

  /// Whether cmp (0) or sel (1) is in pages.
  __device__ __forceinline__ bool in_pages(int cache) const { return Params::has_pages && p.pages.table[cache]; }
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
  /// The same from where the plane begins, in the page of the position where there are pages; -1: another rank has it.
  __device__ __forceinline__ int row_of_position(int b) const {
    if constexpr (Params::is_shard)
      if (b == sel) {
        if (!at.holds_chunk(p.by_chunk_blocks(at.all_eligible - 1))) return -1;
        const int row = at.held_positions() - 1;
        return in_pages(1) ? p.pages.row(1, at.row, p.pages.by_blocks(at.eligible - 1), row) : row;
      }
    const int slot = slot_of(b, at.t);
    return b == sel && in_pages(1) ? p.pages.row(1, at.row, p.pages.by_blocks(p.block(at.t)), slot) : slot;
  }
  /// Where the plane begins, or its rows in the first page.
  __device__ __forceinline__ char* plane_of(int row) const {
    const AppendedRows::Row& r = p.appended.rows[row];
    return r.to + (row / 2 == sel && in_pages(1) ? at.group : at.work_item) * r.plane_bytes;
  }
  /// Writes the rows and the compressed token. All threads; the caches may be read afterwards.
  __device__ __forceinline__ void store() const {
    if constexpr (Params::is_shard)
      if (!p.appended.rows[0].from) return;
#pragma unroll
    for (int i = 0; i < rows_a_warp; ++i) {
      const int row = at.warp + i * W;
      if constexpr (is_quantised_tile<WarpTile>) {
        if (row < rows && row / 2 != cmp && p.appended.rows[row].bytes > 0) store_quantised(row, vectors[i]);
        if (row / 2 != cmp) continue;
      }
      if (!has_vector(row)) continue;
      const int position = row_of_position(row / 2);
      if (Params::is_shard && position < 0) continue;
      char* to = plane_of(row) + std::int64_t{position} * p.appended.rows[row].bytes;
      reinterpret_cast<uint4*>(to)[threadIdx.x % 32] = vectors[i];
    }
    __syncthreads();
    if ((is_quantised_tile<WarpTile> || Params::lends) && p.appended.rows[0].bytes == 0) return;
    const int tokens = all_tokens(), token = tokens - 1, l = p.shape.rules.l;
    if (tokens == 0 || at.t + 1 - l != token * p.shape.rules.d) return;
    int segment = p.segment(token), row = token - segment * static_cast<int>(p.shape.lse.segment);
    if constexpr (Params::is_shard)
      if (!find_held(segment, row)) return;
    const int tile = segment * tiles_per_span(cmp, p.shape) + max(row, 0) / tile_rows;
    if (tile - p.by_tile_ctas(tile) * p.tile_ctas != at.tile_cta) return;
    if constexpr (is_quantised_tile<WarpTile>)
      compress_quantised();
    else
      compress(segment, row);
    __syncthreads();
  }
  /// Compressed tokens at this position, of all ranks.
  __device__ __forceinline__ int all_tokens() const {
    if constexpr (Params::is_shard)
      return at.all_n;
    else
      return at.n;
  }
  /// From a segment of the sequence to that of this rank which holds its row, or has it as the halo row, -1.
  __device__ __forceinline__ bool find_held(int& segment, int& row) const {
    if (!at.holds_chunk(segment)) {
      if (row != p.shape.lse.segment - 1 || !at.holds_chunk(segment + 1)) return false;
      ++segment, row = -1;
    }
    segment = p.by_kv(segment);
    return true;
  }
  /// The mean of K and V of the token that completes, a row of a segment held here: mean_of() of
  /// layer/append_compress.cuh, in the same order.
  __device__ __forceinline__ void compress(int segment, int row) const {
    const int l = p.shape.rules.l, ring = p.appended.ring[cmp], first = slot_of(cmp, at.t + 1 - l), d_k = p.shape.d_k;
    int memory_row = segment * static_cast<int>(p.shape.lse.segment) + row;
    if constexpr (Params::is_shard) memory_row += (segment + 1) * p.k[cmp].map.halo;
    const std::int64_t to_row = in_pages(0) ? p.pages.row(0, at.row, segment, memory_row) : memory_row;
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
      const std::int64_t begin = in_pages(0) ? std::int64_t{at.group} * p.pages.rows[0] * width  // of the plane
                                             : plane() * cache.plane_stride;
      T* to = static_cast<T*>(cache.data) + begin + to_row * width + e;
      nsa::gpu::store(to, sum / l);
    }
  }
  /// Stores a row of sel or win, of which a lane has a vector of T.
  __device__ __forceinline__ void store_quantised(int row, uint4 vector) const {
    const T* values = reinterpret_cast<const T*>(&vector);
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = to_float(values[i]);
    const KvView& cache = row % 2 == 0 ? p.k[row / 2] : p.v[row / 2];
    const int to_row = row_of_position(row / 2);
    store_e4m3_row(x, plane_of(row) + std::int64_t{to_row} * WarpTile::k_bytes,
                   first_scale(cache, plane(), at.group) + to_row, has_vector(row));
  }
  /// compress(), by a warp of K and one of V.
  __device__ __forceinline__ void compress_quantised() const {
    if (at.warp > 1) return;
    const bool is_v = at.warp == 1;
    const KvView& cache = is_v ? p.v[cmp] : p.k[cmp];
    const int l = p.shape.rules.l, ring = p.appended.ring[cmp], first = slot_of(cmp, at.t + 1 - l);
    const uint2* raw = reinterpret_cast<const uint2*>(plane_of(is_v)) + threadIdx.x % 32;  // four columns
    float sum[4] = {};
#pragma unroll 8
    for (int m = 0; m < l; ++m) {
      const int slot = first + m;
      const uint2 four = raw[(ring > 0 && slot >= ring ? slot - ring : slot) * (WarpTile::k_bytes / 4)];
      const T* values = reinterpret_cast<const T*>(&four);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += to_float(values[i]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      T rounded;
      nsa::gpu::store(&rounded, sum[i] / l);
      sum[i] = to_float(rounded);
    }
    const std::int64_t to_row = in_pages(0) ? p.pages.row(0, at.row, p.segment(at.n - 1), at.n - 1) : at.n - 1;
    const std::int64_t begin =
        in_pages(0) ? std::int64_t{at.group} * p.pages.rows[0] * WarpTile::k_bytes : plane() * cache.plane_stride;
    store_e4m3_row(sum, static_cast<char*>(cache.data) + begin + to_row * WarpTile::k_bytes,
                   first_scale(cache, plane(), at.group) + to_row, true);
  }
  __device__ __forceinline__ std::int64_t plane() const {
    return std::int64_t{p.tile.batch_begin} * p.shape.groups + at.work_item;
  }
};

}  // namespace nsa::gpu
