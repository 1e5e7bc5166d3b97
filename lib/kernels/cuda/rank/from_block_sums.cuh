#pragma once
// A CTA of rank scores its slice from the sums that the walk of a sharded step left (attention/block_sums.cuh), 10
// floats of 32 a tile and head: of a tile a lane has one block and four heads, 16 bytes, neighbours side by side. Small
// slices: a warp a tile. Others: a warp four tiles at a time, so that every lane has a block's score then, and the warp
// keeps the best 16 in order. Warps wait for nothing before their keys or lists meet.

#include "kernels/cuda/rank/block_slices.cuh"

namespace nsa::gpu {

// A lane's place in a warp's four tiles.
struct SumReader {
  const float4* sums;  // of this rank's tile 0
  const float* other;  // m of a head, or the score in front: what the lane takes the exponential of
  int heads, n;        // of the engine; tokens
  bool there, first_half;
  float2 normaliser;

  __device__ __forceinline__ SumReader(const RankParams& p, int list, int tokens, const float2* normalisers)
      : heads(p.sums.heads), n(tokens) {
    const int present = p.a.shape.heads_per_group, place = threadIdx.x % 32 / tile_blocks,
              block = threadIdx.x % tile_blocks, head = place * 4 + block % 4;
    const int tiles_of_heads = (present + heads - 1) / heads, at = heads == 4 ? 0 : place,
              of = list * tiles_of_heads + (heads == 4 ? min(place, tiles_of_heads - 1) : 0);
    there = place * 4 < present, first_half = block < 4;
    sums = reinterpret_cast<const float4*>(p.sums.sums(of, 0)) + at * tile_blocks + block;
    other = (first_half ? p.sums.maxima(of, 0) : p.sums.fronts(of, 0)) + at * 4 + block % 4;
    normaliser = head < present ? normalisers[head] : make_float2(INFINITY, 0.0f);
  }

  struct Loaded {
    float4 sums;
    float other;
  };
  // Of a tile of this rank's whose first token would be `token`.
  __device__ __forceinline__ Loaded load(int tile, int token) const {
    const bool begun = there && token < n, fronted = there && token > 0 && token <= n;
    return {begun ? __ldcg(sums + tile * (heads * tile_blocks / 4)) : float4{},
            (first_half ? begun : fronted) ? __ldcg(other + tile * heads) : -INFINITY};
  }
  __device__ __forceinline__ float part_of(Loaded x) const {
    BlockPart part;
    part.add(x.sums, share_if_any(x.other, normaliser));
    return part.score();
  }

  // Of the (lane % 8)-th block of the tile whose first one is this rank's u-th, and block j.
  __device__ __forceinline__ float score_tile(int u, int j) const {
    return over_places(part_of(load(u / tile_blocks, j * block_tokens)));
  }
  // Of the lane's block of 32, which are this rank's from the u-th on; j: the lane's. All lanes.
  __device__ __forceinline__ float score(int u, int j) const {
    Loaded x[4];
    float parts[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      x[i] = load(u / tile_blocks + i, __shfl_sync(0xffffffffu, j, i * tile_blocks) * block_tokens);
#pragma unroll
    for (int i = 0; i < 4; ++i) parts[i] = part_of(x[i]);
    return over_places(parts);
  }
};

// What the choice makes of a score.
struct SliceOfSums {
  const RankParams& p;
  SumReader reader;
  float* p_slc;
  int local, begin, end;

  __device__ __forceinline__ SliceOfSums(const RankParams& params, std::int64_t row, std::int64_t g, std::int64_t t,
                                         int from, int to, const float2* normalisers)
      : p(params),
        reader(params, static_cast<int>(row * params.a.shape.groups + g),
               static_cast<int>(compressed_tokens(params.a.shape.rules, t)), normalisers),
        p_slc(p.a.p_slc ? p.a.p_slc + (row * p.a.shape.groups + g) * p.a.p_slc_blocks : nullptr),
        local(static_cast<int>(eligible_blocks(p.a.shape.rules, t)) - p.a.shape.rules.n_local),
        begin(from),
        end(to) {}

  // Of block j, the u-th held; 0 where that is none of the slice's.
  __device__ __forceinline__ Entry entry(int u, int j, float score) const {
    if (u >= end) return 0;
    if (p_slc && j < p.a.p_slc_blocks) p_slc[j] = score;
    return entry_of(key_of(j < p.a.shape.rules.n_init || j >= local, score), u);
  }
  // Of all blocks.
  __device__ __forceinline__ void put_entries(Entry* to) const {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int u = begin + static_cast<int>(threadIdx.x) / 32 * tile_blocks; u < end;
         u += static_cast<int>(blockDim.x) / 32 * tile_blocks) {
      const int j = block_at(p, u);
      const float score = reader.score_tile(u, j);
      if (lane < tile_blocks && u + lane < end) to[u + lane - begin] = entry(u + lane, j + lane, score);
    }
  }
  // The best 16 of this warp's, in order, in its first half; 0: none.
  __device__ __forceinline__ Entry best() const {
    const int lane = threadIdx.x % 32;
    Entry best = 0;
#pragma unroll 1
    for (int first = begin + static_cast<int>(threadIdx.x) - lane; first < end; first += static_cast<int>(blockDim.x)) {
      const int u = first + lane;
      // Behind `end` may be nobody's: no token is there.
      const int j = u < end ? block_at(p, u) : INT32_MAX / block_tokens;
      best = better_of(best, warp_sorted(entry(u, j, reader.score(first, j))));
    }
    return best;
  }
};

}  // namespace nsa::gpu
