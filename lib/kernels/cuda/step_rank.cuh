#pragma once
// Blocks scored and chosen by the cluster of a list: the sums of tiles to lanes to normalisers by every CTA for itself,
// then a warp takes 128 tokens at a time, adds its blocks' scores up and keeps the best 16 in order in its lanes; or,
// where warps are many, 64 tokens once. The warps' best meet in the CTA, the CTAs' in every CTA.

#include "kernels/cuda/scoring.cuh"
#include "kernels/cuda/step_walk.cuh"

namespace nsa::gpu {

/// Who a thread is.
struct StepPlace {
  int list, row, group, head0, present;  // present: heads of the group
  int t, n, eligible;                    // position, compressed tokens, blocks that begin at or before it
  int cta, warp, among, warps;           // cta: in the cluster; among: this warp in the cluster; warps: there
  int scorers, rankers;                  // warps that score blocks, the first ones, in the cluster and in this CTA
};

// cluster_arrive() of who has nothing to publish.
__device__ __forceinline__ void join_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
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
/// The best 16 of up to Most lists of 16 in shared memory, `apart` entries from one to the next, in both halves. All
/// lanes.
template <int Most>
__device__ __forceinline__ Entry best_of_lists(const Entry* lists, int count, int apart = most_chosen) {
  static_assert(Most == 4 || Most == 8);
  const int half = threadIdx.x % 32 / 16, lane = threadIdx.x % 16;
  const auto pair = [&](int first) {
    const int a = first + half * 2, b = a + 1;
    const Entry x = a < count ? lists[a * apart + lane] : 0, y = b < count ? lists[b * apart + 15 - lane] : 0;
    return fallen(x > y ? x : y);
  };
  Entry best = pair(0);
  if (Most > 4 && count > 4) best = better_of(best, pair(4));
  const Entry other = __shfl_xor_sync(0xffffffffu, best, 31);
  return fallen(best > other ? best : other);
}

template <class E, int W>
struct StepRank {
  using Layout = StepLayout<E, W>;
  const StepParams& p;
  const StepPlace& at;
  char* shared;

  // The CTA's warps that score. An mbarrier that every thread arrives at: of a named barrier that some of the warps
  // pass racecheck loses count (docs/kernels.md).
  __device__ __forceinline__ unsigned meeting() const { return shared_address(shared) + Layout::meeting; }
  __device__ __forceinline__ void meet() const {
    std::uint64_t phase;
    asm volatile("mbarrier.arrive.shared.b64 %0, [%1];" : "=l"(phase) : "r"(meeting()) : "memory");
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n.reg .pred met;\nAGAIN:\nmbarrier.try_wait.shared.b64 met, [%0], %1;\n@!met bra AGAIN;\n}" ::"r"(meeting()),
        "l"(phase)
        : "memory");
#else
    asm volatile("{\n.reg .pred met;\nAGAIN:\nmbarrier.test_wait.shared.b64 met, [%0], %1;\n@!met bra AGAIN;\n}" ::"r"(
                     meeting()),
                 "l"(phase)
                 : "memory");
#endif
  }
  __device__ __forceinline__ float2* lanes() const { return reinterpret_cast<float2*>(shared + Layout::lanes_at()); }
  __device__ __forceinline__ float2* normalisers() const {
    return reinterpret_cast<float2*>(shared + Layout::normalisers_at(p.shape));
  }
  __device__ __forceinline__ float* overlaps() const {
    return reinterpret_cast<float*>(shared + Layout::overlaps_at(p.shape));
  }
  __device__ __forceinline__ Entry* warp_lists() const { return reinterpret_cast<Entry*>(shared + Layout::rank); }
  __device__ __forceinline__ Entry* lists() const { return reinterpret_cast<Entry*>(shared + Layout::lists); }

  // What needs no position: the meeting; overlaps of a block far from the start; the CTAs' lists, of which not all may
  // come full.
  __device__ __forceinline__ void prepare() const {
    const BlockRules& r = p.shape.rules;
    if (threadIdx.x == 0 && at.rankers > 0)
      asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(meeting()), "r"(at.rankers * 32) : "memory");
    if (W == step_warps && static_cast<int>(threadIdx.x) < p.cluster * most_chosen) lists()[threadIdx.x] = 0;
