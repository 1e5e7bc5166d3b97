#pragma once
// Blocks scored and chosen by the cluster of a list: the sums of tiles to lanes to normalisers by every CTA for itself,
// then a warp takes 128 tokens at a time, adds its blocks' scores up and keeps the best 16 in order in its lanes. The
// warps' best meet in the CTA, the CTAs' in every CTA.

#include "kernels/cuda/scoring.cuh"
#include "kernels/cuda/step_walk.cuh"

namespace nsa::gpu {

/// Who a thread is.
struct StepPlace {
  int list, row, group, head0, present;  // present: heads of the group
  int t, n, eligible;                    // position, compressed tokens, blocks that begin at or before it
  int cta, warp, among, warps;           // cta: in the cluster; among: this warp in the cluster; warps: there
};

/// All threads of the list.
__device__ __forceinline__ void meet(const StepParams& p) {
  if (p.cluster > 1)
    cluster_barrier();
  else
    __syncthreads();
}

/// The lists of 16 that a warp has, one in every half, from a run that rises and falls to one that falls.
__device__ __forceinline__ Entry fallen(Entry mine) {
  const unsigned lane = threadIdx.x % 32;
#pragma unroll
  for (unsigned step = 8; step > 0; step /= 2) {
    const Entry other = __shfl_xor_sync(0xffffffffu, mine, step);
    mine = (other > mine) == ((lane & step) == 0) ? other : mine;
  }
  return mine;
}
/// The best 16 of a and b, half by half; each falls.
__device__ __forceinline__ Entry better_of(Entry a, Entry b) {
  const Entry turned = __shfl_xor_sync(0xffffffffu, b, 15);
  return fallen(a > turned ? a : turned);
}
/// The best 16 of up to 16 lists of 16 in shared memory, in both halves. All lanes.
__device__ __forceinline__ Entry best_of_lists(const Entry* lists, int count) {
  const int half = threadIdx.x % 32 / 16, lane = threadIdx.x % 16;
  const auto pair = [&](int first) {
    const int a = first + half * 2, b = a + 1;
    const Entry x = a < count ? lists[a * most_chosen + lane] : 0,
                y = b < count ? lists[b * most_chosen + 15 - lane] : 0;
    return fallen(x > y ? x : y);
  };
  Entry best = pair(0);
  if (count > 4) best = better_of(best, pair(4));
  if (count > 8) best = better_of(best, better_of(pair(8), pair(12)));
  const Entry other = __shfl_xor_sync(0xffffffffu, best, 31);
  return fallen(best > other ? best : other);
}

template <class E, int W>
struct StepRank {
  using Layout = StepLayout<E, W>;
  static constexpr int threads = 32 * W;
  const StepParams& p;
  const StepPlace& at;
  char* shared;

  __device__ __forceinline__ float2* lanes() const { return reinterpret_cast<float2*>(shared + Layout::lanes_at()); }
  __device__ __forceinline__ float2* normalisers() const {
    return reinterpret_cast<float2*>(shared + Layout::normalisers_at(p.shape));
  }
  __device__ __forceinline__ float* overlaps() const {
    return reinterpret_cast<float*>(shared + Layout::overlaps_at(p.shape));
  }
  __device__ __forceinline__ Entry* warp_lists() const { return reinterpret_cast<Entry*>(shared + Layout::rank); }
  __device__ __forceinline__ Entry* lists() const { return reinterpret_cast<Entry*>(shared + Layout::lists); }
  __device__ __forceinline__ int ratio() const { return p.shape.rules.l_sel / p.shape.rules.d; }
  __device__ __forceinline__ int lead() const { return (p.shape.rules.l - 1) / p.shape.rules.d; }

  // What needs no position: overlaps of a block far from the start.
  __device__ __forceinline__ void prepare() const {
    const BlockRules& r = p.shape.rules;
    for (int k = threadIdx.x; k < ratio() + lead(); k += threads) {
      const int begin = (k - lead()) * r.d;  // relative to the block
      overlaps()[k] = static_cast<float>(min(begin + r.l, r.l_sel) - max(begin, 0)) / static_cast<float>(r.d);
    }
  }

