#pragma once
// Blocks scored from the sums that the walk left by tile of 8 blocks (attention/block_sums.cuh): of a tile a lane takes
// one block and four heads, 16 bytes, neighbours side by side; the weights and what lies in front of the tile are one
// exponential a lane, which lanes pass on by shuffles. No shared memory, no meeting.

#include "kernels/cuda/decode/fused/raw_scores.cuh"

namespace nsa::gpu {

template <class E, int W>
struct SumScores {
  using Layout = StepLayout<E, W>;
  static constexpr int fours = E::heads / 4;  ///< of heads
  static constexpr int twin = 8;              ///< score_few(): lanes apart of those that have the same block
  static_assert(fours == 4 || fours == 1);
  const StepParams& p;
  int tiles_begun, tiles_fronted;  // tiles below have a token; one in front of them, the first tile aside
  int tile_of_lane;                // engines of 4 heads: a warp has its tiles at once, of 8 lanes each (few: 16)
  const float4* sums;              // of this lane's block and heads in tile 0
  const float* other;              // what this lane takes the exponential of: m of a head, or the score in front
  int other_step;
  float2 normaliser;

  // Of up to four tiles.
  struct Loaded {
    float4 sums[fours];
    float other[fours];
  };
  Loaded next;

  __device__ __forceinline__ SumScores(const StepParams& params, const StepPlace& at, bool few) : p(params) {
    const int lane = threadIdx.x % 32, block = lane % 8, four = fours == 4 ? lane / 8 : 0, head = four * 4 + lane % 4;
    tiles_begun = (at.n + tile_rows - 1) / tile_rows;
    tiles_fronted = at.n / tile_rows + 1;
    tile_of_lane = fours == 4 ? 0 : few ? lane / 16 : lane / 8;
    sums = reinterpret_cast<const float4*>(p.sums.sums(at.list, 0)) + four * tile_blocks + block;
    const auto* maxima = reinterpret_cast<const float*>(p.leaves + at.list * p.most_tiles * E::heads);
    other = block < 4 ? maxima + head * 2 : p.sums.fronts(at.list, 0) + head;
    other_step = block < 4 ? 2 * E::heads : E::heads;
  }

  /// Asks for what the first piece is scored from, which needs no normalisers.
  __device__ __forceinline__ void ask(int begin, bool few) {
#pragma unroll
    for (int i = 0; i < fours; ++i)
      if (i < 2 || !few) load_tile(begin / tile_blocks + tile_of_lane + i, next.sums[i], next.other[i]);
  }
  __device__ __forceinline__ void start(int, const char* shared) {
    const int head = (fours == 4 ? threadIdx.x % 32 / 8 * 4 : 0) + threadIdx.x % 4;
    normaliser = reinterpret_cast<const float2*>(shared + Layout::normalisers_at(p.shape))[head];
  }
  /// Of block b0 + lane, if it is below `end`; pieces by rising block.
  __device__ __forceinline__ float score(int b0, int end) {
    const Loaded now = next;
    if (b0 + p.piece < end) ask(b0 + p.piece, false);
    float part[fours];
#pragma unroll
    for (int i = 0; i < fours; ++i) part[i] = part_of(now.sums[i], now.other[i]);
    if constexpr (fours == 1)
      return part[0];
    else
      return over_places(part);
  }

  /// Of block `begin` + few_block().
  static __device__ __forceinline__ int few_block() { return threadIdx.x % 32 / 16 * tile_blocks + threadIdx.x % 8; }
  __device__ __forceinline__ float score_few(int, int) {
    const float first = part_of(next.sums[0], next.other[0]);
    if constexpr (fours == 1) {
      return first;
    } else {
      const float sum = across(first, part_of(next.sums[1], next.other[1]), 16);
      return __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, 8));
    }
  }

 private:
  // What is not there is no probability.
  __device__ __forceinline__ void load_tile(int tile, float4& sum, float& x) const {
    const bool begun = tile < tiles_begun;
    const bool fronted = tile < tiles_fronted && tile > 0;
    sum = begun ? __ldcg(sums + tile * (E::heads * tile_blocks / 4)) : float4{};
    x = (threadIdx.x % 8 < 4 ? begun : fronted) ? __ldcg(other + tile * other_step) : -INFINITY;
  }
  // Of this lane's block and heads.
  __device__ __forceinline__ float part_of(float4 sum, float x) const {
    BlockPart part;
    part.add(sum, share_if_any(x, normaliser));
    return part.score();
  }
};

}  // namespace nsa::gpu
