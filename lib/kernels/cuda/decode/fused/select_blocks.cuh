#pragma once
// Block selection by the cluster of a work item. Every CTA merges the (m, sum) of the tiles to LSE buckets and those to
// softmax normalisers. Then a scoring warp takes rounds of up to 32 blocks (128 tokens), scores them
// (decode/fused/from_raw_scores.cuh, decode/fused/from_block_sums.cuh) and keeps the best 16 sorted in its lanes; or,
// where one round of all warps covers every block, up to 16 blocks in a single pass. The top 16 of the warps merge in
// the CTA, those of the CTAs in every CTA. Padded instances keep the best 32.

#include "kernels/cuda/decode/fused/from_block_sums.cuh"
#include "kernels/cuda/decode/fused/from_raw_scores.cuh"
#include "kernels/cuda/primitives/mbarrier.cuh"

namespace nsa::gpu {

// cluster_arrive() of a thread that has no writes to publish.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

template <class WarpTile, int W, bool Sums, class Params = FusedDecodeParams>
struct FusedSelect {
  using Scores = std::conditional_t<Sums, ScoresFromBlockSums<WarpTile, W>, ScoresFromRaw<WarpTile, W>>;
  using SharedLayout = FusedSharedLayout<WarpTile, W>;
  static constexpr int top = SharedLayout::top, cta_lists = W > 8 ? 12 : W > 4 ? 8 : 4;  // lists: at least the warps
  const Params& p;
  const typename Params::Coord& at;
  char* shared;

  // Barrier of the scoring warps of the CTA: an mbarrier at which every thread arrives, because racecheck miscounts a
  // named barrier that only some of the warps use (docs/kernels/README.md).
  __device__ __forceinline__ unsigned barrier() const { return shared_address(shared) + SharedLayout::barrier; }
  __device__ __forceinline__ void sync_scoring_warps() const { mbarrier_arrive_and_wait(barrier()); }
  __device__ __forceinline__ float2* buckets() const {
    return reinterpret_cast<float2*>(shared + SharedLayout::buckets_at());
  }
  __device__ __forceinline__ float2* normalisers() const {
    return reinterpret_cast<float2*>(shared + SharedLayout::normalisers_at(p.shape));
  }
  __device__ __forceinline__ float* overlaps() const {
    return reinterpret_cast<float*>(shared + SharedLayout::overlaps_at(p.shape));
  }
  __device__ __forceinline__ Entry* warp_top() const { return reinterpret_cast<Entry*>(shared + SharedLayout::select); }
  __device__ __forceinline__ Entry* cta_top() const { return reinterpret_cast<Entry*>(shared + SharedLayout::cta_top); }

  // What does not depend on the position: the barrier; the overlaps of a block far from the start; the lists of the
  // CTAs, which may not all be filled.
  __device__ __forceinline__ void prepare() const {
    const BlockRules& r = p.shape.rules;
    if (threadIdx.x == 0 && at.cta_scoring_warps > 0) mbarrier_init(barrier(), at.cta_scoring_warps * 32);
    static_assert(fused_max_cluster * warp_top_n <= 32 * fused_warps);
    if (W >= fused_warps && static_cast<int>(threadIdx.x) < p.cluster * warp_top_n)
#pragma unroll
      for (int i = 0; i < top; i += warp_top_n) cta_top()[threadIdx.x + p.cluster * i] = 0;
#pragma unroll 1
    for (int k = threadIdx.x; k < p.tokens_per_block + p.halo_tokens; k += 32 * W) {
      const int begin = (k - p.halo_tokens) * r.d;  // relative to the block
      overlaps()[k] = static_cast<float>(min(begin + r.l, r.l_sel) - max(begin, 0)) / static_cast<float>(r.d);
    }
  }

