#pragma once
// The first half of the rank kernel (rank/rank.cu): the softmax normalisers of the heads of a work item, then the
// scores of the blocks of a CTA's slice from the raw scores that attend_cmp stored.

#include "kernels/cuda/attention/block_scores.cuh"
#include "kernels/cuda/attention/block_sums.cuh"
#include "kernels/cuda/attention/split_kv.cuh"

namespace nsa::gpu {

// Upper bound of the compressed tokens that overlap a block.
__host__ __device__ inline int tokens_per_block(const BlockRules& r) { return r.l_sel / r.d + (r.l - 1) / r.d; }

// Score columns of this rank's blocks where they are contiguous: the first overlapping token of a block is `ratio`
// columns after that of the previous block; in a new chunk it is at the begin of the chunk's stride.
struct BlockColumns {
  bool contiguous;
  int stride;  // columns of a chunk
  int offset;  // column of the first block's first overlapping token; negative where that token does not exist
  int gap;     // halo columns of a strip, and columns between two strips
};

struct RankParams {
  RankArgs a;
  std::int64_t pitch;                  // of the raw scores
  std::int64_t max_blocks;             // blocks of this rank below max_positions
  int per_chunk;                       // blocks of a chunk
  int strip_blocks, strips_per_round;  // blocks of a strip, strips of a round: see score_blocks
  int terms;                           // capacity of a scoring round, in tokens
  int key_words;                       // capacity for keys in shared memory, in entries
  bool in_scratch;                     // whether keys are in scratch instead
  int cluster;                         // CTAs of a work item
  bool counts;                         // select by counting: slices are small
  bool by_tile;                        // score by tile: rank/from_raw_scores.cuh
  TileBlockSums block_sums;            // inputs instead of raw scores, where the KV mainloop stored them
  BlockColumns columns;
};

// The u-th block that this rank holds.
__device__ inline int block_at(const RankParams& p, int u) {
  const RowMap& m = p.a.token_map;
  if (m.rank == all_ranks || m.kv == 1) return u;
  return (u / p.per_chunk * m.kv + m.rank) * p.per_chunk + u % p.per_chunk;
}

// Column of the first token that overlaps the u-th block, where columns are contiguous.
__device__ inline int first_column(const RankParams& p, int u) {
  return u / p.per_chunk * p.columns.stride + u % p.per_chunk * (p.a.shape.rules.l_sel / p.a.shape.rules.d) +
         p.columns.offset;
}

// Columns that hold one of the n tokens, where columns are contiguous: chunk 0 has no halo, the last chunk may be
// partial.
struct RankColumns {
  int begin, end;
};
__device__ inline RankColumns written_columns(const RankParams& p, std::int64_t n) {
  const RowMap& m = p.a.cmp_map;
  if (m.chunk == INT64_MAX) return {0, static_cast<int>(n)};
  const std::int64_t chunks = owned_chunks(m, n + m.halo, m.rank);
  if (chunks == 0) return {0, 0};
  const std::int64_t left = n - ((chunks - 1) * m.kv + m.rank) * m.chunk, front = score_halo_columns(m);
  return {static_cast<int>(m.rank == 0 ? front : front - m.halo),
          static_cast<int>((chunks - 1) * score_stride(m) + front + (left < m.chunk ? left : m.chunk))};
}

// Shared memory: normalisers [h], best [n], best of the slices [cluster * n], keys (entries where they are counted),
// terms, overlaps, histogram [256], chosen [n].
struct RankShared {
  float2* normaliser;
  Entry *best, *gathered;
  void* keys;
  float *terms, *overlaps;
  unsigned* histogram;
  int* chosen;
  __device__ RankShared(const RankParams& p, float2* memory) {
    const int n = p.a.shape.rules.n_sel;
    normaliser = memory;
    best = reinterpret_cast<Entry*>(normaliser + p.a.shape.heads_per_group);
    gathered = best + n;
    keys = gathered + p.cluster * n;
    terms = reinterpret_cast<float*>(gathered + p.cluster * n + p.key_words);
    overlaps = terms + p.terms;
    histogram = reinterpret_cast<unsigned*>(overlaps + tokens_per_block(p.a.shape.rules));
    chosen = reinterpret_cast<int*>(histogram + 256);
  }
  static std::size_t bytes(const RankParams& p) {
    const BlockRules& r = p.a.shape.rules;
    return (p.a.shape.heads_per_group + (1 + p.cluster) * r.n_sel + p.key_words) * sizeof(Entry) +
           (p.terms + tokens_per_block(r) + 256 + r.n_sel) * sizeof(float);
  }
};

// Softmax normalisers (m * log2(e), 1 / s) of the heads of the group from the LSE buckets of all ranks. A warp a head,
// buckets in a fixed tree.
__device__ inline void load_normalisers(const RankParams& p, std::int64_t row, std::int64_t g, float2* normaliser) {
  const LayerShape& s = p.a.shape;
  const std::int64_t rows = p.a.tile.rows();
  const int ranks = p.a.lse_ranks, slots = lse_slots(s, ranks);
  const float2* lse = reinterpret_cast<const float2*>(p.a.lse) + row * s.heads() + g * s.heads_per_group;
  for (int h = threadIdx.x / 32; h < s.heads_per_group; h += blockDim.x / 32) {
    float2 of_head[1];
    softmax_normalisers(
        s.lse.buckets,
        [&](int x, int) { return lse[std::int64_t{x % ranks * slots + x / ranks} * rows * s.heads() + h]; }, of_head);
    if (threadIdx.x % 32 == 0) normaliser[h] = of_head[0];
  }
}

// Calls add(score, normaliser) for the heads of the group by rising head. InFlight scores are loaded before one is
// used, which the compiler does not do by itself. V: the score of one token, or of four adjacent ones.
template <class V, int InFlight, class Add>
__device__ __forceinline__ void for_each_head(const RankParams& p, const float* scores, const float2* normaliser,
                                              Add add) {
  const int heads = p.a.shape.heads_per_group;
  int h = 0;
#pragma unroll 1
  for (; h + InFlight <= heads; h += InFlight) {
    V x[InFlight];
#pragma unroll
    for (int i = 0; i < InFlight; ++i, scores += p.pitch) x[i] = *reinterpret_cast<const V*>(scores);
#pragma unroll
    for (int i = 0; i < InFlight; ++i) add(x[i], normaliser[h + i]);
  }
#pragma unroll 1
  for (; h < heads; ++h, scores += p.pitch) add(*reinterpret_cast<const V*>(scores), normaliser[h]);
}

// Probability of a token summed over the heads of the group, by rising head.
__device__ inline float token_probability(const RankParams& p, const float* scores, const float2* normaliser) {
  float sum = 0.0f;
  for_each_head<float, 16>(p, scores, normaliser, [&](float score, float2 of_head) {
    sum = __fmaf_rn(exp2_fast(score - of_head.x), of_head.y, sum);
  });
  return sum;
}

// The same for the adjacent tokens 4k .. 4k + 3: each sum in the same order.
__device__ inline float4 four_probabilities(const RankParams& p, const float* scores, const float2* normaliser) {
  float4 sum = {};
  for_each_head<float4, 8>(p, scores, normaliser,
                           [&](float4 four, float2 of_head) { add_probabilities(sum, four, of_head); });
  return sum;
}

// terms[k] = probability of the token in column first + k, 0 where there is none. A thread has four columns, or one
// where there are enough threads.
__device__ inline void score_columns(const RankParams& p, const float* scores, const float2* normaliser, int first,
                                     int count, RankColumns written, float* terms) {
  const auto is_written = [&](int column) { return column >= written.begin && column < written.end; };
  if (count <= static_cast<int>(blockDim.x)) {
    const int k = threadIdx.x;
    if (k < count) terms[k] = is_written(first + k) ? token_probability(p, scores + first + k, normaliser) : 0.0f;
    return;
  }
  const int begin = first < 0 ? 0 : first / 4 * 4;
  for (int k = threadIdx.x; k < -first; k += blockDim.x) terms[k] = 0.0f;
  for (int i = begin + threadIdx.x * 4; i < first + count; i += blockDim.x * 4) {
    float4 sum = {};
    if (i + 4 > written.begin && i < written.end) sum = four_probabilities(p, scores + i, normaliser);
    const float four[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int k = i + e - first;
      if (k >= 0 && k < count) terms[k] = is_written(i + e) ? four[e] : 0.0f;
    }
  }
}

// The same where columns are not contiguous: a thread a token of the blocks from u0 on, strip by strip.
__device__ inline void score_tokens(const RankParams& p, const float* scores, const float2* normaliser, int u0, int end,
                                    int strips_per_round, int n, float* terms) {
  const BlockRules& r = p.a.shape.rules;
  const int ratio = r.l_sel / r.d, halo = (r.l - 1) / r.d, tokens = p.strip_blocks * ratio + halo;
  for (int item = threadIdx.x; item < strips_per_round * tokens; item += blockDim.x) {
    const int u = u0 + item / tokens * p.strip_blocks;
    if (u >= end) break;
    const int j = block_at(p, u), i = j * ratio - halo + item % tokens;
    const std::int64_t c = p.a.cmp_map.rank == all_ranks ? 0 : j / p.per_chunk;
    terms[item] = i >= 0 && i < n ? token_probability(p, scores + score_column(p.a.cmp_map, c, i), normaliser) : 0.0f;
  }
}

// Sort keys of blocks [begin, end) of those held. A strip is a run of blocks whose tokens have consecutive columns
// (those of a chunk, or as many as fit). After the probabilities of the tokens, a thread a block sums those of its
// tokens times their overlaps by rising index; the overlaps are the same for every block.
template <class StoreKey>
__device__ inline void score_blocks(const RankParams& p, std::int64_t row, std::int64_t g, std::int64_t t, int begin,
                                    int end, const RankShared& smem, StoreKey store_key) {
  const LayerShape& s = p.a.shape;
  const BlockRules& r = s.rules;
  const int n = static_cast<int>(compressed_tokens(r, t)),
            first_local = static_cast<int>(eligible_blocks(r, t)) - r.n_local;
  const float* scores = static_cast<const float*>(p.a.scores) + (row * s.heads() + g * s.heads_per_group) * p.pitch;
  float* p_slc = p.a.p_slc ? p.a.p_slc + (row * s.groups + g) * p.a.p_slc_blocks : nullptr;
  const int ratio = r.l_sel / r.d, halo = (r.l - 1) / r.d, strip_blocks = p.strip_blocks,
            tokens = strip_blocks * ratio + halo;
  const int strips_per_round = p.strips_per_round, round = strips_per_round * strip_blocks;  // blocks
  const RankColumns written = p.columns.contiguous ? written_columns(p, n) : RankColumns{};
  for (int k = threadIdx.x; k < ratio + halo; k += blockDim.x)
    smem.overlaps[k] = overlap(r, std::int64_t{r.l} * ratio - halo + k, r.l);  // of a block far from the start
  for (int u0 = begin; u0 < end; u0 += round) {
    const int count = min(round, end - u0), first = p.columns.contiguous ? first_column(p, u0) : 0;
    if (p.columns.contiguous)
      score_columns(p, scores, smem.normaliser, first, first_column(p, u0 + count - 1) + ratio + halo - first, written,
                    smem.terms);
    else
      score_tokens(p, scores, smem.normaliser, u0, end, strips_per_round, n, smem.terms);
    __syncthreads();
    for (int b = threadIdx.x; b < count; b += blockDim.x) {
      const int term =
          p.columns.contiguous ? first_column(p, u0 + b) - first : b / strip_blocks * tokens + b % strip_blocks * ratio;
      const float sum = block_score(smem.terms + term, smem.overlaps, ratio + halo);
      const int j = block_at(p, u0 + b);
      store_key(u0 + b, key_of(j < r.n_init || j >= first_local, sum));
      if (p_slc && j < p.a.p_slc_blocks) p_slc[j] = sum;
    }
    __syncthreads();
  }
}

}  // namespace nsa::gpu
