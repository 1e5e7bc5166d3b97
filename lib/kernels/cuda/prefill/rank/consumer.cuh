#pragma once
// Prefill's block scores (prefill/rank/block_scores.cuh): a consumer warpgroup.

#include "kernels/cuda/prefill/rank/producer.cuh"

namespace nsa::gpu::block_scoring {

// A consumer warpgroup's state over a work item. The halo of a block: the last tokens of the previous block, which
// overlap it.
template <class T, int DK, bool Tuned, bool Quads>
struct ScoreConsumer {
  const BlockScoreParams& p;
  const Shared<DK>& shared;
  int warpgroup;
  float* token_sums;             // of the warp: probabilities summed over heads, [-halo, 128) from the tile's start
  const float* overlap_weights;  // of the halo + ratio tokens that overlap a block
  PipelineState<slots<DK>> state;
  // Of the lane's rows g and g + 8, and of their queries, of which the first counts where a warp has one.
  using Rows = LaneRows<Tuned>;
  float row_lse[2];                                     // in base 2
  int visible[Rows::queries], eligible[Rows::queries];  // compressed tokens that it sees, blocks it may select
  float halo_sum[Rows::queries];                        // Quads: sum over heads of the previous tile's last token
  float* to[Rows::queries];                             // its block scores; null past the tile's last query
  int ratio, halo, blocks;                              // blocks: per tile

  __device__ __forceinline__ void store_score(int query, int block, float sum) const {
    float& score = to[query][block];
    score = !Tuned && !p.part.is_first() ? score + sum : sum;
  }
  __device__ __forceinline__ void begin(const DenseWorkItem& item);
  __device__ __forceinline__ void sum_heads(float (&s)[64], int begin) const;
  __device__ __forceinline__ void sum_tokens(int first_block);
  __device__ __forceinline__ void sum_quads(float (&s)[64], int begin);
  __device__ __forceinline__ void store_quads(float sum, float last, int first_block);
  template <int Levels>
  __device__ __forceinline__ void sum_packed_heads(int query, float (&sum)[4][2], float (&last)[4], int first_block);
  __device__ __forceinline__ void store_packed_quads(int query, float (&sum)[4][2], float (&last)[4], int first_block);
  __device__ __forceinline__ void sum_packed_quads(float (&s)[64], int begin);
  __device__ __forceinline__ void store_no_quads(int first_block);
  __device__ __forceinline__ void score_tile(int tile);
  __device__ __forceinline__ void score_item(const DenseWorkItem& item, int phase);
};

template <class T, int DK, bool Tuned, bool Quads>
__device__ __forceinline__ void ScoreConsumer<T, DK, Tuned, Quads>::begin(const DenseWorkItem& item) {
  const LayerShape& shape = p.work.shape;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = item.first_query + Rows::query(p.part, warpgroup, half), head = Rows::head(p.part, half);
    const std::int64_t t = item.t + query - item.first_query;
    const std::int64_t row = std::int64_t{item.sequence} * p.work.tile.tokens + query;
    const bool exists = query < p.work.tile.tokens;
    if (half < Rows::queries) {
      visible[half] = visible_compressed_tokens(shape.rules, t);
      eligible[half] = static_cast<int>(static_cast<unsigned>(t) / static_cast<unsigned>(shape.rules.l_sel)) + 1;
      to[half] = exists ? p.scores + (row * shape.groups + item.group) * p.pitch : nullptr;
      halo_sum[half] = 0.0f;
    }
    row_lse[half] = INFINITY;
    if (!exists || head >= (Tuned ? shape.heads_per_group : p.part.heads)) continue;
    const float2 ms =
        reinterpret_cast<const float2*>(p.ms)[row * shape.heads() + item.group * shape.heads_per_group + head];
    if (ms.y > 0.0f) row_lse[half] = ms.x * log2_e + log2f(ms.y);
  }
  for (int i = lane; i < halo; i += 32) token_sums[i - halo] = 0.0f;
}