  // Merges the (m, sum) of the tiles of a head tile to LSE buckets: each by rising segment, a segment by rising tile. A
  // thread has two heads of a bucket and loads two tiles of four segments at a time; in a shard, which has fewer
  // buckets and exchanges them, one head and eight segments. Absent tiles are the neutral element.
  __device__ __forceinline__ void merge_buckets(int tiles, int per_segment, int head_tile) const {
    constexpr int heads_each = Params::is_shard ? 1 : 2, at_a_time = 8 / heads_each,
                  shares = WarpTile::heads / heads_each;
    using Loaded = std::conditional_t<heads_each == 2, float4, float2>;
    const int item = WarpTile::tuned ? at.work_item : at.work_item * p.head_tiles + head_tile;
    const float2* sums = p.tile_lse + item * p.max_tiles * WarpTile::heads;
    const int segments = per_segment == 2 ? tiles / 2 : tiles / per_segment, count = p.held_buckets();
#pragma unroll 1
    for (int item = threadIdx.x; item < count * shares; item += at.cta_scoring_warps * 32) {
      const int bucket = item / shares;
      const float2* of_bucket = sums + bucket * per_segment * WarpTile::heads + item % shares * heads_each;
      SoftmaxState<Exp2> sum[heads_each];
#pragma unroll 1
      for (int i0 = 0; i0 < segments; i0 += at_a_time * count) {
        SoftmaxState<Exp2> segment[at_a_time][heads_each];
#pragma unroll 1
        for (int tile0 = 0; tile0 < per_segment; tile0 += 2) {
          Loaded x[at_a_time][2];
#pragma unroll
          for (int b = 0; b < at_a_time; ++b) {
            const int i = i0 + b * count;  // segment of bucket 0
            const auto* from = reinterpret_cast<const Loaded*>(of_bucket + (i * per_segment + tile0) * WarpTile::heads);
            const Loaded absent = absent_states<Loaded>();
            x[b][0] = i + bucket < segments ? __ldcg(from) : absent;
            x[b][1] = i + bucket < segments && tile0 + 1 < per_segment ? __ldcg(from + shares) : absent;
          }
#pragma unroll
          for (int b = 0; b < at_a_time; ++b)
#pragma unroll
            for (int a = 0; a < heads_each; ++a) {
              const SoftmaxState<Exp2> one = state_of(x[b][0], a), two = state_of(x[b][1], a);
              segment[b][a] = merge_exact(tile0 == 0 ? one : merge_exact(segment[b][a], one), two);
            }
        }
#pragma unroll
        for (int b = 0; b < at_a_time; ++b)
#pragma unroll
          for (int a = 0; a < heads_each; ++a) sum[a] = merge_exact(sum[a], segment[b][a]);
      }
      if constexpr (Params::is_shard) {
        at.send_bucket(buckets(), bucket, item % shares, shares, to_natural_log(sum[0]));
      } else {
        const float2 first = to_natural_log(sum[0]), second = to_natural_log(sum[1]);
        reinterpret_cast<float4*>(buckets())[item] = {first.x, first.y, second.x, second.y};
      }
    }
  }
  static __device__ __forceinline__ SoftmaxState<Exp2> state_of(float2 x, int) { return {x.x, x.y}; }
  static __device__ __forceinline__ SoftmaxState<Exp2> state_of(float4 x, int head) {
    return head == 0 ? SoftmaxState<Exp2>{x.x, x.y} : SoftmaxState<Exp2>{x.z, x.w};
  }
  template <class Loaded>
  static __device__ __forceinline__ Loaded absent_states() {
    if constexpr (sizeof(Loaded) == sizeof(float2))
      return {neg_inf, 0.0f};
    else
      return {neg_inf, 0.0f, neg_inf, 0.0f};
  }

  // softmax_normalisers() with eight threads a head, four buckets each: the same sums in the same tree. Invalid heads
  // get a normaliser that makes every probability 0.
  __device__ __forceinline__ void compute_normalisers(int head_tile) const {
    const int first_head = head_tile * WarpTile::heads;  // in the group
#pragma unroll 1
    for (int item = threadIdx.x; item < WarpTile::heads * 8; item += at.cta_scoring_warps * 32) {
      const int head = item / 8, first = item % 8;
      const float2* from = buckets() + first * WarpTile::heads + head;
      SoftmaxState<Natural> total[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 ms =
            first + i * 8 < p.shape.lse.buckets ? from[i * 8 * WarpTile::heads] : make_float2(-INFINITY, 0.0f);
        total[i] = {ms.x, ms.y};
      }
#pragma unroll 1
      for (int x = 32; x < p.shape.lse.buckets; x += 32)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (x + first + i * 8 < p.shape.lse.buckets) merge_exact_into(total[i], from[(x + i * 8) * WarpTile::heads]);
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
        normalisers()[first_head + head] = first_head + head < p.shape.heads_per_group
                                               ? make_float2(m * log2_e, sum > 0.0f ? 1.0f / sum : 0.0f)
                                               : make_float2(INFINITY, 0.0f);
    }
  }

