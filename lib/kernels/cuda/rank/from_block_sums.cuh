#pragma once
// Block scores of a slice from the sums by tile that the KV mainloop of a sharded step stored
// (attention/block_sums.cuh), 10 floats instead of 32 a tile and head. A lane has one block and four heads of a tile,
// 16 bytes next to its neighbours'. Small slices: a warp a tile. Others: a warp four tiles at a time, so every lane has
// the score of a block, and the warp keeps the best 16 sorted. There is no barrier before the keys or lists of the
// warps merge.

#include "kernels/cuda/rank/block_slices.cuh"

namespace nsa::gpu {

// Block and heads of a lane within the four tiles of a warp.
struct BlockSumReader {
  const float4* sums;     // tile 0 of this rank
  const float* exponent;  // what the lane exponentiates: m of a head, or a halo score
  int heads, n;           // heads of a warp tile; tokens
  bool has_heads, first_half;
  float2 normaliser;

  __device__ __forceinline__ BlockSumReader(const RankParams& p, int work_item, int tokens, const float2* normalisers)
      : heads(p.block_sums.heads), n(tokens) {
    const int valid_heads = p.a.shape.heads_per_group, head_quad = threadIdx.x % 32 / tile_blocks,
              block = threadIdx.x % tile_blocks, head = head_quad * 4 + block % 4;
    const int tiles_of_heads = (valid_heads + heads - 1) / heads, quad_in_tile = heads == 4 ? 0 : head_quad,
              item = work_item * tiles_of_heads + (heads == 4 ? min(head_quad, tiles_of_heads - 1) : 0);
    has_heads = head_quad * 4 < valid_heads, first_half = block < 4;
    sums = reinterpret_cast<const float4*>(p.block_sums.sums(item, 0)) + quad_in_tile * tile_blocks + block;
    exponent = (first_half ? p.block_sums.tile_max(item, 0) : p.block_sums.halo_scores(item, 0)) + quad_in_tile * 4 +
               block % 4;
    normaliser = head < valid_heads ? normalisers[head] : make_float2(INFINITY, 0.0f);
  }

  struct Loaded {
    float4 sums;
    float exponent;
  };
  // Loads a tile of this rank whose first token is `token`, if it exists.
  __device__ __forceinline__ Loaded load(int tile, int token) const {
    const bool has_tokens = has_heads && token < n, has_halo = has_heads && token > 0 && token <= n;
    return {has_tokens ? __ldcg(sums + tile * (heads * tile_blocks / 4)) : float4{},
            (first_half ? has_tokens : has_halo) ? __ldcg(exponent + tile * heads) : -INFINITY};
  }
  __device__ __forceinline__ float partial_of(Loaded x) const {
    PartialBlockScore partial;
    partial.add(x.sums, probability_or_zero(x.exponent, normaliser));
    return partial.score();
  }

  // Score of block lane % 8 of the tile whose first block is this rank's u-th, block j.
  __device__ __forceinline__ float score_tile(int u, int j) const {
    return reduce_over_heads(partial_of(load(u / tile_blocks, j * cmp_tokens_per_block)));
  }
  // Score of one of 32 blocks a lane, from this rank's u-th on; j: the block of the lane. All lanes.
  __device__ __forceinline__ float score(int u, int j) const {
    Loaded x[4];
    float partials[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      x[i] = load(u / tile_blocks + i, __shfl_sync(0xffffffffu, j, i * tile_blocks) * cmp_tokens_per_block);
#pragma unroll
    for (int i = 0; i < 4; ++i) partials[i] = partial_of(x[i]);
    return reduce_over_heads(partials);
  }
};

// Sort entries of the blocks of a slice.
struct BlockSumSlice {
  const RankParams& p;
  BlockSumReader reader;
  float* p_slc;
  int first_local, begin, end;

  __device__ __forceinline__ BlockSumSlice(const RankParams& params, std::int64_t row, std::int64_t g, std::int64_t t,
                                           int from, int to, const float2* normalisers)
      : p(params),
        reader(params, static_cast<int>(row * params.a.shape.groups + g),
               static_cast<int>(compressed_tokens(params.a.shape.rules, t)), normalisers),
        p_slc(p.a.p_slc ? p.a.p_slc + (row * p.a.shape.groups + g) * p.a.p_slc_blocks : nullptr),
        first_local(static_cast<int>(eligible_blocks(p.a.shape.rules, t)) - p.a.shape.rules.n_local),
        begin(from),
        end(to) {}

  // Entry of block j, the u-th held; 0 outside the slice. Stores its score.
  __device__ __forceinline__ Entry entry(int u, int j, float score) const {
    if (u >= end) return 0;
    if (p_slc && j < p.a.p_slc_blocks) p_slc[j] = score;
    return entry_of(key_of(j < p.a.shape.rules.n_init || j >= first_local, score), u);
  }
  // Stores the entries of all blocks of the slice.
  __device__ __forceinline__ void store_entries(Entry* to) const {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int u = begin + static_cast<int>(threadIdx.x) / 32 * tile_blocks; u < end;
         u += static_cast<int>(blockDim.x) / 32 * tile_blocks) {
      const int j = block_at(p, u);
      const float score = reader.score_tile(u, j);
      if (lane < tile_blocks && u + lane < end) to[u + lane - begin] = entry(u + lane, j + lane, score);
    }
  }
  // The sorted best 16 blocks of this warp, in its first half; 0: none.
  __device__ __forceinline__ Entry best() const {
    const int lane = threadIdx.x % 32;
    Entry best = 0;
#pragma unroll 1
    for (int first = begin + static_cast<int>(threadIdx.x) - lane; first < end; first += static_cast<int>(blockDim.x)) {
      const int u = first + lane;
      // Past `end` there may be no block: a token index past every token.
      const int j = u < end ? block_at(p, u) : INT32_MAX / cmp_tokens_per_block;
      best = top16_with(best, entry(u, j, reader.score(first, j)));
    }
    return best;
  }
};

}  // namespace nsa::gpu
