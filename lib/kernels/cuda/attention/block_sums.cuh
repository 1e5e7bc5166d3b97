#pragma once
// Selection-block scores from sums by KV tile: e = 2^(score - m), m the maximum of the tile, is summed over the tokens
// of a block while the scores are in registers. The sum times 2^(m - M) / Z is the probability mass of the block, so
// one exponential a tile and head replaces one a token.
//
// For l = 2d, l' = 4d a block overlaps the 4 tokens that begin in it and one halo token before them, with overlaps of
// 2, 2, 2, 1 and 1 strides. A tile is 32 tokens that begin at a multiple of 32: 8 blocks. The halo token of its first
// block is in another tile, perhaps on another rank, and contributes by its raw score.
//
// Every kernel that forms these sums, in the KV mainloop or from raw scores, uses the same order and roundings, so
// every kv layout and every route selects by the same bits.

#include "kernels/cuda/attention/block_scores.cuh"
#include "kernels/cuda/attention/kv_tiles.cuh"

namespace nsa::gpu {

/// Whether the KV mainloop of a fused or sharded step stores block sums by tile; rank then sorts lists of 16.
inline bool leaves_sums(const LayerShape& s) {
  return scores_by_tile(s) && s.rules.n_sel <= warp_top_n && s.heads_per_group <= 16;
}

/// What the KV mainloop stores of the tiles of a work item (or of one head tile of it) where rank reads no raw scores.
struct TileBlockSums {
  float* memory;  ///< null: raw scores are stored instead
  std::int64_t item_floats;
  int tiles, heads;  ///< heads: of a warp tile
  /// [heads / 4][8 blocks][4 heads], without the halo token of the first block.
  __device__ __forceinline__ float* sums(int work_item, int tile) const {
    return memory + work_item * item_floats + tile * (heads * tile_blocks);
  }
  /// [heads]: raw scores of the halo token of the tile. One tile past the last may have a halo.
  __device__ __forceinline__ float* halo_scores(int work_item, int tile) const {
    return memory + work_item * item_floats + tiles * (heads * tile_blocks) + tile * heads;
  }
  /// [heads]: m, where rank is a separate launch. The fused step takes m from DecodeParams::tile_lse instead.
  __device__ __forceinline__ float* tile_max(int work_item, int tile) const {
    return memory + work_item * item_floats + tiles * (heads * (tile_blocks + 1)) + (tile + 1) * heads;
  }
};
inline TileBlockSums tile_sums(void* memory, std::int64_t tiles, int heads) {
  return {static_cast<float*>(memory), tile_sum_floats(tiles, heads), static_cast<int>(tiles), heads};
}

/// Sum of the exponentials of a block's own tokens and of its halo token, relative to the maximum of the tile. `halo`
/// is 0 for the first block of a tile.
__device__ __forceinline__ float block_sum(float e0, float e1, float e2, float e3, float halo) {
  return __fadd_rn(__fmaf_rn(2.0f, __fadd_rn(__fadd_rn(e0, e1), e2), e3), halo);
}

/// 2^(x - M) / Z: the scale of a tile's sums if x is the tile maximum, the probability of a token if x is its score.
__device__ __forceinline__ float probability(float x, float2 normaliser) {
  return __fmul_rn(exp2_fast(x - normaliser.x), normaliser.y);
}

/// Heads are summed by fours: by rising head, starting from the sum of the same lanes' earlier fours; halo tokens in
/// pairs. The four lanes of a block are then reduced 16 lanes apart first, then 8 apart.
__device__ __forceinline__ float add_four_heads(float partial, const float (&sums)[4], const float (&scales)[4]) {
#pragma unroll
  for (int h = 0; h < 4; ++h) partial = __fmaf_rn(sums[h], scales[h], partial);
  return partial;
}
__device__ __forceinline__ float sum_four_halos(const float (&probs)[4]) {
  return __fadd_rn(__fadd_rn(probs[0], probs[1]), __fadd_rn(probs[2], probs[3]));
}

/// Contribution of four heads to the score of a block: from its own tile, and from the halo token of a tile's first
/// block.
struct PartialBlockScore {
  float own = 0.0f, halo = 0.0f;
  __device__ __forceinline__ float score() const { return __fadd_rn(own, halo); }
  /// Adds the stored sums of a tile. Eight lanes call it, one per block; `prob` is probability() of the tile maximum of
  /// head lane % 4 in the first four, of that head's halo score in the other four.
  __device__ __forceinline__ void add(float4 sums, float prob) {
    const int lane = threadIdx.x % 32;
    float scales[4];
#pragma unroll
    for (int h = 0; h < 4; ++h) scales[h] = __shfl_sync(0xffffffffu, prob, lane / 8 * 8 + h);
    own = add_four_heads(own, {sums.x, sums.y, sums.z, sums.w}, scales);
    const float two = __fadd_rn(prob, __shfl_xor_sync(0xffffffffu, prob, 1)),
                four = __fadd_rn(two, __shfl_xor_sync(0xffffffffu, two, 2)),
                halo_sum = __shfl_xor_sync(0xffffffffu, four, 4);
    halo = __fadd_rn(halo, lane % 8 == 0 ? halo_sum : 0.0f);
  }
};

/// Adds two values across lanes `distance` apart: the lower lane gets the sum of a, the upper one that of b.
__device__ __forceinline__ float reduce_across(float a, float b, int distance) {
  const bool upper = threadIdx.x & distance;
  return __fadd_rn(upper ? b : a, __shfl_xor_sync(0xffffffffu, upper ? a : b, distance));
}
/// Sums the partial scores of one tile over the four lanes of each block.
__device__ __forceinline__ float reduce_over_heads(float partial) {
  const float two = __fadd_rn(partial, __shfl_xor_sync(0xffffffffu, partial, 16));
  return __fadd_rn(two, __shfl_xor_sync(0xffffffffu, two, 8));
}
/// The same for four tiles. Each lane gets the score of one of the 32 blocks.
__device__ __forceinline__ float reduce_over_heads(const float (&partials)[4]) {
  return reduce_across(reduce_across(partials[0], partials[2], 16), reduce_across(partials[1], partials[3], 16), 8);
}

/// The probability of a score, 0 for -inf, which marks an absent token.
__device__ __forceinline__ float probability_or_zero(float x, float2 normaliser) {
  return x == -INFINITY ? 0.0f : probability(x, normaliser);
}

}  // namespace nsa::gpu
