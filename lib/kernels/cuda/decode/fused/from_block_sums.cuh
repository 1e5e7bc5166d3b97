#pragma once
// Block scores from the sums that the KV mainloop stored by tile of 8 blocks (attention/block_sums.cuh). A lane takes
// one block and four heads of a tile, 16 bytes next to its neighbours'. Scales and halo probabilities take one
// exponential a lane, distributed by shuffles. No shared memory, no barrier.

#include "kernels/cuda/decode/fused/from_raw_scores.cuh"

namespace nsa::gpu {

template <class WarpTile, int W>
struct ScoresFromBlockSums {
  using SharedLayout = FusedSharedLayout<WarpTile, W>;
  static constexpr int head_quads = WarpTile::part_heads / 4;  ///< groups of four heads that the lanes take together
  static constexpr int duplicate_stride = 8;  ///< score_single_pass(): lanes so far apart have the same block
  static_assert(head_quads == 4 || head_quads == 1);
  const FusedDecodeParams& p;
  int token_tiles, halo_tiles;  // tiles below have a token; have a halo token
  int first_halo_tile = 1;      // the first tile that has one
  int tile_of_lane;             // 4 heads: tile of this lane; 8 lanes have a tile (single pass: 16)
  const float4* sums;           // block and heads of this lane in tile 0
  const float* exponent;        // what this lane exponentiates: m of a head, or a halo score
  int exponent_step;
  float2 normaliser;
  const float2* normalisers;  // of this lane's head and those 16, 32, ... after it
  int work_item;

  // Loads of up to four tiles.
  struct Loaded {
    float4 sums[head_quads];
    float exponent[head_quads];
  };
  Loaded next;

  __device__ __forceinline__ ScoresFromBlockSums(const FusedDecodeParams& params, const FusedCoord& at,
                                                 bool single_pass)
      : p(params), work_item(at.work_item) {
    const int lane = threadIdx.x % 32, block = lane % 8, head_quad = head_quads == 4 ? lane / 8 : 0,
              head = head_quad * 4 + lane % 4;
    token_tiles = (at.n + tile_rows - 1) / tile_rows;
    halo_tiles = at.n / tile_rows + 1;
    tile_of_lane = head_quads == 4 ? 0 : single_pass ? lane / 16 : lane / 8;
    const int item = WarpTile::tuned ? work_item : work_item * p.head_tiles;
    sums = reinterpret_cast<const float4*>(p.block_sums.sums(item, 0)) + head_quad * tile_blocks + block;
    const auto* maxima = reinterpret_cast<const float*>(p.tile_lse + item * p.max_tiles * WarpTile::heads);
    exponent = block < 4 ? maxima + head * 2 : p.block_sums.halo_scores(item, 0) + head;
    exponent_step = block < 4 ? 2 * WarpTile::heads : WarpTile::heads;
  }

  /// Loads the inputs of the first round, which needs no normalisers.
  __device__ __forceinline__ void prefetch(int begin, bool single_pass) {
#pragma unroll
    for (int i = 0; i < head_quads; ++i)
      if (i < 2 || !single_pass) load_tile(begin / tile_blocks + tile_of_lane + i, next.sums[i], next.exponent[i]);
  }
  __device__ __forceinline__ void start(int, const char* shared) {
    const int head = (head_quads == 4 ? threadIdx.x % 32 / 8 * 4 : 0) + threadIdx.x % 4;
    normalisers = reinterpret_cast<const float2*>(shared + SharedLayout::normalisers_at(p.shape)) + head;
    normaliser = normalisers[0];
  }
  /// Score of block b0 + lane if it is below `end`. Rounds come by rising block.
  __device__ __forceinline__ float score(int b0, int end) {
    const Loaded loaded = next;
    if (b0 + p.round_blocks < end) prefetch(b0 + p.round_blocks, false);
    float partials[head_quads];
#pragma unroll
    for (int i = 0; i < head_quads; ++i)
      partials[i] = partial_of(loaded.sums[i], loaded.exponent[i], b0 / tile_blocks + tile_of_lane + i);
    if constexpr (head_quads == 1)
      return partials[0];
    else
      return reduce_over_heads(partials);
  }

  /// Score of block `begin` + single_pass_block().
  static __device__ __forceinline__ int single_pass_block() {
    return threadIdx.x % 32 / 16 * tile_blocks + threadIdx.x % 8;
  }
  __device__ __forceinline__ float score_single_pass(int begin, int) {
    const int tile = begin / tile_blocks + tile_of_lane;
    const float first = partial_of(next.sums[0], next.exponent[0], tile);
    if constexpr (head_quads == 1) {
      return first;
    } else {
      const float sum = reduce_across(first, partial_of(next.sums[1], next.exponent[1], tile + 1), 16);
      return __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, 8));
    }
  }

 private:
  // Absent scores become -inf, whose probability is 0. `round`: heads 16 * round and up.
  __device__ __forceinline__ void load_tile(int tile, float4& sum, float& x, int round = 0) const {
    const bool has_tokens = tile < token_tiles;
    const bool has_halo = tile < halo_tiles && tile >= first_halo_tile;
    const float4* from = sums;
    const float* exponent_from = exponent;
    if (!WarpTile::tuned && round > 0) {  // (work item, head tile) and 16 heads in it
      constexpr int per_tile = WarpTile::heads / WarpTile::part_heads;
      const bool is_max = threadIdx.x % 8 < 4;
      const int item = round / per_tile, part = round % per_tile;
      from += item * (p.block_sums.item_floats / 4) + part * (WarpTile::part_heads * tile_blocks / 4);
      exponent_from += item * (is_max ? p.max_tiles * WarpTile::heads * 2 : p.block_sums.item_floats) +
                       part * (is_max ? 2 : 1) * WarpTile::part_heads;
    }
    sum = has_tokens ? __ldcg(from + tile * (WarpTile::heads * tile_blocks / 4)) : float4{};
    x = (threadIdx.x % 8 < 4 ? has_tokens : has_halo) ? __ldcg(exponent_from + tile * exponent_step) : -INFINITY;
  }
  // Partial score of the block and heads of this lane. The sums of the first 16 heads are loaded.
  __device__ __forceinline__ float partial_of(float4 sum, float x, int tile) const {
    PartialBlockScore partial_score;
    partial_score.add(sum, probability_or_zero(x, normaliser));
    if constexpr (!WarpTile::tuned) {
#pragma unroll 1
      for (int round = 1; round * WarpTile::part_heads < p.shape.heads_per_group; ++round) {
        load_tile(tile, sum, x, round);
        partial_score.add(sum, probability_or_zero(x, normalisers[round * WarpTile::part_heads]));
      }
    }
    return partial_score.score();
  }
};

}  // namespace nsa::gpu
