#pragma once
// A CTA of rank scores its slice by tiles (attention/block_sums.cuh) from raw scores: a warp a tile, 8 lanes its
// blocks, four of them each a share of the heads; a lane has 16 bytes, its block's four tokens, of each of its heads.
// The tile's maximum and what lies in front of blocks pass by shuffles; tiles do not wait for one another.

#include "kernels/cuda/rank/block_slices.cuh"

namespace nsa::gpu {

// Column of the first token that begins in the u-th block, which is block j.
__device__ inline int block_column(const RankParams& p, int u, int j) {
  if (p.run.present) return first_column(p, u) + 1;
  const std::int64_t c = p.a.cmp_map.rank == all_ranks ? 0 : j / p.per_chunk;
  return static_cast<int>(score_column(p.a.cmp_map, c, std::int64_t{j} * block_tokens));
}

// Raw scores of one head as they enter a block's sum.
struct BlockScores {
  float4 own;
  float front;
};
__device__ __forceinline__ BlockScores load_block(const float* scores, int tokens, bool fronted) {
  const float4 x = tokens > 0 ? *reinterpret_cast<const float4*>(scores) : float4{};
  return {{tokens > 0 ? x.x : -INFINITY, tokens > 1 ? x.y : -INFINITY, tokens > 2 ? x.z : -INFINITY,
           tokens > 3 ? x.w : -INFINITY},
          fronted ? scores[-1] : -INFINITY};
}

// Sum of the lane's block relative to the tile's maximum, and that.
struct BlockSum {
  float sum, m;
};
__device__ __forceinline__ BlockSum sum_block(const BlockScores& x) {
  const float4 s = x.own;
  float m = fmaxf(fmaxf(s.x, s.y), fmaxf(s.z, s.w));
#pragma unroll
  for (int step = 1; step < tile_blocks; step *= 2) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, step));
  if (m == -INFINITY) m = neg_inf;
  const float last = exp2_fast(s.w - m), before = __shfl_up_sync(0xffffffffu, last, 1);
  return {block_sum(exp2_fast(s.x - m), exp2_fast(s.y - m), exp2_fast(s.z - m), last,
                    threadIdx.x % tile_blocks == 0 ? 0.0f : before),
          m};
}

// A warp's way to the scores of a tile: that of this rank's u-th block, which is block j, its first.
struct TileScorer {
  const RankParams& p;
  const float* scores;  // of the first head
  const float2* normaliser;
  int n;  // tokens

  __device__ __forceinline__ float score(int u, int j) const {
    const int heads = p.a.shape.heads_per_group, block = threadIdx.x % tile_blocks, token = (j + block) * block_tokens,
              tokens = min(n - token, block_tokens), four = threadIdx.x % 32 / tile_blocks * 4;
    const bool fronted = block == 0 && token > 0 && token <= n;
    const float* own = scores + block_column(p, u, j) + block * block_tokens;
    BlockPart part;
#pragma unroll 1
    for (int all = 0; all < heads; all += 16) {
      const int first = all + four;
      BlockScores x[4];
#pragma unroll
      for (int h = 0; h < 4; ++h) {
        const bool there = first + h < heads;
        x[h] = load_block(own + (there ? first + h : 0) * p.pitch, there ? tokens : 0, there && fronted);
      }
      float sums[4], weights[4], fronts[4];
#pragma unroll
      for (int h = 0; h < 4; ++h) {
        const float2 by = normaliser_of(first + h);
        const BlockSum of_head = sum_block(x[h]);
        sums[h] = of_head.sum;
        weights[h] = of_head.m == neg_inf ? 0.0f : share_of(of_head.m, by);
        fronts[h] = share_if_any(x[h].front, by);
      }
      part.own = four_heads(part.own, sums, weights);
      part.front = __fadd_rn(part.front, four_fronts(fronts));
    }
    return over_places(part.score());
  }

 private:
  __device__ __forceinline__ float2 normaliser_of(int head) const {
    return head < p.a.shape.heads_per_group ? normaliser[head] : make_float2(INFINITY, 0.0f);
  }
};

// Keys of the blocks [begin, end) among those held, whole tiles but for the last.
template <class Keep>
__device__ inline void score_tiles(const RankParams& p, std::int64_t row, std::int64_t g, std::int64_t t, int begin,
                                   int end, const float2* normaliser, Keep keep) {
  const LayerShape& s = p.a.shape;
  const BlockRules& r = s.rules;
  const int local = static_cast<int>(eligible_blocks(r, t)) - r.n_local;
  const TileScorer scorer{p,
                          static_cast<const float*>(p.a.scores) + (row * s.heads() + g * s.heads_per_group) * p.pitch,
                          normaliser, static_cast<int>(compressed_tokens(r, t))};
  float* p_slc = p.a.p_slc ? p.a.p_slc + (row * s.groups + g) * p.a.p_slc_blocks : nullptr;
  const int lane = threadIdx.x % 32, step = blockDim.x / 32 * tile_blocks;
#pragma unroll 1
  for (int u0 = begin + threadIdx.x / 32 * tile_blocks; u0 < end; u0 += step) {
    const int j0 = block_at(p, u0), u = u0 + lane, j = j0 + lane;
    const float score = scorer.score(u0, j0);
    if (lane >= tile_blocks || u >= end) continue;
    keep(u, key_of(j < r.n_init || j >= local, score));
    if (p_slc && j < p.a.p_slc_blocks) p_slc[j] = score;
  }
}

}  // namespace nsa::gpu