// exp2_fast that the compiler does not move.
__device__ __forceinline__ float exp2_in_place(float x) {
  float y;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// One step of a sum over lanes that also splits the columns: lanes `Half` apart each keep half of 2 * Half values, the
// upper lane the upper half, and add the other lane's.
template <int Half>
__device__ __forceinline__ void exchange_halves(float (&x)[32], int i) {
  const bool upper = threadIdx.x & Half;
  const float kept = upper ? x[i + Half] : x[i], sent = upper ? x[i] : x[i + Half];
  x[i] = kept + __shfl_xor_sync(0xffffffffu, sent, Half);
}

// Probabilities of the tile from `begin`, summed over the query's heads, to `token_sums`. The tree: rows g and g + 8,
// then lanes 16, 8 and 4 apart, with half of the columns exchanged at each step. There is no branch after the first
// exponential, and four columns at a time go down the tree, so that exchanges overlap with exponentials.
template <class T, int DK, bool Tuned, bool Quads>
__device__ __forceinline__ void ScoreConsumer<T, DK, Tuned, Quads>::sum_heads(float (&s)[64], int begin) const {
  const float scale = Tuned ? log2_e / sqrtf(static_cast<float>(DK)) : p.work.scale;
  const int lane = threadIdx.x % 32, quad = lane % 4;
  if (begin + dense_tile_tokens > visible[0]) {
    const int end = visible[0] - begin;
#pragma unroll
    for (int i = 0; i < 64; ++i)
      if (i / 4 * 8 + quad * 2 + i % 2 >= end) s[i] = -INFINITY;
  }
  const auto row_pair = [&](int i) {
    const int at = i / 2 * 4 + i % 2;
    return exp2_in_place(fmaf(s[at], scale, -row_lse[0])) + exp2_in_place(fmaf(s[at + 2], scale, -row_lse[1]));
  };
  float x[32];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = i; j < 16; j += 4) {
      x[j] = row_pair(j), x[j + 16] = row_pair(j + 16);
      exchange_halves<16>(x, j);
    }
    exchange_halves<8>(x, i), exchange_halves<8>(x, i + 4);
    exchange_halves<4>(x, i);
  }
  const int first = (lane & 16 ? 64 : 0) + (lane & 8 ? 32 : 0) + (lane & 4 ? 16 : 0) + quad * 2;
  *reinterpret_cast<float2*>(token_sums + first) = make_float2(x[0], x[1]);
  *reinterpret_cast<float2*>(token_sums + first + 8) = make_float2(x[2], x[3]);
}

// Scores of the blocks that end in the tile. The last `halo` tokens overlap the next tile's first block.
template <class T, int DK, bool Tuned, bool Quads>
__device__ __forceinline__ void ScoreConsumer<T, DK, Tuned, Quads>::sum_tokens(int first_block) {
  __syncwarp();
  const int lane = threadIdx.x % 32;
  for (int b = lane; b < blocks; b += 32) {
    float sum = 0.0f;
    for (int k = 0; k < ratio + halo; ++k) sum += token_sums[b * ratio + k - halo] * overlap_weights[k];
    if (to[0] && first_block + b < eligible[0]) store_score(0, first_block + b, sum);
  }
  __syncwarp();
  for (int i = lane; i < halo; i += 32)
    token_sums[i - halo] = token_sums[dense_tile_tokens + i - halo];  // halo < 128: no overlap
  __syncwarp();
}

// exchange_halves() of two values: the upper of two lanes `Half` apart keeps `high`, the lower keeps `low`; each adds
// the other lane's.
template <int Half>
__device__ __forceinline__ float exchange_half(float low, float high) {
  const bool upper = threadIdx.x & Half;
  return (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, Half);
}

// l = 2 d, l' = 4 d: a block's score is twice its first three tokens plus its last token and the previous block's last.
// Column 32 i + b of the tile is token i of block b, so a lane has all tokens of 8 blocks, 8 u + 2 quad + e, for two
// heads; only the previous block's token may be another lane's. The sum over heads: lanes 16, 8 and 4 apart, with half
// of the blocks exchanged at each step.
template <class T, int DK, bool Tuned, bool Quads>
__device__ __forceinline__ void ScoreConsumer<T, DK, Tuned, Quads>::sum_quads(float (&s)[64], int begin) {
  const float scale = Tuned ? log2_e / sqrtf(static_cast<float>(DK)) : p.work.scale;
  if (begin + dense_tile_tokens > visible[0]) {
    const int end = visible[0] - begin - static_cast<int>(threadIdx.x) % 4 * 8;
#pragma unroll
    for (int i = 0; i < 64; ++i)
      if (i / 4 % 4 * 32 + i % 2 * 4 + i / 16 >= end) s[i] = -INFINITY;
  }
  const auto row_pair = [&](int i, int u, int e) {
    const int at = 16 * i + 4 * u + e;
    return exp2_in_place(fmaf(s[at], scale, -row_lse[0])) + exp2_in_place(fmaf(s[at + 2], scale, -row_lse[1]));
  };
  float sum[4][2], last[4];
#pragma unroll
  for (int u = 0; u < 2; ++u) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int v = u; v < 4; v += 2) {
        const float before = e ? last[v] : 0.0f;
        const float twice = row_pair(0, v, e) + row_pair(1, v, e) + row_pair(2, v, e);
        last[v] = row_pair(3, v, e);
        sum[v][e] = fmaf(2.0f, twice, last[v]);
        if (e) sum[v][e] += before;
      }
      sum[u][e] = exchange_half<16>(sum[u][e], sum[u + 2][e]);
    }
    last[u] = exchange_half<16>(last[u], last[u + 2]);
  }
  const float mine = exchange_half<4>(exchange_half<8>(sum[0][0], sum[1][0]), exchange_half<8>(sum[0][1], sum[1][1]));
  const float end = exchange_half<8>(last[0], last[1]);
  store_quads(mine, end + __shfl_xor_sync(0xffffffffu, end, 4), begin / quad_tokens);
}