#pragma unroll 1
    for (int k = threadIdx.x; k < p.ratio + p.lead; k += 32 * W) {
      const int begin = (k - p.lead) * r.d;  // relative to the block
      overlaps()[k] = static_cast<float>(min(begin + r.l, r.l_sel) - max(begin, 0)) / static_cast<float>(r.d);
    }
  }

  // Lanes of the tiles' sums: each by rising leaf, a leaf by rising tile. Two heads of a lane a thread, four leaves and
  // two tiles of those asked for at once. What is not there changes no sum.
  __device__ __forceinline__ void merge_lanes(int tiles, int per_leaf) const {
    constexpr int pairs = E::heads / 2;
    const float2* sums = p.leaves + at.list * p.most_tiles * E::heads;
    const int leaves = per_leaf == 2 ? tiles / 2 : tiles / per_leaf, count = p.shape.lanes;
#pragma unroll 1
    for (int item = threadIdx.x; item < count * pairs; item += at.rankers * 32) {
      const int lane = item / pairs;
      const float2* of_lane = sums + lane * per_leaf * E::heads + item % pairs * 2;
      Sum2 sum[2];
#pragma unroll 1
      for (int i0 = 0; i0 < leaves; i0 += 4 * count) {
        Sum2 leaf[4][2];
#pragma unroll 1
        for (int tile0 = 0; tile0 < per_leaf; tile0 += 2) {
          float4 x[4][2];
#pragma unroll
          for (int b = 0; b < 4; ++b) {
            const int i = i0 + b * count;  // of the leaf of lane 0
            const auto* from = reinterpret_cast<const float4*>(of_lane + (i * per_leaf + tile0) * E::heads);
            const float4 nothing = {lowest, 0.0f, lowest, 0.0f};
            x[b][0] = i + lane < leaves ? __ldcg(from) : nothing;
            x[b][1] = i + lane < leaves && tile0 + 1 < per_leaf ? __ldcg(from + pairs) : nothing;
          }
#pragma unroll
          for (int b = 0; b < 4; ++b)
#pragma unroll
            for (int a = 0; a < 2; ++a) {
              const Sum2 one = a == 0 ? Sum2{x[b][0].x, x[b][0].y} : Sum2{x[b][0].z, x[b][0].w},
                         two = a == 0 ? Sum2{x[b][1].x, x[b][1].y} : Sum2{x[b][1].z, x[b][1].w};
              leaf[b][a] = merge2(tile0 == 0 ? one : merge2(leaf[b][a], one), two);
            }
        }
#pragma unroll
        for (int b = 0; b < 4; ++b)
#pragma unroll
          for (int a = 0; a < 2; ++a) sum[a] = merge2(sum[a], leaf[b][a]);
      }
      const float2 first = natural(sum[0]), second = natural(sum[1]);
      reinterpret_cast<float4*>(lanes())[item] = {first.x, first.y, second.x, second.y};
    }
  }

  // normalisers_of() for eight threads a head, four lanes each: the same sums in the same tree. Heads there are none of
  // add nothing to a probability, whatever their scores.
  __device__ __forceinline__ void normalise() const {
#pragma unroll 1
    for (int item = threadIdx.x; item < E::heads * 8; item += at.rankers * 32) {
      const int head = item / 8, first = item % 8;
      const float2* from = lanes() + first * E::heads + head;
      MaxSum total[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 ms = first + i * 8 < p.shape.lanes ? from[i * 8 * E::heads] : make_float2(-INFINITY, 0.0f);
        total[i] = {ms.x, ms.y};
      }
#pragma unroll 1
      for (int x = 32; x < p.shape.lanes; x += 32)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (x + first + i * 8 < p.shape.lanes) add_lane(total[i], from[(x + i * 8) * E::heads]);
      float m = fmaxf(fmaxf(total[0].m, total[1].m), fmaxf(total[2].m, total[3].m));
#pragma unroll
      for (int step = 4; step > 0; step /= 2) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, step));
      float s[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) s[i] = __fmul_rn(total[i].s, exp_above(total[i].m, m));
      float sum = (s[0] + s[2]) + (s[1] + s[3]);  // 16 lanes apart, then 8
