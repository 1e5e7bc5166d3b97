#pragma once
// A selection block's probability mass by way of its tile: e = 2^(score - m), m the tile's maximum, added up over the
// block's tokens next to the scores; then times 2^(m - M) / Z once a tile and head instead of an exponential a token.
//
// For l = 2d, l' = 4d: a block has 4 tokens that begin in it and one in front, which reach into it by 2, 2, 2, 1 and 1
// strides. A tile is the 32 tokens from a multiple of 32 on, 8 blocks. What lies in front of its first block is in
// another tile, maybe another rank's, and enters by its raw score.
//
// Whoever forms these sums, in the walk or from raw scores, takes them in the same order with the same roundings, so
// that every kv layout and every way of running a step chooses by the same bits.

#include "kernels/cuda/attention/block_scores.cuh"
#include "kernels/cuda/attention/kv_tiles.cuh"

namespace nsa::gpu {

constexpr int block_tokens = 4, tile_blocks = tile_rows / block_tokens;

/// Whether blocks are scored this way: the shape alone says so. A leaf, and so a chunk, has whole tiles.
__host__ __device__ inline bool scores_by_tile(const LayerShape& s) {
  const BlockRules& r = s.rules;
  return r.l == 2 * r.d && r.l_sel == block_tokens * r.d && s.lse.segment % tile_rows == 0;
}

/// Whether the walk of a sharded step leaves sums by tile for rank, which keeps lists of 16 then.
inline bool leaves_sums(const LayerShape& s) {
  return scores_by_tile(s) && s.rules.n_sel <= most_chosen && s.heads_per_group <= 16;
}

/// What the walk leaves of the tiles of a list (or of a head tile of it) where rank reads no raw scores.
struct TileSums {
  float* memory;  ///< null: raw scores are left
  std::int64_t list_floats;
  int tiles, heads;  ///< heads: of the engine
  /// [heads / 4][8 blocks][4 heads], without what lies in front of the tile's first block.
  __device__ __forceinline__ float* sums(int list, int tile) const {
    return memory + list * list_floats + tile * (heads * tile_blocks);
  }
  /// [heads]: raw scores of the token in front of the tile; there may be one in front of one more tile.
  __device__ __forceinline__ float* fronts(int list, int tile) const {
    return memory + list * list_floats + tiles * (heads * tile_blocks) + tile * heads;
  }
  /// [heads], where rank is a launch of its own: m. Else it is beside the leaves' sums.
  __device__ __forceinline__ float* maxima(int list, int tile) const {
    return memory + list * list_floats + tiles * (heads * (tile_blocks + 1)) + (tile + 1) * heads;
  }
};
constexpr std::int64_t tile_sum_floats(std::int64_t tiles, int heads) {
  return tiles * heads * (tile_blocks + 2) + heads;
}
inline TileSums tile_sums(void* memory, std::int64_t tiles, int heads) {
  return {static_cast<float*>(memory), tile_sum_floats(tiles, heads), static_cast<int>(tiles), heads};
}

/// Of a block's own tokens and of the one in front, relative to the tile's maximum; that one 0 for a tile's first
/// block.
__device__ __forceinline__ float block_sum(float e0, float e1, float e2, float e3, float front) {
  return __fadd_rn(__fmaf_rn(2.0f, __fadd_rn(__fadd_rn(e0, e1), e2), e3), front);
}

/// 2^(x - M) / Z: of a tile's maximum what its sums are weighed with, of a raw score the token's probability.
__device__ __forceinline__ float share_of(float x, float2 normaliser) {
  return __fmul_rn(exp2_fast(x - normaliser.x), normaliser.y);
}

/// Heads add up by fours: by rising head onto what earlier fours of the same place left; in front of a tile's first
/// block in pairs. Of the four places those 2 apart first, over lanes 16 apart, then 8.
__device__ __forceinline__ float four_heads(float part, const float (&sums)[4], const float (&weights)[4]) {
#pragma unroll
  for (int h = 0; h < 4; ++h) part = __fmaf_rn(sums[h], weights[h], part);
  return part;
}
__device__ __forceinline__ float four_fronts(const float (&shares)[4]) {
  return __fadd_rn(__fadd_rn(shares[0], shares[1]), __fadd_rn(shares[2], shares[3]));
}

/// Of a block and four heads: what its own tile gives to its score, and what lies in front of a tile's first block.
struct BlockPart {
  float own = 0.0f, front = 0.0f;
  __device__ __forceinline__ float score() const { return __fadd_rn(own, front); }
  /// By eight lanes, from sums that were left of a tile: a lane a block, the first four with the shares of the heads'
  /// maxima, the others with those of the scores in front.
  __device__ __forceinline__ void add(float4 sums, float share) {
    const int lane = threadIdx.x % 32;
    float weights[4];
#pragma unroll
    for (int h = 0; h < 4; ++h) weights[h] = __shfl_sync(0xffffffffu, share, lane / 8 * 8 + h);
    own = four_heads(own, {sums.x, sums.y, sums.z, sums.w}, weights);
    const float two = __fadd_rn(share, __shfl_xor_sync(0xffffffffu, share, 1)),
                four = __fadd_rn(two, __shfl_xor_sync(0xffffffffu, two, 2)),
                before = __shfl_xor_sync(0xffffffffu, four, 4);
    front = __fadd_rn(front, lane % 8 == 0 ? before : 0.0f);
  }
};

/// Two sums over the lane and the one `step` on: the first for the lower of the two, the second for the upper.
__device__ __forceinline__ float across(float a, float b, int step) {
  const bool upper = threadIdx.x & step;
  return __fadd_rn(upper ? b : a, __shfl_xor_sync(0xffffffffu, upper ? a : b, step));
}
/// Of one tile the places' parts of the lane's block.
__device__ __forceinline__ float over_places(float part) {
  const float two = __fadd_rn(part, __shfl_xor_sync(0xffffffffu, part, 16));
  return __fadd_rn(two, __shfl_xor_sync(0xffffffffu, two, 8));
}
/// Of four tiles the places' parts of the lane's block in each: the score of the lane's own of all 32 blocks.
__device__ __forceinline__ float over_places(const float (&parts)[4]) {
  return across(across(parts[0], parts[2], 16), across(parts[1], parts[3], 16), 8);
}

/// What is not there, -inf, is no probability.
__device__ __forceinline__ float share_if_any(float x, float2 normaliser) {
  return x == -INFINITY ? 0.0f : share_of(x, normaliser);
}

}  // namespace nsa::gpu
