#pragma once
// Blocks scored and chosen by the cluster of a list: the sums of tiles to lanes to normalisers by every CTA for itself,
// then a warp takes 32 blocks at a time (of the paper's; 128 tokens), has their scores (decode/fused/raw_scores.cuh,
// decode/fused/block_sums.cuh) and keeps the best 16 in order in its lanes; or, where warps are many, 16 once. The
// warps' best meet in the CTA, the CTAs' in every CTA.

#include "kernels/cuda/decode/fused/block_sums.cuh"
#include "kernels/cuda/decode/fused/raw_scores.cuh"

namespace nsa::gpu {

// cluster_arrive() of who has nothing to publish.
__device__ __forceinline__ void join_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

template <class E, int W, bool Sums>
struct StepRank {
  using Scores = std::conditional_t<Sums, SumScores<E, W>, RawScores<E, W>>;
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
    const int leaves = per_leaf == 2 ? tiles / 2 : tiles / per_leaf, count = p.shape.lse.buckets;
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
            const float4 nothing = {neg_inf, 0.0f, neg_inf, 0.0f};
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
      const float2 first = to_natural_log(sum[0]), second = to_natural_log(sum[1]);
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
      SoftmaxState total[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 ms = first + i * 8 < p.shape.lse.buckets ? from[i * 8 * E::heads] : make_float2(-INFINITY, 0.0f);
        total[i] = {ms.x, ms.y};
      }
#pragma unroll 1
      for (int x = 32; x < p.shape.lse.buckets; x += 32)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (x + first + i * 8 < p.shape.lse.buckets) add_lane(total[i], from[(x + i * 8) * E::heads]);
      float m = fmaxf(fmaxf(total[0].m, total[1].m), fmaxf(total[2].m, total[3].m));
#pragma unroll
      for (int step = 4; step > 0; step /= 2) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, step));
      float s[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) s[i] = __fmul_rn(total[i].s, exp_shifted(total[i].m, m));
      float sum = (s[0] + s[2]) + (s[1] + s[3]);  // 16 lanes apart, then 8
#pragma unroll
      for (int step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (first == 0)
        normalisers()[head] =
            head < at.present ? make_float2(m * log2_e, sum > 0.0f ? 1.0f / sum : 0.0f) : make_float2(INFINITY, 0.0f);
    }
  }

  // Of block j.
  __device__ __forceinline__ Entry entry(int j, float score) const {
    const BlockRules& r = p.shape.rules;
    if (p.p_slc && j < p.p_slc_blocks) p.p_slc[at.list * p.p_slc_blocks + j] = score;
    return entry_of(key_of(j < r.n_init || j >= at.eligible - r.n_local, score), j);
  }

  // Blocks [begin, end) that are this warp's: a run of pieces, or, where warps are many, one piece of at most 16.
  struct Mine {
    bool few;
    int begin, end;
  };
  __device__ __forceinline__ Mine mine(int pieces) const {
    const bool few = W == step_warps && at.eligible <= p.few * at.scorers;
    const int run = few ? p.few : p.by_scorers(pieces + at.scorers - 1) * p.piece, begin = at.among * run;
    return {few, begin, min(begin + run, at.eligible)};
  }

  // The best 16 of a run, in the warp's first half.
  __device__ __forceinline__ Entry best_of_run(const Mine& mine, Scores& scores) const {
    const int lane = threadIdx.x % 32;
    Entry best = 0;
    if (mine.begin >= mine.end) return best;
    scores.start(mine.begin, shared);
#pragma unroll 1
    for (int b0 = mine.begin; b0 < mine.end; b0 += p.piece) {
      const float score = scores.score(b0, mine.end);
      const int j = b0 + lane;
      const Entry sorted = warp_sorted(lane < p.piece && j < mine.end ? entry(j, score) : 0);
      best = b0 == mine.begin ? sorted : better_of(best, sorted);
    }
    return best;
  }
  // The best 16 of the CTA, in order, to `lists` of every CTA.
  __device__ __forceinline__ void send_best_of_runs(const Mine& run, Scores& scores, int pieces) const {
    const int lane = threadIdx.x % 32;
    const Entry mine = best_of_run(run, scores);
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

  // The same where a warp has one piece of at most 16 blocks: an entry's place is the number of better ones in the CTA.
  // Of two lanes that have the same block each counts half.
  __device__ __forceinline__ void send_best_of_few(const Mine& few, Scores& scores) const {
    const int begin = few.begin, end = few.end, pieces = p.by_few(at.eligible + p.few - 1),
              half = (threadIdx.x & Scores::twin) != 0, block = Scores::few_block();
    Entry mine = 0;
    if (begin < end) {
      scores.start(begin, shared);
      const float score = scores.score_few(begin, end);
      if (block < p.few && begin + block < end) mine = entry(begin + block, score);
      if (half == 0) warp_lists()[at.warp * most_chosen + block] = mine;
    }
    meet();
    if (begin >= end) return;
    const int count = listed(pieces) * (most_chosen / 4);  // pairs that a lane looks at
    const auto* pairs = reinterpret_cast<const ulonglong2*>(warp_lists()) + half * count;
    int place = 0;
#pragma unroll 8
    for (int i = 0; i < count; ++i) {
      const ulonglong2 pair = pairs[i];
      place += (pair.x > mine) + (pair.y > mine);
    }
    place += __shfl_xor_sync(0xffffffffu, place, Scores::twin);
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
    const int lane = threadIdx.x % 32, pieces = p.by_piece(at.eligible + p.piece - 1);
    const Mine blocks = mine(pieces);
    Scores scores(p, at, blocks.few);
    // Before the lanes' loads, unless K and V have long rows: with twice as many bytes under way these loads wait
    // behind them, and the lanes' behind these.
    constexpr bool early = E::d_v <= 64;
    if (early) scores.ask(blocks.begin, blocks.few);
    merge_lanes(tiles, per_leaf);
    meet();
    normalise();
    if (!early) scores.ask(blocks.begin, blocks.few);
    meet();
    if (W == step_warps && blocks.few)
      send_best_of_few(blocks, scores);
    else
      send_best_of_runs(blocks, scores, pieces);
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
