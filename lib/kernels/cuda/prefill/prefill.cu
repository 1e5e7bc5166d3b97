// Parameters of the tiled prefill kernels.

#include <cmath>

#include "kernels/cuda/prefill/prefill.cuh"
#include "kernels/cuda/prefill/stages.cuh"

namespace nsa::gpu {

float softmax_scale(const LayerShape& s) { return log2_e / std::sqrt(static_cast<float>(s.d_k)); }

DenseWork dense_work(const LayerShape& s, const PrefillPart& part, const QueryTile& tile, const void* q,
                     int item_rows) {
  const int item_queries = item_rows / part.query_rows;
  DenseWork w{};
  w.q = query_tensor_map(q, s.dtype, tile.rows(), s.heads(), s.d_k, part.query_rows, warpgroup_rows / part.query_rows,
                         part.first_head);
  w.shape = s;
  w.scale = softmax_scale(s);
  w.tile = tile;
  w.item_queries = item_queries;
  w.query_tiles = (tile.tokens + item_queries - 1) / item_queries;
  w.items = tile.batches * s.groups * w.query_tiles;
  return w;
}

KvTensorMaps kv_tensor_maps(const LayerShape& s, const QueryTile& tile, const KvView& k, const KvView* v,
                            std::int64_t rows, int first_column, int tile_tokens) {
  KvTensorMaps kv{};
  const std::int64_t planes = std::int64_t{tile.batch_begin + tile.batches} * s.groups;
  kv.map = k.map;
  kv.box_rows = max_box_rows(k.map, tile_tokens);
  kv.k = kv_tensor_map(k, s.dtype, planes, kv.box_rows);
  if (v) kv.v = kv_tensor_map(*v, s.dtype, planes, kv.box_rows, 1, first_column);
  if (v && k.map.chunk == INT64_MAX) {
    kv.narrow_k = kv_tensor_map(k, s.dtype, planes, narrow_tile_tokens);
    kv.narrow_v = kv_tensor_map(*v, s.dtype, planes, narrow_tile_tokens, 1, first_column);
  }
  kv.rows = rows;
  return kv;
}

}  // namespace nsa::gpu
