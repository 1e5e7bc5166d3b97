#pragma once
// Block scores of a scoring warp from the raw scores of tokens. ScoresFromRaw and ScoresFromBlockSums
// (decode/fused/from_block_sums.cuh) have the same interface: rounds of up to 32 blocks, one a lane; or a single pass
// of up to 16 blocks, each in two lanes.

#include "kernels/cuda/attention/block_scores.cuh"
#include "kernels/cuda/decode/fused/tile_pipeline.cuh"

namespace nsa::gpu {

/// Coordinates of a thread in the launch.
struct FusedCoord {
  int work_item, row, group, group_head;  // group_head: first head of the group
  // The head tile of the CTA, one of those of the work item; its (work item, head tile), heads, and the CTA's index
  // among its CTAs.
  int head_tile, tile_item, first_head, valid_heads, tile_cta;
  int t, n, eligible;                             // position, compressed tokens, blocks that begin at or before it
  int cta, warp, warp_in_cluster, cluster_warps;  // cta: in the cluster; warp: in the CTA
  int scoring_warps, cta_scoring_warps;  // warps that score blocks, the first ones: of the cluster, of this CTA
};

/// The probabilities of tokens go to the terms of the warp in shared memory; then each lane sums those of its block.
template <class WarpTile, int W>
struct ScoresFromRaw {
  using SharedLayout = FusedSharedLayout<WarpTile, W>;
  static constexpr int duplicate_stride = 16;  ///< score_single_pass(): lanes so far apart have the same block
  const FusedDecodeParams& p;
  const FusedCoord& at;
  char* shared = nullptr;

  static constexpr int heads = WarpTile::part_heads;  ///< loaded together
  template <int V>
  struct Scores {
    float of[heads][V];
  };
  Scores<4> scores = {};
  bool first = true, single_pass;

  __device__ __forceinline__ ScoresFromRaw(const FusedDecodeParams& params, const FusedCoord& coord,
                                           bool is_single_pass)
      : p(params), at(coord), single_pass(is_single_pass) {}

  /// Loads nothing before the normalisers are known: that would take too many registers.
  __device__ __forceinline__ void prefetch(int, bool) {}
  __device__ __forceinline__ void start(int begin, char* memory) {
    shared = memory;
    if (!single_pass) store_halo_terms(begin, scores);
  }
  /// Score of block b0 + lane if it is below `end`. Rounds come by rising block.
  __device__ __forceinline__ float score(int b0, int end) {
    const int lane = threadIdx.x % 32, i = b0 * p.tokens_per_block + lane * 4;
    if (!first && lane < p.halo_tokens) terms()[-1 - lane] = terms()[p.round_blocks * p.tokens_per_block - 1 - lane];
    first = false;
    __syncwarp();
    store_probabilities(scores, i, terms() + lane * 4);
    if (b0 + p.round_blocks < end) load(i + p.round_blocks * p.tokens_per_block, scores);
    __syncwarp();
    const float sum = lane < p.round_blocks && b0 + lane < end ? sum_at(lane * p.tokens_per_block) : 0.0f;
    __syncwarp();
    return sum;
  }
  /// Score of block `begin` + single_pass_block(), two tokens a lane.
  static __device__ __forceinline__ int single_pass_block() { return threadIdx.x % 16; }
  __device__ __forceinline__ float score_single_pass(int begin, int end) const {
    const int lane = threadIdx.x % 32;
    Scores<2> pairs{};
    store_halo_terms(begin, pairs);
    store_probabilities(pairs, begin * p.tokens_per_block + lane * 2, terms() + lane * 2);
    __syncwarp();
    return single_pass_block() < p.single_pass_blocks && begin + single_pass_block() < end
               ? sum_at(single_pass_block() * p.tokens_per_block)
               : 0.0f;
  }

