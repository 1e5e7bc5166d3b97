// Which decode steps are fused into one kernel, and how a work item is divided over CTAs and warps.

#include <algorithm>

#include "kernels/cuda/attention/kv_tiles.cuh"
#include "kernels/cuda/decode/fused/params.cuh"

namespace nsa::gpu {

namespace {

// Calls f(integral constant of the storage type, whether the instance is tuned).
template <class F>
auto with_instances(const LayerShape& s, F f) {
  const bool tuned = fused_instance(s).tuned;
  if (s.dtype == DType::f32) return f(std::integral_constant<DType, DType::f32>{}, std::true_type{});
  if (s.dtype == DType::bf16)
    return tuned ? f(std::integral_constant<DType, DType::bf16>{}, std::true_type{})
                 : f(std::integral_constant<DType, DType::bf16>{}, std::false_type{});
  return tuned ? f(std::integral_constant<DType, DType::f16>{}, std::true_type{})
               : f(std::integral_constant<DType, DType::f16>{}, std::false_type{});
}

bool has_fp8_rows(const LayerShape& s) { return s.kv_precision == KvPrecision::fp8_e4m3; }

int resident_clusters(const LayerShape& s, int cluster) {
  if (has_fp8_rows(s)) return active_clusters_fp8(s, cluster);
  return with_instances(s, [&](auto type, auto tuned) { return active_clusters<type, tuned>(s, cluster); });
}

// Head tiles of a work item. Each has CTAs of its own.
int head_tiles_of(const LayerShape& s) {
  const DecodeInstance instance = fused_instance(s);
  return instance.tuned ? 1 : (s.heads_per_group + instance.heads - 1) / instance.heads;
}

// CTAs of a work item and warps of a CTA; cluster = 0: no division is possible.
struct Division {
  int cluster = 0, warps = fused_warps, resident = 0;
};
// The division with the least modelled time: a wave of clusters takes its latencies plus its bytes at an even share of
// the bandwidth. Of a ragged batch the longest item decides where all are resident; else clusters start longest first,
// and one that follows another takes a start more. There are no more warps than tiles. Every head tile reads all of
// them.
Division choose_division(const LayerShape& s, const QueryTile& tile, std::int64_t max_tiles,
                         const DivisionLimits& within) {
  const int head_tiles = head_tiles_of(s);
  const DecodeInstance instance = fused_instance(s);
  const bool has_small_ctas = head_tiles == 1 && instance.heads <= 16 && instance.d_v <= 128;
  // Of FP8 rows more warps, unless each of 8 has fewer than three tiles: then every warp costs in the choice and merge.
  const auto cta_warps = [&](int cluster) {
    return has_fp8_rows(s) && max_tiles >= 3 * cluster * fused_warps ? fused_warps_fp8 : fused_warps;
  };
  constexpr double latencies = 8e-6, bandwidth = 4.3e12;  // s and bytes/s of an H200; only their ratio matters
  constexpr double start = 30e-6;                         // of a cluster that follows another, its latencies among it
  const BlockRules& r = s.rules;
  const std::int64_t work_items = tile.rows() * s.groups;
  const auto alone_at = [&](std::int64_t T) {  // a work item of T positions on one SM
    const std::int64_t tokens =
        (compressed_tokens(r, T - 1) + std::min<std::int64_t>(T, std::int64_t{r.n_sel} * r.l_sel) +
         std::min<std::int64_t>(T, r.w)) /
        within.shards;
    const std::int64_t bytes = row_bytes(s.dtype, s.kv_precision, s.d_k) + row_bytes(s.dtype, s.kv_precision, s.d_v);
    return static_cast<double>(tokens * bytes) * limits().sms / bandwidth;
  };
  const bool ragged = tile.ragged() && !within.lends;
  const double mean = alone_at(tile.ragged() ? tile.mean_positions : tile.max_positions),
               alone = ragged ? alone_at(tile.max_positions) : mean;
  Division best;
  double least = 0;
  const auto consider = [&](int cluster, int warps, std::int64_t resident, double fraction) {
    if (within.one_wave && work_items > resident) return;
    const double longest = latencies + alone * fraction,
                 all = static_cast<double>(work_items) * (start + mean * fraction);
    const double time = !ragged                  ? static_cast<double>((work_items + resident - 1) / resident) * longest
                        : work_items <= resident ? longest
                                                 : std::max(longest, all / static_cast<double>(resident));
    if (best.cluster == 0 || time < least) best = {cluster, warps, static_cast<int>(resident)}, least = time;
  };
  for (const int cluster : {1, 2, 3, 4, 5, 6, 7, 8, 16}) {
    if (cluster > within.max_cluster) break;
    if (cluster % head_tiles != 0) continue;
    if (cluster > head_tiles && (cluster / head_tiles - 1) * fused_warps >= max_tiles) break;
    const int resident = within.active_clusters(s, cluster);
    if (resident == 0) break;
    if (within.only_warps == 0 || within.only_warps == fused_warps)
      consider(cluster, cta_warps(cluster), resident, static_cast<double>(head_tiles) / cluster);
    if (cluster == 1 && has_small_ctas && within.only_warps != fused_warps)
      consider(1, within.only_warps > 0 ? within.only_warps : fused_warps_small, 2 * resident,
               work_items > resident ? 2.0 : 1.0);
  }
  return best;
}

// Blocks that a warp scores in a round: every round begins at a multiple of 4 tokens.
int round_blocks_of(const BlockRules& r) {
  const int blocks = std::min(32, round_tokens * r.d / r.l_sel);
  return blocks > 4 ? blocks - blocks % 4 : blocks;
}

// Blocks of a warp in a single pass, two tokens a lane; 0: a warp's blocks would not begin at a multiple of 2 tokens.
int single_pass_blocks_of(const BlockRules& r) {
  const int blocks = std::min(warp_top_n, round_tokens / 2 * r.d / r.l_sel);
  return blocks * (r.l_sel / r.d) % 2 == 0 ? blocks : 0;
}

// Memory of the raw scores or block sums that the KV mainloop stores. If they fit the L2, K and V are loaded such that
// they do not evict them.
void assign_score_memory(FusedDecodeParams& p, float* memory) {
  const std::int64_t rows = p.tile.rows();
  p.scores = memory;
  p.pitch = score_pitch(p.k[cmp].map, p.max_tokens);
  std::int64_t floats = rows * p.shape.heads() * p.pitch;
  if (scores_by_tile(p.shape)) {
    const bool shard = p.k[cmp].map.chunk != INT64_MAX;  // the last chunk may have a halo row and no token
    p.block_sums = tile_sums(memory, shard ? p.max_tiles : (p.max_tokens + tile_rows - 1) / tile_rows,
                             fused_instance(p.shape).heads);
    floats =
        rows * p.shape.groups * head_tiles_of(p.shape) * p.block_sums.tiles * p.block_sums.heads * (tile_blocks + 1);
  }
  p.keeps_scores = keeps_scores(floats);
}

// Compressed tokens that the buffer holds of `tokens`.
std::int64_t held_tokens(const RowMap& map, std::int64_t tokens) {
  if (map.chunk == INT64_MAX) return tokens;
  const std::int64_t owned = owned_chunks(map, tokens, map.rank), last = (owned - 1) * map.kv + map.rank;
  return owned == 0 ? 0 : (owned - 1) * map.chunk + std::min(map.chunk, tokens - last * map.chunk);
}

// Whether the kernel is built for the shape and the block rules.
bool has_kernel(const AttentionArgs& a) {
  const LayerShape& s = a.combine.shape;
  const BlockRules& r = s.rules;
  const int tokens = round_blocks_of(r) * (r.l_sel / r.d);  // of a round
  return limits().capability >= 90 && static_cast<bool>(fused_instance(s)) && tokens > 0 && tokens % 4 == 0 &&
         (r.l - 1) / r.d <= std::min(max_halo_tokens, tokens) && !a.rank.candidates && a.rank.selected;
}

}  // namespace

bool fused_decode_accepts(const AttentionArgs& a) {
  return a.combine.tile.tokens == 1 && reads_kv_map(win, a.combine.shape, a.attend[win].k.map) && has_kernel(a);
}

FusedDecodeParams fused_decode_params(const AttentionArgs& a) {
  FusedDecodeParams p{};
  p.shape = a.combine.shape;
  p.tile = a.combine.tile;
  p.q = a.attend[cmp].q;
  for (int b = 0; b < branches; ++b) {
    p.k[b] = a.attend[b].k;
    p.v[b] = a.attend[b].v;
    p.reads[b] = a.attend[b].reads;
    p.leave_out[b] = a.combine.leave_out[b];
    p.o_branch[b] = a.combine.o_branch[b];
  }
  p.pages = FusedPages(p.k[cmp].pages, p.k[sel].pages, p.shape, p.tile.batch_begin);
  p.max_tokens =
      static_cast<int>(held_tokens(p.k[cmp].map, compressed_tokens(p.shape.rules, p.tile.max_positions - 1)));
  p.scores_only = a.attend[cmp].scores_only;
  p.tile_lse = static_cast<float2*>(a.attend[cmp].scratch);
  p.max_tiles = max_kv_tiles(cmp, p.shape, p.k[cmp].map, p.tile.max_positions);
  assign_score_memory(p, static_cast<float*>(a.attend[cmp].scores));
  p.selected = a.rank.selected;
  p.p_slc = a.rank.p_slc;
  p.p_slc_blocks = a.rank.p_slc_blocks;
  p.gate = a.combine.gate;
  p.o = a.combine.o;
  return p;
}

void divide_work(FusedDecodeParams& p, const DivisionLimits& within) {
  const LayerShape& s = p.shape;
  const BlockRules& r = s.rules;
  const auto share = [&](int count) { return (count + within.shards - 1) / within.shards; };
  const int win_tiles = p.leave_out[win] ? 0 : (share(r.w) + tile_rows - 1) / tile_rows,
            sel_tiles = p.leave_out[sel] ? 0 : share(r.n_sel) * tiles_per_span(sel, s),
            second_tiles = win_tiles + sel_tiles;
  const Division division = choose_division(s, p.tile, std::max<std::int64_t>(within.max_tiles, second_tiles), within);
  p.cluster = division.cluster, p.warps = division.warps;
  p.longest_first =
      p.tile.ragged() && !within.lends && within.shards == 1 && p.tile.rows() * s.groups > division.resident;
  if (p.cluster == 0) return;
  p.head_tiles = head_tiles_of(s), p.tile_ctas = p.cluster / p.head_tiles;
  p.by_head_tiles = Divisor(p.head_tiles), p.by_tile_ctas = Divisor(p.tile_ctas);
  const int column_quads = std::min(fused_instance(s).d_v, 128) / 4, warps = p.cluster * p.warps;
  p.o_slice = (decode_heads(s.dtype) * column_quads + p.tile_ctas - 1) / p.tile_ctas;
  p.o_slice_heads = p.o_slice % column_quads == 0   ? p.o_slice / column_quads
                    : column_quads % p.o_slice == 0 ? 1
                                                    : p.o_slice / column_quads + 2;
  p.round_blocks = round_blocks_of(r);
  p.by_cluster = Divisor(p.cluster), p.by_o_slice = Divisor(p.o_slice);
  p.by_round_blocks = Divisor(p.round_blocks);
  p.groups = Divisor(s.groups), p.stride = Divisor(r.d), p.block = Divisor(r.l_sel), p.segment = Divisor(s.lse.segment);
  if (win_tiles > 0) {
    const int tile_warps = warps / p.head_tiles;
    p.win_warps =
        p.head_tiles * window_warps(tile_warps, p.tile_ctas, win_tiles, sel_tiles, within.max_tiles > tile_warps);
  }
  p.single_pass_blocks = p.cluster > 1 ? single_pass_blocks_of(r) : 0;
  p.by_single_pass = Divisor(std::max(1, p.single_pass_blocks));
  p.tokens_per_block = r.l_sel / r.d, p.halo_tokens = (r.l - 1) / r.d;
  p.by_scoring_warps = Divisor(p.win_warps < warps ? warps - p.win_warps : warps);
}

int fused_slots(const LayerShape& s, const QueryTile& tile) {
  if (limits().capability < 90 || tile.tokens > 1 || !static_cast<bool>(fused_instance(s))) return 0;
  const std::int64_t max_tiles = max_kv_tiles(cmp, s, RowMap{}, tile.max_positions);
  return choose_division(s, tile, max_tiles, {resident_clusters, max_tiles}).resident;
}

bool try_fused_decode(const AttentionArgs& a, Stream* stream) {
  if (!fused_decode_accepts(a)) return false;
  FusedDecodeParams p = fused_decode_params(a);
  divide_work(p);
  if (p.cluster > 0) launch_divided(p, stream);
  return p.cluster > 0;
}

std::optional<FusedTokenParams> plan_fused_tokens(const AttentionArgs& a, const DecodeParams& launch,
                                                  const DecodeJob& of_cmp, const DecodeJob* of_win) {
  const LayerShape& s = a.combine.shape;
  const bool sums = launch.block_sums.memory && fused_instance(s).heads == decode_heads(s.dtype);
  if (!sums || !has_kernel(a) || 2 * a.combine.tile.rows() * s.groups < limits().sms) return std::nullopt;
  FusedTokenParams p;
  static_cast<FusedDecodeParams&>(p) = fused_decode_params(a);
  p.block_sums = launch.block_sums;
  p.before[cmp] = of_cmp.partials, p.splits = of_cmp.splits;
  if (of_win) p.before[win] = of_win->partials, p.leave_out[win] = true;  // to attend
  divide_work(p, {.active_clusters = resident_clusters,
                  .max_tiles = 0,  // cmp is attended
                  .max_cluster = 1,
                  .only_warps = after_cmp_warps(fused_instance(s))});
  p.leave_out[win] = a.combine.leave_out[win];  // to merge
  p.longest_first = false;                      // the rest of the step is the same work for all
  if (p.cluster != 1) return std::nullopt;
  return p;
}

void divide_work(FusedDecodeParams& p) { divide_work(p, {resident_clusters, p.max_tiles}); }

namespace {

void launch_fp8(const FusedAppendParams& p, Stream* stream) { launch_fused_decode_fp8(p, stream); }
// The kernel of a layer, which appends and logs nothing.
void launch_fp8(const FusedDecodeParams& p, Stream* stream) {
  FusedAppendParams step;
  static_cast<FusedDecodeParams&>(step) = p;
  launch_fused_decode_fp8(step, stream);
}

}  // namespace

template <class Params>
void launch_divided(const Params& p, Stream* stream) {
  if constexpr (!Params::projects && !Params::after_cmp)
    if (has_fp8_rows(p.shape)) return launch_fp8(p, stream);
  with_instances(p.shape, [&](auto type, auto tuned) { launch_fused_decode<type, tuned, Params>(p, stream); });
}
template void launch_divided(const FusedDecodeParams&, Stream*);
template void launch_divided(const FusedTokenParams&, Stream*);
template void launch_divided(const FusedAppendParams&, Stream*);
template void launch_divided(const FusedLayerParams&, Stream*);

}  // namespace nsa::gpu