  // Sort entry of block j; stores its score.
  __device__ __forceinline__ Entry entry(int j, float score) const {
    const BlockRules& r = p.shape.rules;
    if constexpr (Params::is_shard) {
      const int block = at.block_of_held(j);
      return entry_of(key_of(block < r.n_init || block >= at.all_eligible - r.n_local, score), block);
    }
    if (p.p_slc && j < p.p_slc_blocks) p.p_slc[at.work_item * p.p_slc_blocks + j] = score;
    return entry_of(key_of(j < r.n_init || j >= at.eligible - r.n_local, score), j);
  }

  // Blocks [begin, end) of this warp: consecutive rounds, or a single pass of at most 16.
  struct ScoreRange {
    bool single_pass;
    int begin, end;
  };
  __device__ __forceinline__ ScoreRange score_range(int rounds) const {
    const bool single_pass = W >= fused_warps && at.eligible <= p.single_pass_blocks * at.scoring_warps;
    const int count = single_pass ? p.single_pass_blocks
                                  : p.by_scoring_warps(rounds + at.scoring_warps - 1) * p.round_blocks,
              begin = at.warp_in_cluster * count;
    return {single_pass, begin, min(begin + count, at.eligible)};
  }

  // The best of a sorted list and 32 entries in any order.
  static __device__ __forceinline__ Entry top_with(Entry best, Entry fresh) {
    if constexpr (top == warp_top_n)
      return top16_with(best, fresh);
    else
      return top32_of_two(best, warp_sort_descending(fresh));
  }
  // The best of `count` <= MaxLists lists.
  template <int MaxLists>
  static __device__ __forceinline__ Entry top_of_lists(const Entry* lists, int count, int stride = top) {
    if constexpr (top == warp_top_n)
      return top16_of_lists<MaxLists>(lists, count, stride);
    else
      return top32_of_lists(lists, min(count, MaxLists), stride);
  }

  // The best of the range; the best 16 in the first half of the warp.
  __device__ __forceinline__ Entry top_of_range(const ScoreRange& range, Scores& scores) const {
    const int lane = threadIdx.x % 32;
    Entry best = 0;
    if (range.begin >= range.end) return best;
    scores.start(range.begin, shared);
#pragma unroll 1
    for (int b0 = range.begin; b0 < range.end; b0 += p.round_blocks) {
      const float score = scores.score(b0, range.end);
      const int j = b0 + lane;
      const Entry fresh = lane < p.round_blocks && j < range.end ? entry(j, score) : 0;
      best = b0 == range.begin ? warp_sort_descending(fresh) : top_with(best, fresh);
    }
    return best;
  }
  // Sends the sorted best blocks of this CTA to every CTA.
  __device__ __forceinline__ void send_top(const ScoreRange& run, Scores& scores, int rounds) const {
    const int lane = threadIdx.x % 32;
    const Entry own = top_of_range(run, scores);
    if (lane < top) warp_top()[at.warp * top + lane] = own;
    sync_scoring_warps();
    if (at.warp > 0 || p.cluster == 1) return;
    const Entry best = top_of_lists<cta_lists>(warp_top(), warps_with_blocks(rounds));
    for (int to = lane / top; to < p.cluster; to += 32 / top)
      map_to_cta(cta_top(), to)[at.cta * top + lane % top] = best;
  }
  // Warps of this CTA that have blocks: there is at most one a round.
  __device__ __forceinline__ int warps_with_blocks(int rounds) const {
    return min(at.cta_scoring_warps, p.by_cluster(max(0, rounds - at.cta) + p.cluster - 1));
  }

  // The same for a single pass of at most 16 blocks a warp: the index of an entry is the number of better ones in the
  // CTA. Of the two lanes that have a block each counts half.
  __device__ __forceinline__ void send_top_single_pass(const ScoreRange& range, Scores& scores) const {
    const int begin = range.begin, end = range.end, rounds = p.by_single_pass(at.eligible + p.single_pass_blocks - 1),
              half = (threadIdx.x & Scores::duplicate_stride) != 0, block = Scores::single_pass_block();
    Entry own = 0;
    if (begin < end) {
      scores.start(begin, shared);
      const float score = scores.score_single_pass(begin, end);
      if (block < p.single_pass_blocks && begin + block < end) own = entry(begin + block, score);
      if (half == 0) warp_top()[at.warp * warp_top_n + block] = own;
    }
    sync_scoring_warps();
    if (begin >= end) return;
    const int count = warps_with_blocks(rounds) * (warp_top_n / 4);  // pairs that a lane compares
    const auto* pairs = reinterpret_cast<const ulonglong2*>(warp_top()) + half * count;
    int index = 0;
#pragma unroll 8
    for (int i = 0; i < count; ++i) {
      const ulonglong2 pair = pairs[i];
      index += (pair.x > own) + (pair.y > own);
    }
    index += __shfl_xor_sync(0xffffffffu, index, Scores::duplicate_stride);
    if (own == 0 || index >= top) return;
    for (int to = half; to < p.cluster; to += 2) map_to_cta(cta_top(), to)[at.cta * top + index] = own;
  }

