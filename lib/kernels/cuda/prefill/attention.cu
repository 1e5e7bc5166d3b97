// The fused attention of a prefill tile, on a rank that has all K and V: one kernel for win and cmp of each work item,
// two for the rank stage, one for sel. Each branch's output is final in its kernel, so there are no partials: the sum
// of normalised and gated branches is written once and read once, and sel writes o in storage type.
//
// Bytes an element of o: 4 written, 4 read, 2 written; three partials and combine take 12, 12 and 2.

#include "kernels/cuda/prefill/stages.cuh"
#include "kernels/cuda/rank/stages.cuh"

namespace nsa::gpu {

bool prefill_attention_accepts(const AttentionArgs& a) {
  const LayerShape& s = a.combine.shape;
  const QueryTile& tile = a.combine.tile;
  bool whole =
      a.combine.policy.recompute_scores && !tile.is_step() && a.combine.ranks == 1 && !a.attend[cmp].scores_only;
  for (int b = 0; b < branches; ++b) whole &= !a.combine.leave_out[b] && !a.combine.o_branch[b];
  return whole && prefill_accepts(cmp, s, a.attend[cmp].k.map) && prefill_accepts(win, s, a.attend[win].k.map) &&
         prefill_sel_accepts(s, a.attend[sel].k.map) && prefill_sel_pays(s, tile);
}

void prefill_attention(const AttentionArgs& a, Stream* stream) {
  const CombineArgs& combine = a.combine;
  attend_prefill_gated(a.attend[cmp], a.attend[win], combine.gate, stream);
  RankArgs rank = a.rank;
  rank.cmp_ms = a.attend[cmp].out.ms;
  rank_prefill(rank, stream);
  AttendArgs sel_args = a.attend[sel];
  sel_args.out = a.attend[cmp].out;
  attend_prefill_sel_gated(sel_args, combine.gate, combine.o, stream);
}

}  // namespace nsa::gpu