// Lane 8 u + 4 e + quad has block 8 u + 2 quad + e of the tile and the last token of 8 u + 2 quad + 1.
template <class T, int DK, bool Tuned, bool Quads>
__device__ __forceinline__ void ScoreConsumer<T, DK, Tuned, Quads>::store_quads(float sum, float last,
                                                                                int first_block) {
  const int lane = threadIdx.x % 32, block = first_block + lane / 8 * 8 + lane % 4 * 2 + lane / 4 % 2;
  const float before = __shfl_sync(0xffffffffu, last, lane % 4 ? lane - 1 : lane - 5);
  if (lane % 8 < 4) sum += lane == 0 ? halo_sum[0] : before;
  halo_sum[0] = before;
  if (to[0] && block < eligible[0]) store_score(0, block, sum);
}

// The same where a query has 1, 2, 4 or 8 rows of a warp (p.part.query_rows), each half of a lane's rows by itself.
template <class T, int DK, bool Tuned, bool Quads>
__device__ __forceinline__ void ScoreConsumer<T, DK, Tuned, Quads>::sum_packed_quads(float (&s)[64], int begin) {
  const float scale = p.work.scale;
#pragma unroll
  for (int half = 0; half < Rows::queries; ++half) {
    const int end = visible[half] - begin - static_cast<int>(threadIdx.x) % 4 * 8;
    float sum[4][2], last[4];
#pragma unroll
    for (int u = 0; u < 4; ++u)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const auto probability = [&](int i) {
          const float score = u * 32 + e * 4 + i < end ? s[16 * i + 4 * u + 2 * half + e] : -INFINITY;
          return exp2_in_place(fmaf(score, scale, -row_lse[half]));
        };
        const float before = e ? last[u] : 0.0f;
        const float twice = probability(0) + probability(1) + probability(2);
        last[u] = probability(3);
        sum[u][e] = fmaf(2.0f, twice, last[u]);
        if (e) sum[u][e] += before;
      }
    store_packed_quads(half, sum, last, begin / quad_tokens);
  }
}

// A lane has 8 blocks, 8 u + 2 quad + e, of one head of the query, and the last token of those with e = 1. Sums them
// over 2^Levels heads: lanes 16, 8 and 4 apart, the last `Levels` of them, with half of the blocks exchanged at each
// step; and stores them. The block before a lane's first is of the lane before it, or of the query's last lane.
template <class T, int DK, bool Tuned, bool Quads>
template <int Levels>
__device__ __forceinline__ void ScoreConsumer<T, DK, Tuned, Quads>::sum_packed_heads(int query, float (&sum)[4][2],
                                                                                     float (&last)[4],
                                                                                     int first_block) {
  constexpr int values = Levels < 2 ? 4 : Levels == 2 ? 2 : 1;  // of u, in the lane
  if constexpr (Levels == 3)
#pragma unroll
    for (int u = 0; u < 2; ++u) {
#pragma unroll
      for (int e = 0; e < 2; ++e) sum[u][e] = exchange_half<16>(sum[u][e], sum[u + 2][e]);
      last[u] = exchange_half<16>(last[u], last[u + 2]);
    }
  if constexpr (Levels >= 2)
#pragma unroll
    for (int i = 0; i < values; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) sum[i][e] = exchange_half<8>(sum[2 * i][e], sum[2 * i + 1][e]);
      last[i] = exchange_half<8>(last[2 * i], last[2 * i + 1]);
    }
  if constexpr (Levels >= 1)
