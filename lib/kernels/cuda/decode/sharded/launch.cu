// Which sharded decode steps are one launch a rank, and its arguments.

#include <algorithm>

#include "kernels/cuda/attention/kv_tiles.cuh"
#include "kernels/cuda/decode/sharded/exchange.cuh"
#include "kernels/cuda/decode/sharded/stages.cuh"

namespace nsa::gpu {

namespace {

const PeerGroup& group_of(const ShardedStepArgs& a) { return *reinterpret_cast<const PeerGroup*>(a.peers); }

// Chunks of cmp that are an LSE segment each, behind one halo row, and the same chunks of the selection K and V.
bool reads_maps(const ShardedStepArgs& a) {
  const LayerShape& s = a.attention.combine.shape;
  const RowMap &cmp_map = a.attention.attend[cmp].k.map, &sel_map = a.attention.attend[sel].k.map;
  const auto is_shard = [&](const RowMap& map) {
    return map.kv == group_of(a).size && map.rank == group_of(a).rank && map.stride == map.chunk + map.halo;
  };
  return is_shard(cmp_map) && is_shard(sel_map) && cmp_map.chunk == s.lse.segment && cmp_map.halo == 1 &&
         sel_map.chunk == cmp_map.chunk * s.rules.d && sel_map.halo == 0 && sel_map.chunk % s.rules.l_sel == 0 &&
         a.attention.attend[win].k.map.ring > 0 && reads_kv_map(win, s, a.attention.attend[win].k.map);
}

bool reads_shape(const ShardedStepArgs& a) {
  const AttentionArgs& attention = a.attention;
  const LayerShape& s = attention.combine.shape;
  const bool record =
      attention.rank.p_slc || std::ranges::any_of(attention.combine.o_branch, [](float* o) { return o; });
  return fused_decode_accepts(attention) && s.dtype == DType::bf16 && (s.d_k == 64 || s.d_k == 128) && s.d_k == s.d_v &&
         leaves_sums(s) && s.lse.buckets <= StepSlot::max_buckets && s.lse.buckets % group_of(a).size == 0 && !record;
}

// Whether the longest sequence of a ragged batch would keep its clusters busy, after the others, for longer than the
// launches and exchanges of ShardedAttention take, which deals tiles by length.
bool longest_delays(const ShardedStepArgs& a) {
  const LayerShape& s = a.attention.combine.shape;
  const QueryTile& tile = a.attention.combine.tile;
  if (!tile.ragged()) return false;
  constexpr double launches = 100e-6, bandwidth = 4.3e12;  // s, bytes/s of an H200
  const double work_items = static_cast<double>(tile.rows() * s.groups), sms = limits().sms,
               ctas = std::clamp(sms / work_items, 1.0, double{fused_max_cluster}),
               excess_tokens = static_cast<double>(compressed_tokens(s.rules, tile.max_positions) -
                                                   compressed_tokens(s.rules, tile.mean_positions)) /
                               group_of(a).size;
  return excess_tokens * (s.d_k + s.d_v) * static_cast<double>(size_of(s.dtype)) * sms / ctas / bandwidth > launches;
}

// Whether the launch can do what is around the attention: positions that move together, rows of whole vectors as they
// are, raw rows that a ring has.
bool reads_ends(const ShardedStepArgs& a) {
  const StepEnds& ends = *a.ends;
  const LayerShape& s = a.attention.combine.shape;
  return !s.quantises() && s.phi == PhiKind::mean && !a.attention.combine.tile.ragged() && ends.log.log_steps > 0 &&
         ends.compress.fill_halo && ends.compress.k_raw.map.ring >= s.rules.l;
}

// cluster = 0: the work items do not run all at the same time.
ShardedDecodeParams params_of(const ShardedStepArgs& a) {
  ShardedDecodeParams p{};
  static_cast<FusedDecodeParams&>(p) = fused_decode_params(a.attention);
  p.peers = group_of(a);
  p.kv = p.peers.size, p.rank = p.peers.rank;
  p.exchanges = a.exchanges;
  p.readings = a.readings;
  if (a.ends) p.appended = appended_rows(*a.ends), p.log = step_log(*a.ends, a.attention, p.reads);
  const LayerShape& s = p.shape;
  // As on the rank with the most chunks: a work item has as many CTAs on every rank.
  RowMap first_rank = p.k[cmp].map;
  first_rank.rank = 0;
  divide_work(p, {active_sharded_clusters<DType::bf16>, max_kv_tiles(cmp, s, first_rank, p.tile.max_positions), p.kv,
                  StepSlot::max_ctas / p.kv, true});
  if (p.cluster > 0 && resident_sharded_items<DType::bf16>(p) < p.tile.rows() * s.groups) p.cluster = 0;
  p.chunk_blocks = static_cast<int>(p.k[sel].map.chunk) / s.rules.l_sel;
  p.by_chunk_blocks = Divisor(p.chunk_blocks), p.by_kv = Divisor(p.kv);
  p.finished = finished_heads(s, p.kv, p.rank), p.by_heads = Divisor(s.heads());
  p.slots = StepSlot::work_items(p.kv), p.slot_bytes = StepSlot::bytes(p.kv);
  while (p.merge_lanes < p.kv * p.cluster) p.merge_lanes *= 2;
  return p;
}

}  // namespace

bool sharded_step_accepts(const ShardedStepArgs& a) {
  const QueryTile& tile = a.attention.combine.tile;
  return a.peers && group_of(a).size > 1 && group_of(a).size <= ShardedDecodeParams::max_kv && tile.tokens == 1 &&
         tile.rows() > 0 && tile.rows() * a.attention.combine.shape.groups <= StepSlot::work_items(group_of(a).size) &&
         reads_shape(a) && reads_maps(a) && (!a.ends || reads_ends(a)) && !longest_delays(a) &&
         params_of(a).cluster > 0;
}

void sharded_step(const ShardedStepArgs& a, Stream* stream) {
  launch_sharded_decode<DType::bf16>(params_of(a), stream);
}

}  // namespace nsa::gpu
