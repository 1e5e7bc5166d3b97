#pragma once
// Appending rows and completing compressed tokens, element by element: for the stages and for the fused decode
// prologue.

#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu {

// Whether row j of the tile at position t is stored. A ring keeps the last rows only: no slot is written twice.
__device__ __forceinline__ bool is_kept(const RowMap& map, const QueryTile& tile, std::int64_t j, std::int64_t t) {
  return map.ring > 0 ? j + map.ring >= tile.tokens : has_chunk(map, chunk_of(map, t));
}

template <class T>
__device__ void append_element(const QueryTile& tile, int groups, const T* from, const KvView& cache,
                               std::int64_t item) {
  const std::int64_t e = item % cache.width, rest = item / cache.width;
  const std::int64_t g = rest % groups, r = rest / groups;
  const TileRow row = tile_row(tile, r);
  if (!is_kept(cache.map, tile, r % tile.tokens, row.t)) return;
  const std::int64_t plane = (tile.batch_begin + row.sequence) * groups + g;
  if (writes_row(cache, plane, chunk_of(cache.map, row.t), row.t))
    static_cast<T*>(cache.data)[offset_of(cache, plane, row.t) + e] = from[item];
}

struct TokenRange {
  std::int64_t begin, end;
};
/// The compressed tokens that the tile's i-th sequence completes.
__device__ __forceinline__ TokenRange completed(const LayerShape& s, const QueryTile& tile, std::int64_t i) {
  const std::int64_t first = first_position(tile, i);
  return {compressed_tokens(s.rules, first - 1), compressed_tokens(s.rules, first + tile.tokens - 1)};
}
/// Whether the buffer `cmp` holds token i, as a row of a chunk or of a halo.
__device__ __forceinline__ bool is_wanted(const KvView& cmp, bool fill_halo, std::int64_t i) {
  const RowMap& m = cmp.map;
  const std::int64_t c = chunk_of(m, i);
  return has_chunk(m, c) || (fill_halo && m.halo > 0 && i >= (c + 1) * m.chunk - m.halo && has_chunk(m, c + 1));
}

template <class T>
__device__ void write_token(const KvView& cmp, bool fill_halo, std::int64_t plane, std::int64_t i, int e, float value) {
  const RowMap& m = cmp.map;
  T* data = static_cast<T*>(cmp.data);
  const std::int64_t c = chunk_of(m, i);
  if (has_chunk(m, c) && writes_row(cmp, plane, c, i)) store(&data[offset_in_chunk(cmp, plane, c, i) + e], value);
  if (fill_halo && m.halo > 0 && m.rank != all_ranks && i >= (c + 1) * m.chunk - m.halo && has_chunk(m, c + 1) &&
      writes_row(cmp, plane, c + 1, i))
    store(&data[offset_in_chunk(cmp, plane, c + 1, i) + e], value);
}

template <class T>
__device__ void mean_of(const LayerShape& s, const KvView& raw, const KvView& cmp, bool fill_halo, std::int64_t plane,
                        std::int64_t i) {
  const std::int64_t first = i * s.rules.d, c = chunk_of(raw.map, first);
  for (int e = threadIdx.x; e < cmp.width; e += blockDim.x) {
    float sum = 0.0f;
#pragma unroll 16
    for (int m = 0; m < s.rules.l; ++m)
      sum += to_float(static_cast<const T*>(raw.data)[offset_in_chunk(raw, plane, c, first + m) + e]);
    write_token<T>(cmp, fill_halo, plane, i, e, sum / s.rules.l);
  }
}

}  // namespace nsa::gpu