 private:
  __device__ __forceinline__ float2* normalisers() const {
    return reinterpret_cast<float2*>(shared + SharedLayout::normalisers_at(p.shape));
  }
  __device__ __forceinline__ bool is_token(int i) const { return i >= 0 && i < at.n; }
  // Heads of the group from `first` on.
  template <int V>
  __device__ __forceinline__ void load(int i, Scores<V>& to, int first = 0) const {
    if (!is_token(i)) return;
    const float* from = p.scores + (at.group_head + first) * p.pitch + i;
    const int pitch = static_cast<int>(p.pitch), valid_heads = p.shape.heads_per_group - first;
#pragma unroll
    for (int h = 0; h < heads; ++h) {
      const float* row = from + (h < valid_heads ? h : 0) * pitch;
      if constexpr (V == 4) {
        const float4 x = __ldcg(reinterpret_cast<const float4*>(row));
        to.of[h][0] = x.x, to.of[h][1] = x.y, to.of[h][2] = x.z, to.of[h][3] = x.w;
      } else if constexpr (V == 2) {
        const float2 x = __ldcg(reinterpret_cast<const float2*>(row));
        to.of[h][0] = x.x, to.of[h][1] = x.y;
      } else {
        to.of[h][0] = __ldcg(row);
      }
    }
  }
  // Adds the probabilities of V tokens, heads by rising index.
  template <int V>
  __device__ __forceinline__ void add_heads(const Scores<V>& scores, int first, float (&sum)[V]) const {
#pragma unroll
    for (int h = 0; h < heads; h += 2) {
      const float4 normaliser = *reinterpret_cast<const float4*>(normalisers() + first + h);  // of two heads
#pragma unroll
      for (int e = 0; e < V; ++e) {
        sum[e] = __fmaf_rn(exp2_fast(scores.of[h][e] - normaliser.x), normaliser.y, sum[e]);
        sum[e] = __fmaf_rn(exp2_fast(scores.of[h + 1][e] - normaliser.z), normaliser.w, sum[e]);
      }
    }
  }
  // Stores the probabilities of V tokens, whose scores of the first heads are loaded; 0 where there is no token.
  template <int V>
  __device__ __forceinline__ void store_probabilities(const Scores<V>& scores, int i, float* to) const {
    float sum[V] = {};
    add_heads(scores, 0, sum);
    if constexpr (!WarpTile::tuned) {
#pragma unroll 1
      for (int first = heads; first < p.shape.heads_per_group; first += heads) {
        Scores<V> more{};
        load(i, more, first);
        add_heads(more, first, sum);
      }
    }
#pragma unroll
    for (int e = 0; e < V; ++e)
      if (!is_token(i + e)) sum[e] = 0.0f;
    if constexpr (V == 4)
      *reinterpret_cast<float4*>(to) = {sum[0], sum[1], sum[2], sum[3]};
    else if constexpr (V == 2)
      *reinterpret_cast<float2*>(to) = {sum[0], sum[1]};
    else
      *to = sum[0];
  }
  // Terms of the warp, from the first token of its round on; those of the halo tokens precede it.
  __device__ __forceinline__ float* terms() const {
    return reinterpret_cast<float*>(shared + SharedLayout::terms_at(p.shape)) +
           at.warp * (max_halo_tokens + round_tokens) + max_halo_tokens;
  }
  // Stores the halo terms of block `begin`, one a lane, and loads the scores of the V tokens of a lane.
  template <int V>
  __device__ __forceinline__ void store_halo_terms(int begin, Scores<V>& scores) const {
    const int lane = threadIdx.x % 32, i = begin * p.tokens_per_block, halo_token = i - 1 - lane;
    Scores<1> halo_scores{};
    load(i + lane * V, scores);
    if (lane < p.halo_tokens) {
      load(halo_token, halo_scores);
      store_probabilities(halo_scores, halo_token, terms() - 1 - lane);
    }
  }
  // Score of the block whose own terms begin at term k of the round.
  __device__ __forceinline__ float sum_at(int k) const {
    const auto* overlaps = reinterpret_cast<const float*>(shared + SharedLayout::overlaps_at(p.shape));
    return block_score(terms() + k - p.halo_tokens, overlaps, p.tokens_per_block + p.halo_tokens);
  }
};

}  // namespace nsa::gpu