#pragma unroll
    for (int i = 0; i < values; ++i) {
      sum[i][0] = exchange_half<4>(sum[i][0], sum[i][1]);
      last[i] += __shfl_xor_sync(0xffffffffu, last[i], 4);
    }
  const int lane = threadIdx.x % 32, quad = lane % 4,
            u_lane = Levels == 3   ? lane / 8
                     : Levels == 2 ? lane / 8 % 2
                                   : 0,
            e_lane = Levels > 0 ? lane / 4 % 2 : 0;
  const int last_lane = Levels == 3 ? (lane + 27) % 32 : Levels == 2 ? (lane ^ 8) + 3 : lane + 3;
  const bool wraps = quad == 0 && u_lane == 0;
  float previous = halo_sum[query];
#pragma unroll
  for (int i = 0; i < values; ++i) {
    const float received = __shfl_sync(0xffffffffu, last[i], quad ? lane - 1 : last_lane);
    const float before = wraps ? previous : received;
    previous = received;
    const int block = first_block + 8 * (Levels == 2 ? 2 * i + u_lane : i + u_lane) + 2 * quad + e_lane;
    if (e_lane == 0) sum[i][0] += before;
    if (!to[query]) continue;
    if (block < eligible[query]) store_score(query, block, sum[i][0]);
    if (Levels == 0 && block + 1 < eligible[query]) store_score(query, block + 1, sum[i][1]);
  }
  halo_sum[query] = previous;
}

template <class T, int DK, bool Tuned, bool Quads>
__device__ __forceinline__ void ScoreConsumer<T, DK, Tuned, Quads>::store_packed_quads(int query, float (&sum)[4][2],
                                                                                       float (&last)[4],
                                                                                       int first_block) {
  if (p.part.query_rows == 8)
    sum_packed_heads<3>(query, sum, last, first_block);
  else if (p.part.query_rows == 4)
    sum_packed_heads<2>(query, sum, last, first_block);
  else if (p.part.query_rows == 2)
    sum_packed_heads<1>(query, sum, last, first_block);
  else
    sum_packed_heads<0>(query, sum, last, first_block);
}

// Blocks whose tokens nobody sees.
template <class T, int DK, bool Tuned, bool Quads>
__device__ __forceinline__ void ScoreConsumer<T, DK, Tuned, Quads>::store_no_quads(int first_block) {
  if constexpr (!Tuned) {
    if (p.part.query_rows < heads_per_tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum[4][2] = {}, last[4] = {};
        store_packed_quads(half, sum, last, first_block);
      }
      return;
    }
  }
  store_quads(0.0f, 0.0f, first_block);
}

template <class T, int DK, bool Tuned, bool Quads>
__device__ __forceinline__ void ScoreConsumer<T, DK, Tuned, Quads>::score_tile(int tile) {
  float s[64];
  const int slot = warp_uniform(state.slot);
  mbarrier_wait(shared.full(slot), state.phase);
  warpgroup_arrive();
  issue_qk<T>(s, shared, warpgroup, slot);
  warpgroup_wait<0>();
  warpgroup_fence_operand(s);
  mbarrier_arrive_if(shared.empty(slot), threadIdx.x % 32 == 0);
  state.advance();
  if constexpr (Quads) {
    if constexpr (!Tuned)
      if (p.part.query_rows < heads_per_tile) return sum_packed_quads(s, tile * dense_tile_tokens);
    sum_quads(s, tile * dense_tile_tokens);
  } else {
    sum_heads(s, tile * dense_tile_tokens);
    sum_tokens(tile * blocks);
  }
}

template <class T, int DK, bool Tuned, bool Quads>
__device__ __forceinline__ void ScoreConsumer<T, DK, Tuned, Quads>::score_item(const DenseWorkItem& item, int phase) {
  begin(item);
  const int tiles = warp_uniform(kv_tile_count(p.work.shape.rules, item));
  mbarrier_wait(shared.queries_full(), phase);
  for (int tile = 0; tile < tiles; ++tile) score_tile(tile);
  if (threadIdx.x % 32 == 0) mbarrier_arrive(shared.queries_empty());
  // An eligible block may begin after the last tile.
  const int end = Tuned ? eligible[0] : static_cast<int>(item.last_t / p.work.shape.rules.l_sel) + 1;
  for (int tile = tiles; tile * blocks < end; ++tile) {
    if constexpr (Quads) {
      store_no_quads(tile * blocks);
    } else {
      for (int i = threadIdx.x % 32; i < dense_tile_tokens; i += 32) token_sums[i] = 0.0f;
      sum_tokens(tile * blocks);
    }
  }
}

}  // namespace nsa::gpu::block_scoring