  // The best of the lists of the CTAs: warps merge four lists each, then every warp merges the results.
  __device__ __forceinline__ Entry top_of_ctas() const {
    const int lane = threadIdx.x % 32;
    int lists = p.cluster, stride = top;
    if (p.cluster > 4) {
      lists = (p.cluster + 3) / 4, stride = 4 * top;
#pragma unroll 1
      for (int i = at.warp; i < lists; i += at.cta_scoring_warps) {
        const Entry best = top_of_lists<4>(cta_top() + i * stride, p.cluster - i * 4);
        if (lane < top) cta_top()[i * stride + lane] = best;
      }
      sync_scoring_warps();
    }
    return top_of_lists<4>(cta_top(), lists, stride);
  }

  // The selected blocks, best first, one a lane; -1: none. All scoring warps of the cluster call it once the tile
  // outputs are visible.
  __device__ __forceinline__ int select(int tiles, int per_segment) const {
    const int lane = threadIdx.x % 32, rounds = p.by_round_blocks(at.eligible + p.round_blocks - 1);
    const ScoreRange blocks = score_range(rounds);
    Scores scores(p, at, blocks.single_pass);
    if constexpr (Params::is_shard) {
      scores.halo_tiles = at.halo_tiles;
      scores.first_halo_tile = at.rank() == 0;
    }
    // Before the loads of the buckets, unless K and V have long rows: those have twice as many bytes in flight, these
    // loads would wait for them, and the loads of the buckets for these.
    constexpr bool early = WarpTile::d_v <= 64;
    if (early) scores.prefetch(blocks.begin, blocks.single_pass);
    merge_buckets(tiles, per_segment, 0);
    if constexpr (Params::is_shard) {
      if (!early) scores.prefetch(blocks.begin, blocks.single_pass);  // while the buckets of the peers are under way
      at.end_phase(StepPhase::merge_lse);
      at.receive_buckets(reinterpret_cast<float4*>(buckets()), WarpTile::heads / 2, at.cta_scoring_warps * 32);
      at.end_phase(StepPhase::wait_lse);
    }
    sync_scoring_warps();
    compute_normalisers(0);
    if constexpr (!WarpTile::tuned) {
#pragma unroll 1
      for (int head_tile = 1; head_tile < p.head_tiles; ++head_tile) {
        sync_scoring_warps();
        merge_buckets(tiles, per_segment, head_tile);
        sync_scoring_warps();
        compute_normalisers(head_tile);
      }
    }
    if (!early && !Params::is_shard) scores.prefetch(blocks.begin, blocks.single_pass);
    sync_scoring_warps();
    if (W >= fused_warps && blocks.single_pass)
      send_top_single_pass(blocks, scores);
    else
      send_top(blocks, scores, rounds);
    __syncwarp();
    if (p.cluster > 1) cluster_barrier();
    Entry best;
    if (W < fused_warps || p.cluster == 1)
      best = top_of_lists<cta_lists>(warp_top(), warps_with_blocks(rounds));
    else
      best = top_of_ctas();
    if constexpr (Params::is_shard) {
      at.end_phase(StepPhase::score_blocks);
      best = at.top16_of_ranks(best);
      at.end_phase(StepPhase::wait_candidates);
    }
    if (p.p_slc)  // zero where no block is eligible
      for (std::int64_t j = at.eligible + at.warp_in_cluster * 32 + lane; j < p.p_slc_blocks;
           j += at.scoring_warps * 32)
        p.p_slc[at.work_item * p.p_slc_blocks + j] = 0.0f;
    return lane < p.shape.rules.n_sel && lane < top && best != 0 ? block_of(best) : -1;
  }
};

}  // namespace nsa::gpu
