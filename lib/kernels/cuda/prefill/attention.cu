// A prefill tile's attention as a whole, on a rank that has all K and V at hand: win and cmp of each item in one
// kernel, rank's two, and sel. Every branch's result is final where it is formed, so nothing is kept to be merged: the
// sum of what is normalised and weighed so far is written once, read once, and o in storage type is written by sel.
//
// Bytes an element of o: 4 written and read, 2 written, where three partials and combine take 12, 12 and 2.

#include "kernels/cuda/prefill/stages.cuh"
#include "kernels/cuda/rank/stages.cuh"

namespace nsa::gpu {

bool prefill_attention_accepts(const AttentionArgs& a) {
  const LayerShape& s = a.combine.shape;
  const QueryTile& tile = a.combine.tile;
  bool whole =
      a.combine.policy.recompute_scores && tile.tokens > 1 && a.combine.ranks == 1 && !a.attend[cmp].scores_only;
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
  AttendArgs last = a.attend[sel];
  last.out = a.attend[cmp].out;
  attend_prefill_sel_gated(last, combine.gate, combine.o, stream);
}

}  // namespace nsa::gpu