  // Lanes of the tiles' sums: each by rising leaf, a leaf by rising tile. Two lanes a thread, four leaves of each and
  // two tiles of those asked for at once. What is not there changes no sum.
  __device__ __forceinline__ void merge_lanes(int tiles, int per_leaf) const {
    const float2* sums = p.leaves + at.list * p.most_tiles * E::heads;
    const int leaves = per_leaf == 2 ? tiles / 2 : tiles / per_leaf, count = p.shape.lanes, items = count * E::heads;
#pragma unroll 1
    for (int item0 = threadIdx.x; item0 < items; item0 += 2 * threads) {
      Sum2 sum[2];
#pragma unroll 1
      for (int i0 = 0; i0 < leaves; i0 += 4 * count) {
        Sum2 leaf[4][2];
#pragma unroll 1
        for (int tile0 = 0; tile0 < per_leaf; tile0 += 2) {
          float2 x[4][2][2];
#pragma unroll
          for (int b = 0; b < 4; ++b) {
            if (i0 + b * count >= leaves) break;
#pragma unroll
            for (int a = 0; a < 2; ++a) {
              const int item = item0 + a * threads, i = i0 + b * count + item / E::heads;
              const float2* from = sums + (i * per_leaf + tile0) * E::heads + item % E::heads;
              const bool here = item < items && i < leaves;
              x[b][a][0] = here ? __ldcg(from) : make_float2(lowest, 0.0f);
              x[b][a][1] = here && tile0 + 1 < per_leaf ? __ldcg(from + E::heads) : make_float2(lowest, 0.0f);
            }
          }
#pragma unroll
          for (int b = 0; b < 4; ++b) {
            if (i0 + b * count >= leaves) break;
#pragma unroll
            for (int a = 0; a < 2; ++a) {
              const Sum2 one = {x[b][a][0].x, x[b][a][0].y}, two = {x[b][a][1].x, x[b][a][1].y};
              leaf[b][a] = merge2(tile0 == 0 ? one : merge2(leaf[b][a], one), two);
            }
          }
        }
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          if (i0 + b * count >= leaves) break;
#pragma unroll
          for (int a = 0; a < 2; ++a) sum[a] = merge2(sum[a], leaf[b][a]);
        }
      }
#pragma unroll
      for (int a = 0; a < 2; ++a)
        if (item0 + a * threads < items) lanes()[item0 + a * threads] = natural(sum[a]);
    }
  }

  __device__ __forceinline__ void normalise() const {
    constexpr int each = (E::heads + W - 1) / W;
    float2 by[each];
    normalisers_of(
        p.shape.lanes,
        [&](int x, int i) {
          const int h = at.warp + i * W;
          return h < E::heads ? lanes()[x * E::heads + h] : make_float2(-INFINITY, 0.0f);
        },
        by);
#pragma unroll
    for (int i = 0; i < each; ++i)
      if (threadIdx.x % 32 == 0 && at.warp + i * W < E::heads) normalisers()[at.warp + i * W] = by[i];
  }

  // Of four tokens of a lane the raw scores of all heads: asked for a round ahead.
  struct Scores {
    float4 of[E::heads];
  };
  __device__ __forceinline__ bool is_token(int i) const { return i >= 0 && i < at.n; }
  __device__ __forceinline__ const float* raw(int token) const { return p.scores + at.head0 * p.pitch + token; }
  __device__ __forceinline__ void load(int i, Scores& to) const {
    if (!is_token(i)) return;
#pragma unroll
    for (int h = 0; h < E::heads; ++h)
      if (h < at.present) to.of[h] = __ldcg(reinterpret_cast<const float4*>(raw(i) + h * p.pitch));
  }
  // Probability of one token, a lane a head, heads added up by rising index. All lanes.
  __device__ __forceinline__ float probability(int token) const {
    const int lane = threadIdx.x % 32;
    const float2 by = lane < at.present ? normalisers()[lane] : float2{};
    float x = 0.0f, sum = 0.0f;
    if (lane < at.present && is_token(token)) x = exp2_fast(__ldcg(raw(token) + lane * p.pitch) - by.x);
    for (int h = 0; h < at.present; ++h)
      sum = __fmaf_rn(__shfl_sync(0xffffffffu, x, h), __shfl_sync(0xffffffffu, by.y, h), sum);
    return is_token(token) ? sum : 0.0f;
  }

