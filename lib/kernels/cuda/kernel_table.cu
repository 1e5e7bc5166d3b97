// The CUDA kernel table: the stages by name, each with its part of the scratch.

#include "kernels/cuda/attention/stages.cuh"
#include "kernels/cuda/decode/sharded/stages.cuh"
#include "kernels/cuda/decode/split_kv/stages.cuh"
#include "kernels/cuda/decode/stages.cuh"
#include "kernels/cuda/dispatch.cuh"
#include "kernels/cuda/layer/stages.cuh"
#include "kernels/cuda/prefill/stages.cuh"
#include "kernels/cuda/rank/stages.cuh"
#include "kernels/cuda/sizes/planned_kernels.hpp"
#include "kernels/cuda/sizes/scratch.hpp"

namespace nsa::gpu {

namespace {

void rank_stage(const RankArgs& a, Stream* stream) {
  const RankArgs with = with_rank_scratch(a, rank_scratch(a.shape, a.tile, a.policy));
  a.policy.recompute_scores ? rank_prefill(with, stream) : rank(with, stream);
}

// Rows in storage type; or all caches that attention reads quantised, and whole.
bool prologue_accepts(const PrologueArgs& a) {
  const KvView &of_cmp = a.compress.k_cmp, &of_sel = a.append[sel].k_cache, &of_win = a.append[win].k_cache;
  const bool any = is_quantised(of_cmp) || is_quantised(of_sel) || is_quantised(of_win),
             all = is_quantised(of_cmp) && is_quantised(of_sel) && is_quantised(of_win);
  return !any || (all && a.compress.shape.phi == PhiKind::mean && of_cmp.map.chunk == INT64_MAX);
}

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

KernelTable make_kernel_table() {
  KernelTable table = planned_kernels();
  table.project = project;
  table.append = append;
  table.compress = compress;
  for (const Branch b : {cmp, sel, win}) table.attend[b] = attend_kernels(b);
  table.rank = rank_stage;
  table.select = select;
  table.combine = combine;
  table.output = output;
  table.rmsnorm = rmsnorm;
  table.add = add;
  table.copy_rows = copy_rows;
  table.fill_rows = fill_rows;
  table.checksum = checksum;
  table.advance = advance;
  table.prologue = {prologue_accepts, decode_prologue};
  table.decode_attention = {decode_attention_accepts, fused_decode_attention, decode_attention_variant};
  table.decode_layer = {decode_layer_accepts, fused_decode_layer};
  table.prefill_attention = {prefill_attention_accepts, fused_prefill_attention};
  table.sharded_attention = {.accepts = sharded_attention_accepts,
                             .local_attention = sharded_phase<local_attention>,
                             .normalise_partials = sharded_phase<normalise_partials>,
                             .merge_ranks = merge_ranks};
  table.sharded_step = {sharded_step_accepts, fused_sharded_step};
  table.schedule_imbalance = schedule_imbalance;
  return table;
}

}  // namespace

const KernelTable& kernel_table() {
  static const KernelTable table = make_kernel_table();
  return table;
}

}  // namespace nsa::gpu
