#pragma once
// What a CTA of rank (rank/rank.cu) does first: the normalisers of its list's heads, then the scores of the blocks of
// its slice, from the raw scores that attend_cmp left.

#include "kernels/cuda/attention/block_scores.cuh"
#include "kernels/cuda/attention/block_sums.cuh"
#include "kernels/cuda/attention/split_kv.cuh"

namespace nsa::gpu {

// Compressed tokens that overlap a block, at most.
__host__ __device__ inline int tokens_per_block(const BlockRules& r) { return r.l_sel / r.d + (r.l - 1) / r.d; }

// The columns of this rank's blocks where they are one run, a block's first overlapping token `ratio` columns behind
// that of the block before it, or a chunk's first at the begin of its stride.
struct RankRun {
  bool present;
  int stride;   // columns of a chunk
  int offset;   // of the first block's first overlapping token: below 0 where nothing lies in front of it
  int between;  // columns of a piece besides its own blocks', and that lie between two pieces
};

struct RankParams {
  RankArgs a;
  std::int64_t pitch;        // of the raw scores
  std::int64_t most_blocks;  // this rank's blocks below max_positions
  int per_chunk;             // blocks of a chunk
  int piece, together;       // blocks of a piece, pieces scored at once: see score_blocks
  int terms;                 // tokens a round of scoring has room for
  int key_words;             // room for keys in shared memory, in entries
  bool in_scratch;           // keys
  int cluster;               // CTAs of a list
  bool counted;              // slices are small
  bool by_tile;              // blocks are scored: rank/from_raw_scores.cuh
  TileSums sums;             // from these, where the walk left them
  RankRun run;
};

// The u-th block this rank holds.
__device__ inline int block_at(const RankParams& p, int u) {
  const RowMap& m = p.a.token_map;
  if (m.rank == all_ranks || m.kv == 1) return u;
  return (u / p.per_chunk * m.kv + m.rank) * p.per_chunk + u % p.per_chunk;
}

// Of the run, the column of the first token that overlaps the u-th block.
__device__ inline int first_column(const RankParams& p, int u) {
  return u / p.per_chunk * p.run.stride + u % p.per_chunk * (p.a.shape.rules.l_sel / p.a.shape.rules.d) + p.run.offset;
}

// Of the run, the columns that hold one of the n tokens: nothing lies in front of chunk 0, and n may end in the last.
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

// Shared memory: normalisers [h], best [n], the slices' best [cluster * n], keys (entries of the slice where they
// are counted), terms, overlaps, histogram [256], chosen [n].
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

// (m, in powers of two, and 1/s) of every head of the group from all lanes, whatever rank sent them. A warp a head,
// lanes in a fixed tree.
__device__ inline void load_normalisers(const RankParams& p, std::int64_t row, std::int64_t g, float2* normaliser) {
  const LayerShape& s = p.a.shape;
  const std::int64_t rows = p.a.tile.rows();
  const int ranks = p.a.lse_ranks, slots = lse_slots(s, ranks);
  const float2* lse = reinterpret_cast<const float2*>(p.a.lse) + row * s.heads() + g * s.heads_per_group;
  for (int h = threadIdx.x / 32; h < s.heads_per_group; h += blockDim.x / 32) {
    float2 by[1];
    normalisers_of(
        s.lse.buckets,
        [&](int x, int) { return lse[std::int64_t{x % ranks * slots + x / ranks} * rows * s.heads() + h]; }, by);
    if (threadIdx.x % 32 == 0) normaliser[h] = by[0];
  }
}

// Calls add(score, normaliser) for the group's heads, heads rising; `Ahead` scores are asked for before one is used,
// which the compiler does not do by itself. V: of one token, or of four side by side.
template <class V, int Ahead, class Add>
__device__ __forceinline__ void each_head(const RankParams& p, const float* scores, const float2* normaliser, Add add) {
  const int heads = p.a.shape.heads_per_group;
  int h = 0;
#pragma unroll 1
  for (; h + Ahead <= heads; h += Ahead) {
    V x[Ahead];
#pragma unroll
    for (int i = 0; i < Ahead; ++i, scores += p.pitch) x[i] = *reinterpret_cast<const V*>(scores);
#pragma unroll
    for (int i = 0; i < Ahead; ++i) add(x[i], normaliser[h + i]);
  }
#pragma unroll 1
  for (; h < heads; ++h, scores += p.pitch) add(*reinterpret_cast<const V*>(scores), normaliser[h]);
}

// Sum over the group's heads of p[i], heads rising.
__device__ inline float token_probability(const RankParams& p, const float* scores, const float2* normaliser) {
  float sum = 0.0f;
  each_head<float, 16>(p, scores, normaliser,
                       [&](float score, float2 by) { sum = __fmaf_rn(exp2_fast(score - by.x), by.y, sum); });
  return sum;
}

// The same of tokens 4k .. 4k + 3, whose scores lie side by side: each token's sum in the same order.
__device__ inline float4 four_probabilities(const RankParams& p, const float* scores, const float2* normaliser) {
  float4 sum = {};
  each_head<float4, 8>(p, scores, normaliser, [&](float4 four, float2 by) { add_probabilities(sum, four, by); });
  return sum;
}

// terms[k] = probability of the token in column first + k, 0 where there is none. A thread four columns, or one where
// there are enough threads.
__device__ inline void score_run(const RankParams& p, const float* scores, const float2* normaliser, int first,
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

// The same where columns have to be found one by one: a thread a token of the blocks from u0 on, piece by piece.
__device__ inline void score_tokens(const RankParams& p, const float* scores, const float2* normaliser, int u0, int end,
                                    int together, int n, float* terms) {
  const BlockRules& r = p.a.shape.rules;
  const int ratio = r.l_sel / r.d, lead = (r.l - 1) / r.d, tokens = p.piece * ratio + lead;
  for (int item = threadIdx.x; item < together * tokens; item += blockDim.x) {
    const int u = u0 + item / tokens * p.piece;
    if (u >= end) break;
    const int j = block_at(p, u), i = j * ratio - lead + item % tokens;
    const std::int64_t c = p.a.cmp_map.rank == all_ranks ? 0 : j / p.per_chunk;
    terms[item] = i >= 0 && i < n ? token_probability(p, scores + score_column(p.a.cmp_map, c, i), normaliser) : 0.0f;
  }
}

// Keys of the blocks [begin, end) among those held. A piece is a run of blocks whose tokens have consecutive columns (a
// chunk's, or as many as fit): the tokens' probabilities, then a thread a block adds its tokens up by rising index,
// each weighed with its overlap, which is the same for every block.
template <class Keep>
__device__ inline void score_blocks(const RankParams& p, std::int64_t row, std::int64_t g, std::int64_t t, int begin,
                                    int end, const RankShared& at, Keep keep) {
  const LayerShape& s = p.a.shape;
  const BlockRules& r = s.rules;
  const int n = static_cast<int>(compressed_tokens(r, t)), local = static_cast<int>(eligible_blocks(r, t)) - r.n_local;
  const float* scores = static_cast<const float*>(p.a.scores) + (row * s.heads() + g * s.heads_per_group) * p.pitch;
  float* p_slc = p.a.p_slc ? p.a.p_slc + (row * s.groups + g) * p.a.p_slc_blocks : nullptr;
  const int ratio = r.l_sel / r.d, lead = (r.l - 1) / r.d, piece = p.piece, tokens = piece * ratio + lead;
  const int together = p.together, round = together * piece;  // blocks
  const RankColumns written = p.run.present ? written_columns(p, n) : RankColumns{};
  for (int k = threadIdx.x; k < ratio + lead; k += blockDim.x)
    at.overlaps[k] = overlap(r, std::int64_t{r.l} * ratio - lead + k, r.l);  // of a block far from the start
  for (int u0 = begin; u0 < end; u0 += round) {
    const int count = min(round, end - u0), first = p.run.present ? first_column(p, u0) : 0;
    if (p.run.present)
      score_run(p, scores, at.normaliser, first, first_column(p, u0 + count - 1) + ratio + lead - first, written,
                at.terms);
    else
      score_tokens(p, scores, at.normaliser, u0, end, together, n, at.terms);
    __syncthreads();
    for (int b = threadIdx.x; b < count; b += blockDim.x) {
      const int place = p.run.present ? first_column(p, u0 + b) - first : b / piece * tokens + b % piece * ratio;
      const float sum = block_score(at.terms + place, at.overlaps, ratio + lead);
      const int j = block_at(p, u0 + b);
      keep(u0 + b, key_of(j < r.n_init || j >= local, sum));
      if (p_slc && j < p.a.p_slc_blocks) p_slc[j] = sum;
    }
    __syncthreads();
  }
}

}  // namespace nsa::gpu
