#pragma once
// Prefill's block scores (prefill/rank/rank.cu), recomputed from q and k_cmp.
//
// Tiling: four consumer warpgroups of 4 queries read K_cmp in the dense tiles of prefill/prefill.cuh: 64 x 128 scores
// in registers. Each becomes a probability with the row's (m, sum) that cmp's attention stored, is summed over the 16
// heads of the query (16 rows of one warp, in a fixed tree) and over the tokens of a block. Only block scores go to
// memory: 1/64 of the bytes of raw scores. Where a block is four tokens and the end of the previous one (l = 2 d, l' =
// 4 d), the copies permute a tile's rows so that a lane has all four tokens of its blocks: the sum over tokens comes
// first, and the sum over heads has a third of the values; there a warp may have several queries of fewer heads. FLOPs:
// 2 Dk a (head, token), 2048 cycles a tile of the four warpgroups; the exponentials take as much time in parallel, and
// 1400 issue slots. Bound: products and exponentials together; measured some 3400 cycles a tile, for every tried
// overlap of the two (docs/kernels/README.md).

#include "kernels/cuda/prefill/rank/consumer.cuh"

namespace nsa::gpu::block_scoring {

template <class T, int DK, bool Tuned, bool Quads>
__global__ void __launch_bounds__(threads, 1) score_kernel(const __grid_constant__ BlockScoreParams p) {
#ifdef NSA_WGMMA
  extern __shared__ char memory[];
  __shared__ __align__(16) float token_sums[4 * consumer_warpgroups][prefill_max_halo + dense_tile_tokens];
  __shared__ float overlap_weights[prefill_max_halo + dense_tile_tokens];
  const BlockRules& r = p.work.shape.rules;
  const int ratio = r.l_sel / r.d, halo = (r.l - 1) / r.d;
  for (int k = threadIdx.x; k < ratio + halo; k += threads)
    overlap_weights[k] = overlap(r, std::int64_t{r.l} * ratio - halo + k, r.l);  // of a block far from the start
  const Shared<DK> shared(memory);
  if (threadIdx.x == 0) shared.init_barriers();
  __syncthreads();
  griddep_wait();
  const std::int64_t first_position = *p.work.tile.first_position;
  const int warpgroup = warp_uniform(threadIdx.x / 128);
  if (warpgroup == consumer_warpgroups) {
    warpgroup_reg_dealloc<24>();
    if (threadIdx.x % 128 == 0) produce<DK, Tuned, Quads>(p, shared, first_position);
  } else {
    warpgroup_reg_alloc<112>();
    ScoreConsumer<T, DK, Tuned, Quads> consumer{p, shared, warpgroup, token_sums[threadIdx.x / 32] + prefill_max_halo,
                                                overlap_weights};
    consumer.ratio = ratio;
    consumer.halo = halo;
    consumer.blocks = dense_tile_tokens / ratio;
    int phase = 0;
    for (int index = blockIdx.x; index < p.work.items; index += gridDim.x, phase ^= 1)
      consumer.score_item(DenseWorkItem(p.work, index, first_position), phase);
  }
#endif
}

}  // namespace nsa::gpu::block_scoring
