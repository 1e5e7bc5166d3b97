// Which shapes the tiled prefill kernels take, and their parameters.

#include "kernels/cuda/prefill/prefill.cuh"
#include "kernels/cuda/prefill/stages.cuh"

namespace nsa::gpu {

bool tiles_shape(const LayerShape& s) {
#ifdef NSA_HAS_SM90A
  const BlockRules& r = s.rules;
  const int ratio = r.l_sel / r.d;
  return limits().capability == 90 && s.dtype != DType::f32 && s.d_k == s.d_v && (s.d_k == 64 || s.d_k == 128) &&
         s.heads_per_group <= heads_per_tile && dense_tokens % ratio == 0 && (r.l - 1) / r.d <= most_lead &&
         s.lse.segment % 8 == 0 && r.n_sel <= 32;
#else
  (void)s;
  return false;
#endif
}

DenseParams dense_params(const LayerShape& s, const QueryTile& tile, const void* q, int queries) {
  DenseParams p{};
  p.q = query_map(q, s.dtype, tile.rows(), s.heads(), s.d_k, heads_per_tile, group_queries);
  p.shape = s;
  p.tile = tile;
  p.queries = queries;
  p.query_tiles = (tile.tokens + queries - 1) / queries;
  p.items = tile.batches * s.groups * p.query_tiles;
  return p;
}

DenseSource dense_source(const LayerShape& s, const QueryTile& tile, const KvView& k, const KvView* v,
                         std::int64_t rows) {
  DenseSource from{};
  const std::int64_t planes = std::int64_t{tile.batch_begin + tile.batches} * s.groups;
  from.map = k.map;
  from.box_rows = box_rows_of(k.map, dense_tokens);
  from.k = rows_map(k, s.dtype, planes, from.box_rows);
  if (v) from.v = rows_map(*v, s.dtype, planes, from.box_rows);
  if (v && k.map.chunk == INT64_MAX) {
    from.narrow_k = rows_map(k, s.dtype, planes, narrow_tokens);
    from.narrow_v = rows_map(*v, s.dtype, planes, narrow_tokens);
  }
  from.rows = rows;
  return from;
}

}  // namespace nsa::gpu
