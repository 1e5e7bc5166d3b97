// Prefill's rank stage: scores of the selection blocks, recomputed from q and k_cmp (prefill/rank/block_scores.cuh),
// and the top n of them (prefill/rank/top_n.cuh).
//
// The tokens of a block are added in one order and tiles begin at multiples of 128: results do not depend on the layout
// of K_cmp.

#include <algorithm>

#include "kernels/cuda/prefill/rank/block_scores.cuh"
#include "kernels/cuda/prefill/rank/top_n.cuh"
#include "kernels/cuda/prefill/stages.cuh"

namespace nsa::gpu {

using namespace block_scoring;

namespace {

template <class T, int DK, bool Tuned>
void launch_scores(const RankArgs& a, PrefillPart part, Stream* stream) {
  const LayerShape& s = a.shape;
  const bool quads = s.rules.l_sel == quad_tokens * s.rules.d && s.rules.l == 2 * s.rules.d;
  if (!quads) part.query_rows = heads_per_tile;
  BlockScoreParams p{dense_work(s, part, a.tile, a.q, item_rows),
                     kv_tensor_maps(s, a.tile, a.k_cmp, nullptr, compressed_tokens(s.rules, a.tile.max_positions - 1)),
                     a.cmp_ms + std::int64_t{part.first_head} * 2,
                     static_cast<float*>(a.scratch),
                     block_score_pitch(s.rules, a.tile.max_positions),
                     part};
  if (quads) {
    const bool whole = p.kv.box_rows % quad_tokens == 0;
    p.kv.k = kv_tensor_map(a.k_cmp, s.dtype, std::int64_t{a.tile.batch_begin + a.tile.batches} * s.groups,
                           whole ? p.kv.box_rows : 1, whole ? quad_tokens : 1);
  }
  launch_pdl(quads ? score_kernel<T, DK, Tuned, true> : score_kernel<T, DK, Tuned, false>,
             dim3(persistent_ctas(p.work)), threads, Shared<DK>::bytes, stream, 1, p);
}

template <class T>
void launch_scores(const RankArgs& a, Stream* stream) {
  LayerShape keys = a.shape;  // V is not read
  keys.d_v = std::min(keys.d_k, 128);
  with_head_sizes(keys, [&](auto d_k, auto, auto tuned) {
    for_each_prefill_part(keys, keys.d_v, tuned,
                          [&](const PrefillPart& part) { launch_scores<T, d_k, tuned>(a, part, stream); });
  });
}

}  // namespace

void rank_prefill(const RankArgs& a, Stream* stream) {
  const std::int64_t row_groups = a.tile.rows() * a.shape.groups;
  if (row_groups == 0) return;
  if (!tma_accepts(a.k_cmp.map)) throw InternalError("rank: no raw scores, and K_cmp is cut");
  if (a.scratch_bytes < rank_prefill_scratch(a.shape, a.tile)) throw InternalError("rank: scratch too small");
  if (a.shape.dtype == DType::bf16)
    launch_scores<__nv_bfloat16>(a, stream);
  else
    launch_scores<__half>(a, stream);
  const TopNParams p{a, static_cast<const float*>(a.scratch), block_score_pitch(a.shape.rules, a.tile.max_positions)};
  launch_pdl(a.shape.rules.n_sel <= 32 ? top_n_kernel<1> : top_n_kernel<2>,
             dim3(static_cast<unsigned>((row_groups + top_n_warps - 1) / top_n_warps)), 32 * top_n_warps, 0, stream, 1,
             p);
}

}  // namespace nsa::gpu
