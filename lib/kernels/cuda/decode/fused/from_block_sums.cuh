#pragma once
// Block scores from the sums that the KV mainloop stored by tile of 8 blocks (attention/block_sums.cuh). A lane takes
// one block and four heads of a tile, 16 bytes next to its neighbours'. Scales and halo probabilities take one
// exponential a lane, distributed by shuffles. No shared memory, no barrier.

#include "kernels/cuda/decode/fused/from_raw_scores.cuh"

namespace nsa::gpu {

template <class WarpTile, int W>
struct ScoresFromBlockSums {
  using SharedLayout = FusedSharedLayout<WarpTile, W>;
  static constexpr int head_quads = WarpTile::heads / 4;  ///< groups of four heads
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

  // Loads of up to four tiles.
  struct Loaded {
    float4 sums[head_quads];
    float exponent[head_quads];
  };
  Loaded next;

  __device__ __forceinline__ ScoresFromBlockSums(const FusedDecodeParams& params, const FusedCoord& at,
                                                 bool single_pass)
      : p(params) {
    const int lane = threadIdx.x % 32, block = lane % 8, head_quad = head_quads == 4 ? lane / 8 : 0,
              head = head_quad * 4 + lane % 4;
    token_tiles = (at.n + tile_rows - 1) / tile_rows;
    halo_tiles = at.n / tile_rows + 1;
    tile_of_lane = head_quads == 4 ? 0 : single_pass ? lane / 16 : lane / 8;
    sums = reinterpret_cast<const float4*>(p.block_sums.sums(at.work_item, 0)) + head_quad * tile_blocks + block;
    const auto* maxima = reinterpret_cast<const float*>(p.tile_lse + at.work_item * p.max_tiles * WarpTile::heads);
    exponent = block < 4 ? maxima + head * 2 : p.block_sums.halo_scores(at.work_item, 0) + head;
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
    normaliser = reinterpret_cast<const float2*>(shared + SharedLayout::normalisers_at(p.shape))[head];
  }
  /// Score of block b0 + lane if it is below `end`. Rounds come by rising block.
  __device__ __forceinline__ float score(int b0, int end) {
    const Loaded loaded = next;
    if (b0 + p.round_blocks < end) prefetch(b0 + p.round_blocks, false);
    float partials[head_quads];
#pragma unroll
    for (int i = 0; i < head_quads; ++i) partials[i] = partial_of(loaded.sums[i], loaded.exponent[i]);
    if constexpr (head_quads == 1)
      return partials[0];
    else
      return reduce_over_heads(partials);
  }

  /// Score of block `begin` + single_pass_block().
  static __device__ __forceinline__ int single_pass_block() {
    return threadIdx.x % 32 / 16 * tile_blocks + threadIdx.x % 8;
  }
  __device__ __forceinline__ float score_single_pass(int, int) {
    const float first = partial_of(next.sums[0], next.exponent[0]);
    if constexpr (head_quads == 1) {
      return first;
    } else {
      const float sum = reduce_across(first, partial_of(next.sums[1], next.exponent[1]), 16);
      return __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, 8));
    }
  }

 private:
  // Absent scores become -inf, whose probability is 0.
  __device__ __forceinline__ void load_tile(int tile, float4& sum, float& x) const {
    const bool has_tokens = tile < token_tiles;
    const bool has_halo = tile < halo_tiles && tile >= first_halo_tile;
    sum = has_tokens ? __ldcg(sums + tile * (WarpTile::heads * tile_blocks / 4)) : float4{};
    x = (threadIdx.x % 8 < 4 ? has_tokens : has_halo) ? __ldcg(exponent + tile * exponent_step) : -INFINITY;
  }
  // Partial score of the block and heads of this lane.
  __device__ __forceinline__ float partial_of(float4 sum, float x) const {
    PartialBlockScore partial_score;
    partial_score.add(sum, probability_or_zero(x, normaliser));
    return partial_score.score();
  }
};

}  // namespace nsa::gpu
