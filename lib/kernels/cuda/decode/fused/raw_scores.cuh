#pragma once
// How a warp of the step that scores blocks gets at their scores: from raw scores of the tokens, or from the sums of
// blocks that the walk left by tile (attention/block_sums.cuh). Both take a piece of 32 blocks (or fewer) at a time, a
// lane each; or once 16, which two lanes have then.

#include "kernels/cuda/attention/block_scores.cuh"
#include "kernels/cuda/decode/fused/tile_stream.cuh"

namespace nsa::gpu {

/// Who a thread is.
struct StepPlace {
  int list, row, group, head0, present;  // present: heads of the group
  int t, n, eligible;                    // position, compressed tokens, blocks that begin at or before it
  int cta, warp, among, warps;           // cta: in the cluster; among: this warp in the cluster; warps: there
  int scorers, rankers;                  // warps that score blocks, the first ones, in the cluster and in this CTA
};

/// From raw scores: tokens' probabilities to the warp's terms in shared memory, a lane then adds up its block's.
template <class E, int W>
struct RawScores {
  using Layout = StepLayout<E, W>;
  static constexpr int twin = 16;  ///< score_few(): lanes apart of those that have the same block
  const StepParams& p;
  const StepPlace& at;
  char* shared = nullptr;

  template <int V>
  struct Scores {
    float of[E::heads][V];
  };
  Scores<4> scores = {};
  bool first = true, is_few;

  __device__ __forceinline__ RawScores(const StepParams& params, const StepPlace& place, bool few)
      : p(params), at(place), is_few(few) {}

  /// Nothing is asked for in front of the normalisers: it would take too many registers.
  __device__ __forceinline__ void ask(int, bool) {}
  __device__ __forceinline__ void start(int begin, char* memory) {
    shared = memory;
    if (!is_few) put_first(begin, scores);
  }
  /// Of block b0 + lane, if it is below `end`; pieces by rising block.
  __device__ __forceinline__ float score(int b0, int end) {
    const int lane = threadIdx.x % 32, i = b0 * p.ratio + lane * 4;
    if (!first && lane < p.lead) terms()[-1 - lane] = terms()[p.piece * p.ratio - 1 - lane];
    first = false;
    __syncwarp();
    put_probabilities(scores, i, terms() + lane * 4);
    if (b0 + p.piece < end) load(i + p.piece * p.ratio, scores);
    __syncwarp();
    const float mine = lane < p.piece && b0 + lane < end ? sum_at(lane * p.ratio) : 0.0f;
    __syncwarp();
    return mine;
  }
  /// Of block `begin` + few_block(), two tokens a lane.
  static __device__ __forceinline__ int few_block() { return threadIdx.x % 16; }
  __device__ __forceinline__ float score_few(int begin, int end) const {
    const int lane = threadIdx.x % 32;
    Scores<2> few{};
    put_first(begin, few);
    put_probabilities(few, begin * p.ratio + lane * 2, terms() + lane * 2);
    __syncwarp();
    return few_block() < p.few && begin + few_block() < end ? sum_at(few_block() * p.ratio) : 0.0f;
  }

 private:
  __device__ __forceinline__ float2* normalisers() const {
    return reinterpret_cast<float2*>(shared + Layout::normalisers_at(p.shape));
  }
  __device__ __forceinline__ bool is_token(int i) const { return i >= 0 && i < at.n; }
  template <int V>
  __device__ __forceinline__ void load(int i, Scores<V>& to) const {
    if (!is_token(i)) return;
    const float* from = p.scores + at.head0 * p.pitch + i;
    const int pitch = static_cast<int>(p.pitch);
#pragma unroll
    for (int h = 0; h < E::heads; ++h) {
      const float* row = from + (h < at.present ? h : 0) * pitch;
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
  // Their probabilities, heads added up by rising index, to `terms`; 0 where there is no token.
  template <int V>
  __device__ __forceinline__ void put_probabilities(const Scores<V>& scores, int i, float* to) const {
    float sum[V] = {};
#pragma unroll
    for (int h = 0; h < E::heads; h += 2) {
      const float4 by = *reinterpret_cast<const float4*>(normalisers() + h);  // of two heads
#pragma unroll
      for (int e = 0; e < V; ++e) {
        sum[e] = __fmaf_rn(exp2_fast(scores.of[h][e] - by.x), by.y, sum[e]);
        sum[e] = __fmaf_rn(exp2_fast(scores.of[h + 1][e] - by.z), by.w, sum[e]);
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
  // The warp's: of its piece's first token; those of the tokens in front come before it.
  __device__ __forceinline__ float* terms() const {
    return reinterpret_cast<float*>(shared + Layout::terms_at(p.shape)) + at.warp * (most_lead + scored_tokens) +
           most_lead;
  }
  // The terms in front of block `begin`, a lane each, and of the V tokens of a lane of its piece.
  template <int V>
  __device__ __forceinline__ void put_first(int begin, Scores<V>& scores) const {
    const int lane = threadIdx.x % 32, i = begin * p.ratio, before = i - 1 - lane;
    Scores<1> in_front{};
    load(i + lane * V, scores);
    if (lane < p.lead) {
      load(before, in_front);
      put_probabilities(in_front, before, terms() - 1 - lane);
    }
  }
  // Of the block whose terms begin at the k-th of the piece's.
  __device__ __forceinline__ float sum_at(int k) const {
    const auto* overlaps = reinterpret_cast<const float*>(shared + Layout::overlaps_at(p.shape));
    return block_score(terms() + k - p.lead, overlaps, p.ratio + p.lead);
  }
};

}  // namespace nsa::gpu
