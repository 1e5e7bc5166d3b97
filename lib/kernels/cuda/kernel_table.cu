// The CUDA kernel table: the stages by name, each with its part of the scratch.

#include <algorithm>

#include "kernels/cuda/attention/block_sums.cuh"
#include "kernels/cuda/attention/kv_tiles.cuh"
#include "kernels/cuda/attention/stages.cuh"
#include "kernels/cuda/decode/sharded/stages.cuh"
#include "kernels/cuda/decode/split_kv/instances.cuh"
#include "kernels/cuda/decode/split_kv/stages.cuh"
#include "kernels/cuda/decode/stages.cuh"
#include "kernels/cuda/dispatch.cuh"
#include "kernels/cuda/exchange/peer_exchange.hpp"
#include "kernels/cuda/layer/stages.cuh"
#include "kernels/cuda/prefill/stages.cuh"
#include "kernels/cuda/rank/stages.cuh"
#include "kernels/cuda/scratch.cuh"

namespace nsa::gpu {

std::size_t branch_scratch(const LayerShape& s, const QueryTile& tile, const AttentionPolicy& policy) {
  QueryTile split = tile;
  if (policy.recompute_scores) {  // no LSE segments are stored, and more rows than these are not split
    split.tokens = std::min(tile.tokens, 16);
    split.max_positions = 1;
  }
  return padded(std::max(
      {attend_scratch(s, tile), decode_scratch(s, split), rows_scratch(s, split), gemm_scratch(s, tile, policy)}));
}

namespace {

std::size_t rank_scratch_of(const LayerShape& s, const QueryTile& tile, const AttentionPolicy& policy) {
  return policy.recompute_scores ? rank_prefill_scratch(s, tile) : rank_scratch(s, tile);
}

}  // namespace

std::size_t scratch_bytes(const LayerShape& s, const QueryTile& tile, const AttentionPolicy& policy) {
  const std::size_t product = padded(project_scratch(s, tile));
  // A decode layer in one launch reads its product while it attends.
  const std::size_t behind = std::max(padded(rank_scratch_of(s, tile, policy)), tile.tokens == 1 ? product : 0);
  return std::max(product, branches * branch_scratch(s, tile, policy) + behind);
}

namespace {

void rank_stage(const RankArgs& a, Stream* stream) {
  const RankArgs with = with_rank_scratch(a, rank_scratch_of(a.shape, a.tile, a.policy));
  a.policy.recompute_scores ? rank_prefill(with, stream) : rank(with, stream);
}

bool prologue_accepts(const PrologueArgs&) { return true; }

void fused_decode_attention(const AttentionArgs& a, Stream* stream) {
  const CombineArgs& c = a.combine;
  AttentionArgs with = a;
  with.attend[cmp] = with_scratch(a.attend[cmp], 0, branches * branch_scratch(c.shape, c.tile, c.policy));
  with.rank = with_rank_scratch(a.rank, rank_scratch(c.shape, c.tile));
  decode_attention(with, stream);
}

void fused_decode_layer(const DecodeLayerArgs& a, Stream* stream) {
  const CombineArgs& c = a.attention.combine;
  DecodeLayerArgs with = a;
  const std::size_t attention = branches * branch_scratch(c.shape, c.tile, c.policy);
  with.attention.attend[cmp] = with_scratch(a.attention.attend[cmp], 0, attention);
  if (a.projects) with.project = with_scratch(a.project, attention, padded(project_scratch(c.shape, c.tile)));
  decode_layer(with, stream);
}

void fused_sharded_step(const ShardedStepArgs& a, Stream* stream) {
  const CombineArgs& c = a.attention.combine;
  ShardedStepArgs with = a;
  with.attention.attend[cmp] =
      with_scratch(a.attention.attend[cmp], 0, branches * branch_scratch(c.shape, c.tile, c.policy));
  sharded_step(with, stream);
}

void fused_prefill_attention(const AttentionArgs& a, Stream* stream) {
  AttentionArgs with = a;
  with.rank = with_rank_scratch(a.rank, rank_prefill_scratch(a.rank.shape, a.rank.tile));
  prefill_attention(with, stream);
}

// local_attention and normalise_partials share the partials of cmp and win in the scratch of these branches.
template <void (*Run)(const ShardedAttentionArgs&, Stream*)>
void sharded_phase(const ShardedAttentionArgs& a, Stream* stream) {
  ShardedAttentionArgs with = a;
  for (const Branch b : {cmp, win}) with.attend[b] = with_branch_scratch(a.attend[b], b);
  Run(with, stream);
}

std::size_t score_bytes(const LayerShape& s, const QueryTile& tile, std::int64_t cmp_rows) {
  // Where the rows are chunks with halos, there are at most so many chunks, and each takes so many padding floats.
  const std::int64_t halo = s.rules.l / s.rules.d - 1, segment = s.lse.segment,
                     chunks = cmp_rows / (segment + halo) + 1,
                     padding = round_up_to_sectors(segment) + round_up_to_sectors(halo) - segment - halo;
  const std::int64_t raw = tile.rows() * s.heads() * padded_columns(cmp_rows + chunks * padding);
  // A fused decode step may store block sums instead, which are more floats where a group has few heads.
  const std::int64_t sums =
      tile.tokens == 1 && scores_by_tile(s) && decode_accepts(s, tile)
          ? tile.rows() * s.groups * tile_sum_floats((cmp_rows + tile_rows - 1) / tile_rows, padded_heads(s))
          : 0;
  return static_cast<std::size_t>(std::max(raw, sums)) * sizeof(float);
}

}  // namespace

const KernelTable& kernel_table() {
  static const KernelTable table = {
      .project = project,
      .append = append,
      .compress = compress,
      .attend = {attend_kernels(cmp), attend_kernels(sel), attend_kernels(win)},
      .rank = rank_stage,
      .select = select,
      .combine = combine,
      .output = output,
      .rmsnorm = rmsnorm,
      .add = add,
      .copy_rows = copy_rows,
      .fill_rows = fill_rows,
      .checksum = checksum,
      .advance = advance,
      .prologue = {prologue_accepts, decode_prologue},
      .decode_attention = {decode_attention_accepts, fused_decode_attention, decode_attention_variant},
      .decode_layer = {decode_layer_accepts, fused_decode_layer},
      .prefill_attention = {prefill_attention_accepts, fused_prefill_attention},
      .sharded_attention = {.accepts = sharded_attention_accepts,
                            .local_attention = sharded_phase<local_attention>,
                            .normalise_partials = sharded_phase<normalise_partials>,
                            .merge_ranks = merge_ranks},
      .sharded_step = {sharded_step_accepts, fused_sharded_step},
      .score_bytes = score_bytes,
      .scratch_bytes = scratch_bytes,
      .schedule_imbalance = schedule_imbalance,
      // The partials of 9504 rows of 64 heads are 0.9 GB. With 4 groups, 132 SMs and 8, 16 and 12 rows a work item (cmp
      // and win, rank, sel) every SM has exactly 36, 18 and 24 work items.
      .max_tile_tokens = 9504,
      .tile_score_budget = std::size_t{1} << 30,
      .max_exchange_memory = peer_memory_bytes,
  };
  return table;
}

}  // namespace nsa::gpu