#pragma unroll
      for (int step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (first == 0)
        normalisers()[head] =
            head < at.present ? make_float2(m * log2_e, sum > 0.0f ? 1.0f / sum : 0.0f) : make_float2(INFINITY, 0.0f);
    }
  }

  // Of V tokens of a lane the raw scores of all heads.
  template <int V>
  struct Scores {
    float of[E::heads][V];
  };
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
  // The warp's terms: of its piece's first token; those of the tokens in front come before it.
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
  // Of block j, whose terms begin at the k-th of the piece's.
  __device__ __forceinline__ Entry scored(int j, int k) const {
    const BlockRules& r = p.shape.rules;
    const float score = block_score(terms() + k - p.lead, overlaps(), p.ratio + p.lead);
    if (p.p_slc && j < p.p_slc_blocks) p.p_slc[at.list * p.p_slc_blocks + j] = score;
    return entry_of(key_of(j < r.n_init || j >= at.eligible - r.n_local, score), j);
  }

  // The best 16 of the blocks that are this warp's, in its first half: a run of pieces. A lane adds up a block; the
  // tokens in front of a piece are the last of the one before.
  __device__ __forceinline__ Entry best_of_run(int pieces) const {
    const int lane = threadIdx.x % 32, run = p.by_scorers(pieces + at.scorers - 1) * p.piece, begin = at.among * run,
              end = min(begin + run, at.eligible);
    Entry best = 0;
    if (begin >= end) return best;
    Scores<4> scores{};
    put_first(begin, scores);
#pragma unroll 1
    for (int b0 = begin; b0 < end; b0 += p.piece) {
      const int i = b0 * p.ratio + lane * 4;
      if (b0 > begin && lane < p.lead) terms()[-1 - lane] = terms()[p.piece * p.ratio - 1 - lane];
      __syncwarp();
      put_probabilities(scores, i, terms() + lane * 4);
      if (b0 + p.piece < end) load(i + p.piece * p.ratio, scores);
      __syncwarp();
      const int j = b0 + lane;
      const Entry mine = warp_sorted(lane < p.piece && j < end ? scored(j, lane * p.ratio) : 0);
      best = b0 == begin ? mine : better_of(best, mine);
      __syncwarp();
    }
    return best;
  }
  // The best 16 of the CTA, in order, to `lists` of every CTA.
  __device__ __forceinline__ void send_best_of_runs(int pieces) const {
    const int lane = threadIdx.x % 32;
    const Entry mine = best_of_run(pieces);
    if (lane < most_chosen) warp_lists()[at.warp * most_chosen + lane] = mine;
    meet();
    if (at.warp > 0 || p.cluster == 1) return;
    const Entry ours = best_of_lists<W>(warp_lists(), listed(pieces));
    for (int to = lane / 16; to < p.cluster; to += 2) in_cta(lists(), to)[at.cta * most_chosen + lane % 16] = ours;
  }
  // Warps of this CTA that have lists where no more have than there are pieces.
  __device__ __forceinline__ int listed(int pieces) const {
    return min(at.rankers, p.by_cluster(max(0, pieces - at.cta) + p.cluster - 1));
  }

  // The same where a warp has one piece of at most 16 blocks, two tokens a lane: an entry's place is the number of
  // better ones in the CTA.
  __device__ __forceinline__ void send_best_of_few() const {
    const int lane = threadIdx.x % 32, half = lane / 16, begin = at.among * p.few,
              end = min(begin + p.few, at.eligible), pieces = p.by_few(at.eligible + p.few - 1);
    Entry mine = 0;
    if (begin < end) {
      Scores<2> scores{};
      put_first(begin, scores);
      put_probabilities(scores, begin * p.ratio + lane * 2, terms() + lane * 2);
      __syncwarp();
      const int j = begin + lane % 16;
      if (lane % 16 < p.few && j < end) mine = scored(j, lane % 16 * p.ratio);
      if (half == 0) warp_lists()[at.warp * most_chosen + lane] = mine;
    }
    meet();
    if (begin >= end) return;
    const int count = listed(pieces) * (most_chosen / 4);  // pairs that a half of the warp looks at
    const auto* pairs = reinterpret_cast<const ulonglong2*>(warp_lists()) + half * count;
    int place = 0;
#pragma unroll 8
    for (int i = 0; i < count; ++i) {
      const ulonglong2 pair = pairs[i];
      place += (pair.x > mine) + (pair.y > mine);
    }
    place += __shfl_xor_sync(0xffffffffu, place, 16);
    if (mine == 0 || place >= most_chosen) return;
    for (int to = half; to < p.cluster; to += 2) in_cta(lists(), to)[at.cta * most_chosen + place] = mine;
  }

  // The best of the CTAs' lists: warps take four lists each, then all warps what those left of them.
  __device__ __forceinline__ Entry best_of_ctas() const {
    const int lane = threadIdx.x % 32;
    int of_four = p.cluster, apart = most_chosen;
    if (p.cluster > 4) {
      of_four = (p.cluster + 3) / 4, apart = 4 * most_chosen;
#pragma unroll 1
      for (int i = at.warp; i < of_four; i += at.rankers) {
        const Entry best = best_of_lists<4>(lists() + i * apart, p.cluster - i * 4);
        if (lane < most_chosen) lists()[i * apart + lane] = best;
      }
      meet();
    }
    return best_of_lists<4>(lists(), of_four, apart);
  }

  // The blocks chosen, from the best down, lane by lane; -1: none. All warps of the cluster that score, when its tiles
  // are written.
  __device__ __forceinline__ int choose(int tiles, int per_leaf) const {
    const int lane = threadIdx.x % 32;
    merge_lanes(tiles, per_leaf);
    meet();
    normalise();
    meet();
    const int pieces = p.by_piece(at.eligible + p.piece - 1);
    if (W == step_warps && at.eligible <= p.few * at.scorers)
      send_best_of_few();
    else
      send_best_of_runs(pieces);
    __syncwarp();
    if (p.cluster > 1) cluster_barrier();
    Entry best;
    if (W < step_warps || p.cluster == 1)
      best = best_of_lists<W>(warp_lists(), listed(pieces));
    else
      best = best_of_ctas();
    if (p.p_slc)  // zero where no block is eligible
      for (std::int64_t j = at.eligible + at.among * 32 + lane; j < p.p_slc_blocks; j += at.scorers * 32)
        p.p_slc[at.list * p.p_slc_blocks + j] = 0.0f;
    return lane < p.shape.rules.n_sel && lane < most_chosen && best != 0 ? block_of(best) : -1;
  }
};

}  // namespace nsa::gpu