  // The best 16 of the blocks that are this warp's, in its first half: a run of pieces. A lane adds up a block; the
  // tokens in front of a piece are the last of the one before.
  __device__ __forceinline__ Entry score(int pieces) const {
    const BlockRules& r = p.shape.rules;
    const int lane = threadIdx.x % 32, ratio = this->ratio(), lead = this->lead(), local = at.eligible - r.n_local;
    const int run = p.by_warps(pieces + at.warps - 1) * p.piece, begin = at.among * run;
    const int end = min(begin + run, at.eligible);
    float* terms = reinterpret_cast<float*>(shared + Layout::terms_at(p.shape)) +
                   at.warp * (most_lead + scored_tokens) + most_lead;  // of the piece's first token
    float* p_slc = p.p_slc ? p.p_slc + at.list * p.p_slc_blocks : nullptr;
    Entry best = 0;
    if (begin >= end) return best;
    Scores scores{};
    load(begin * ratio + lane * 4, scores);
    for (int k = 1; k <= lead; ++k) {
      const float before = probability(begin * ratio - k);
      if (lane == 0) terms[-k] = before;
    }
#pragma unroll 1
    for (int b0 = begin; b0 < end; b0 += p.piece) {
      const int i = b0 * ratio + lane * 4;
      float4 sum = {};
#pragma unroll
      for (int h = 0; h < E::heads; ++h)
        if (h < at.present) add_probabilities(sum, scores.of[h], normalisers()[h]);
      if (b0 + p.piece < end) load(i + p.piece * ratio, scores);
      if (b0 > begin && lane < lead) terms[-1 - lane] = terms[p.piece * ratio - 1 - lane];
      __syncwarp();
      const auto kept = [&](int e, float x) { return is_token(i + e) ? x : 0.0f; };
      reinterpret_cast<float4*>(terms)[lane] = {kept(0, sum.x), kept(1, sum.y), kept(2, sum.z), kept(3, sum.w)};
      __syncwarp();
      const int j = b0 + lane;
      Entry mine = 0;
      if (lane < p.piece && j < end) {
        const float score = block_score(terms + lane * ratio - lead, overlaps(), ratio + lead);
        mine = entry_of(key_of(j < r.n_init || j >= local, score), j);
        if (p_slc && j < p.p_slc_blocks) p_slc[j] = score;
      }
      mine = warp_sorted(mine);
      best = b0 == begin ? mine : better_of(best, mine);
      __syncwarp();
    }
    return best;
  }

  // The blocks chosen, from the best down, lane by lane; -1: none. All threads of the cluster, whose tiles are written.
  __device__ __forceinline__ int choose(int tiles, int per_leaf) const {
    const int lane = threadIdx.x % 32;
    meet(p);
    merge_lanes(tiles, per_leaf);
    __syncthreads();
    normalise();
    __syncthreads();
    const int pieces = p.by_piece(at.eligible + p.piece - 1);
    const Entry mine = score(pieces);
    if (lane < most_chosen) warp_lists()[at.warp * most_chosen + lane] = mine;
    __syncthreads();
    // No more lists than pieces.
    const int of_cta = min(W, p.by_cluster(max(0, pieces - at.cta) + p.cluster - 1));
    Entry best;
    if (W < step_warps || p.cluster == 1) {
      best = best_of_lists(warp_lists(), of_cta);
    } else {
      if (at.warp == 0) {
        const Entry ours = best_of_lists(warp_lists(), of_cta);
        for (int to = lane / 16; to < p.cluster; to += 2) in_cta(lists(), to)[at.cta * most_chosen + lane % 16] = ours;
        __syncwarp();
      }
      cluster_barrier();
      best = best_of_lists(lists(), p.cluster);
    }
    if (p.p_slc)  // zero where no block is eligible
      for (std::int64_t j = at.eligible + at.cta * threads + threadIdx.x; j < p.p_slc_blocks; j += p.cluster * threads)
        p.p_slc[at.list * p.p_slc_blocks + j] = 0.0f;
    return lane < p.shape.rules.n_sel && lane < most_chosen && best != 0 ? block_of(best) : -1;
  }
};

}  // namespace nsa::gpu
