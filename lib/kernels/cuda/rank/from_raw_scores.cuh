#pragma once
// Block scores of a slice by tile (attention/block_sums.cuh) from raw scores: a warp a tile, 8 lanes its blocks, and
// four such groups of lanes a quarter of the heads each. A lane loads 16 bytes, the four tokens of its block, of each
// of its heads. Shuffles distribute the maximum of the tile and halo scores; tiles are independent.

#include "kernels/cuda/rank/block_slices.cuh"

namespace nsa::gpu {

// Column of the first token that begins in block j, the u-th held.
__device__ inline int block_column(const RankParams& p, int u, int j) {
  if (p.columns.contiguous) return first_column(p, u) + 1;
  const std::int64_t c = p.a.cmp_map.rank == all_ranks ? 0 : j / p.per_chunk;
  return static_cast<int>(score_column(p.a.cmp_map, c, std::int64_t{j} * cmp_tokens_per_block));
}

// Raw scores of one head that enter the sum of a block.
struct BlockScores {
  float4 own;
  float halo;
};
__device__ __forceinline__ BlockScores load_block(const float* scores, int tokens, bool has_halo) {
  const float4 x = tokens > 0 ? *reinterpret_cast<const float4*>(scores) : float4{};
  return {{tokens > 0 ? x.x : -INFINITY, tokens > 1 ? x.y : -INFINITY, tokens > 2 ? x.z : -INFINITY,
           tokens > 3 ? x.w : -INFINITY},
          has_halo ? scores[-1] : -INFINITY};
}

// Sum of the block of a lane relative to the maximum of the tile, and that maximum.
struct BlockSum {
  float sum, m;
};
__device__ __forceinline__ BlockSum sum_block(const BlockScores& x) {
  const float4 s = x.own;
  float m = fmaxf(fmaxf(s.x, s.y), fmaxf(s.z, s.w));
#pragma unroll
  for (int distance = 1; distance < tile_blocks; distance *= 2) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, distance));
  if (m == -INFINITY) m = neg_inf;
  const float last = exp2_fast(s.w - m), halo = __shfl_up_sync(0xffffffffu, last, 1);
  return {block_sum(exp2_fast(s.x - m), exp2_fast(s.y - m), exp2_fast(s.z - m), last,
                    threadIdx.x % tile_blocks == 0 ? 0.0f : halo),
          m};
}

// Scores the tile whose first block is this rank's u-th, block j. All lanes of a warp.
struct TileScorer {
  const RankParams& p;
  const float* scores;  // scores of the first head
  const float2* normaliser;
  int n;  // tokens

  __device__ __forceinline__ float score(int u, int j) const {
    const int heads = p.a.shape.heads_per_group, block = threadIdx.x % tile_blocks,
              token = (j + block) * cmp_tokens_per_block, tokens = min(n - token, cmp_tokens_per_block),
              head_in_round = threadIdx.x % 32 / tile_blocks * 4;
    const bool has_halo = block == 0 && token > 0 && token <= n;
    const float* own = scores + block_column(p, u, j) + block * cmp_tokens_per_block;
    PartialBlockScore partial;
#pragma unroll 1
    for (int head0 = 0; head0 < heads; head0 += 16) {
      const int first = head0 + head_in_round;
      BlockScores x[4];
#pragma unroll
      for (int h = 0; h < 4; ++h) {
        const bool valid = first + h < heads;
        x[h] = load_block(own + (valid ? first + h : 0) * p.pitch, valid ? tokens : 0, valid && has_halo);
      }
      float sums[4], scales[4], halos[4];
#pragma unroll
      for (int h = 0; h < 4; ++h) {
        const float2 normaliser = normaliser_of(first + h);
        const BlockSum of_head = sum_block(x[h]);
        sums[h] = of_head.sum;
        scales[h] = of_head.m == neg_inf ? 0.0f : probability(of_head.m, normaliser);
        halos[h] = probability_or_zero(x[h].halo, normaliser);
      }
      partial.own = add_four_heads(partial.own, sums, scales);
      partial.halo = __fadd_rn(partial.halo, sum_four_halos(halos));
    }
    return reduce_over_heads(partial.score());
  }

 private:
  __device__ __forceinline__ float2 normaliser_of(int head) const {
    return head < p.a.shape.heads_per_group ? normaliser[head] : make_float2(INFINITY, 0.0f);
  }
};

// Sort keys of blocks [begin, end) of those held; whole tiles but for the last.
template <class StoreKey>
__device__ inline void score_tiles(const RankParams& p, std::int64_t row, std::int64_t g, std::int64_t t, int begin,
                                   int end, const float2* normaliser, StoreKey store_key) {
  const LayerShape& s = p.a.shape;
  const BlockRules& r = s.rules;
  const int first_local = static_cast<int>(eligible_blocks(r, t)) - r.n_local;
  const TileScorer scorer{p,
                          static_cast<const float*>(p.a.scores) + (row * s.heads() + g * s.heads_per_group) * p.pitch,
                          normaliser, static_cast<int>(compressed_tokens(r, t))};
  float* p_slc = p.a.p_slc ? p.a.p_slc + (row * s.groups + g) * p.a.p_slc_blocks : nullptr;
  const int lane = threadIdx.x % 32, stride = blockDim.x / 32 * tile_blocks;
#pragma unroll 1
  for (int u0 = begin + threadIdx.x / 32 * tile_blocks; u0 < end; u0 += stride) {
    const int j0 = block_at(p, u0), u = u0 + lane, j = j0 + lane;
    const float score = scorer.score(u0, j0);
    if (lane >= tile_blocks || u >= end) continue;
    store_key(u, key_of(j < r.n_init || j >= first_local, score));
    if (p_slc && j < p.a.p_slc_blocks) p_slc[j] = score;
  }
}

}  // namespace nsa::gpu
