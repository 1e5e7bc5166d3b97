// A decode step's layer up to output: project's product, then one launch: the fused decode step with RoPE and gate
// (CTAs of 4 warps: after a launch of their own), what it appends and where it logs.

#include <algorithm>

#include "kernels/cuda/decode/loans/params.cuh"
#include "kernels/cuda/decode/stages.cuh"
#include "kernels/cuda/layer/stages.cuh"

namespace nsa::gpu {

namespace {

// Rows of a cache that holds every position, or the last ones. Those of storage type are stored as they are.
bool is_whole(const KvView& cache, std::int64_t row_bytes) {
  const RowMap& map = cache.map;
  return !cache.rounded && map.chunk == INT64_MAX && map.halo == 0 && row_bytes % 16 == 0 && row_bytes <= 512;
}

// Without the division of work.
FusedAppendParams inputs_of(const DecodeLayerArgs& a) {
  FusedAppendParams p;
  static_cast<FusedDecodeParams&>(p) = fused_decode_params(a.attention);
  p.appended = appended_rows(a);
  p.log = step_log(a, a.attention, p.reads);
  return p;
}
FusedAppendParams params_of(const DecodeLayerArgs& a) {
  FusedAppendParams p = inputs_of(a);
  divide_work(p);
  return p;
}

// The kernels of a layer score blocks by sums; a padded one decides it at run time.
bool has_kernel(const FusedAppendParams& p) {
  return p.cluster > 0 && (p.block_sums.memory || !fused_instance(p.shape).tuned);
}

// Of a ragged batch: rows lend tiles, and all positions are those of the tile.
bool has_loans(const DecodeLayerArgs& a) {
  const QueryTile& tile = a.attention.combine.tile;
  return a.log.positions == tile.batches && tile.batch_begin == 0 && loan_params(inputs_of(a), a.attention).cluster > 0;
}

}  // namespace

AppendedRows appended_rows(const StepEnds& ends) {
  AppendedRows rows;
  const QueryTile& tile = ends.compress.tile;
  const LayerShape& s = ends.compress.shape;
  for (int b = 0; b < branches; ++b) {
    const AppendArgs& append = ends.append[b];
    const auto row = [&](const void* from, const KvView& cache) {
      const auto type_size = static_cast<std::int64_t>(size_of(s.dtype)), size = is_quantised(cache) ? 1 : type_size;
      const auto bytes = static_cast<int>(cache.width * type_size);
      if (cache.pages.pages)
        return AppendedRows::Row{static_cast<const char*>(from), static_cast<char*>(cache.data),
                                 std::int64_t{cache.pages.rows} * cache.width * size, bytes};
      return AppendedRows::Row{
          static_cast<const char*>(from),
          static_cast<char*>(cache.data) + std::int64_t{tile.batch_begin} * s.groups * cache.plane_stride * size,
          cache.plane_stride * size, bytes};
    };
    rows.rows[2 * b] = row(append.k, append.k_cache);
    rows.rows[2 * b + 1] = row(append.v, append.v_cache);
    rows.ring[b] = static_cast<int>(append.k_cache.map.ring);
    rows.by_ring[b] = Divisor(std::max(1, rows.ring[b]));
  }
  return rows;
}

StepLog step_log(const StepEnds& ends, const AttentionArgs& attention, std::int64_t* (&reads)[branches]) {
  const AdvanceArgs& log = ends.log;
  for (int b = 0; b < branches; ++b) reads[b] = log.reads_log + (attention.attend[b].reads - log.reads);
  StepLog to;
  to.rows = static_cast<int>(log.log_steps);
  to.counters = static_cast<int>(log.counters);
  to.first_position = static_cast<int>(ends.first_position);
  to.selected = log.selected_log + (attention.rank.selected - log.selected);
  to.selected_count = log.selected_count;
  if (attention.combine.tile.ragged()) to.number = log.step;
  if (!ends.ends_step) return to;
  to.position = log.position;
  to.step = log.step;
  to.arrivals = arrival_counters(cmp);
  return to;
}

bool decode_layer_accepts(const DecodeLayerArgs& a) {
  const LayerShape& s = a.attention.combine.shape;
  const auto size = static_cast<std::int64_t>(size_of(s.dtype));
  if (a.attention.combine.tile.tokens > 1) return false;  // rows read what other rows append
  if (!decode_attention_accepts(a.attention) || !fused_decode_accepts(a.attention)) return false;
  if (s.phi != PhiKind::mean || a.attention.combine.tile.rows() == 0 || a.log.log_steps == 0) return false;
  for (const AppendArgs& append : a.append)
    if (!is_whole(append.k_cache, s.d_k * size) || !is_whole(append.v_cache, s.d_v * size)) return false;
  // Before a ring is full its rows of earlier positions may lie past `l` rows.
  const std::int64_t ring = a.append[cmp].k_cache.map.ring;
  return (ring == 0 || ring >= s.rules.l) && is_whole(a.compress.k_cmp, s.d_k * size) &&
         (a.attention.combine.tile.ragged() ? has_loans(a) : has_kernel(params_of(a)));
}

void decode_layer(const DecodeLayerArgs& a, Stream* stream) {
  if (a.attention.combine.tile.ragged()) {
    if (a.projects) project(a.project, stream);
    return launch_loans(loan_params(inputs_of(a), a.attention), stream);
  }
  const FusedAppendParams p = params_of(a);
  // 256 threads add up RoPE and gate in the order of project; there is no such kernel of FP8 rows.
  if (!a.projects || p.warps < fused_warps || is_quantised(a.compress.k_cmp)) {
    if (a.projects) project(a.project, stream);
    return launch_divided(p, stream);
  }
  FusedLayerParams layer;
  static_cast<FusedAppendParams&>(layer) = p;
  layer.project = a.project;
  layer.product = project_product(a.project, stream);
  layer.columns = qkv_columns(p.shape);
  launch_divided(layer, stream);
}

}  // namespace nsa::gpu
