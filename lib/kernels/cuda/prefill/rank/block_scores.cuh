#pragma once
// Prefill's block scores (prefill/rank/rank.cu), recomputed from q and k_cmp.
//
// Tiling: four consumer warpgroups of 4 queries read K_cmp in the dense tiles of prefill/prefill.cuh: 64 x 128 scores
// in registers. Each becomes a probability with the row's (m, sum) that cmp's attention stored, is summed over the 16
// heads of the query (16 rows of one warp, in a fixed tree) and over the tokens of a block. Only block scores go to
// memory: 1/64 of the bytes of raw scores. Where a block is four tokens and the end of the previous one (l = 2 d, l' =
// 4 d), the copies permute a tile's rows so that a lane has all four tokens of its blocks: the sum over tokens comes
// first, and the sum over heads has a third of the values. FLOPs: 2 Dk a (head, token), 2048 cycles a tile of the four
// warpgroups; the exponentials take as much time in parallel, and 1400 issue slots. Bound: products and exponentials
// together; measured some 3400 cycles a tile, for every tried overlap of the two (docs/kernels/README.md).

#include "kernels/cuda/prefill/prefill.cuh"

namespace nsa::gpu::block_scoring {

template <int DK>
constexpr int slots = DK > 192   ? 1
                      : DK > 128 ? 2
                                 : 4;
constexpr int consumer_warpgroups = 4;  // the products of one overlap with the exponentials of the others
constexpr int item_queries = consumer_warpgroups * warpgroup_queries, threads = 128 * (consumer_warpgroups + 1);
constexpr int quad_tokens = 4;  // of a block, where l' = 4 d

template <int DK>
using Shared = DenseShared<DK, DK, slots<DK>, consumer_warpgroups>;

struct BlockScoreParams {
  DenseWork work;
  KvTensorMaps kv;  // K_cmp
  const float* ms;  // [rows][H][2], from the part's first head on
  float* scores;    // [rows][G][pitch]
  std::int64_t pitch;
  PrefillPart part;  // the last member: prefill/dense/producer.cuh
};

__device__ __forceinline__ int kv_tile_count(const BlockRules& r, const DenseWorkItem& item) {
  return (visible_compressed_tokens(r, item.last_t) + dense_tile_tokens - 1) / dense_tile_tokens;
}

// The producer thread: a tile of K_cmp whose rows are permuted to the first tokens of its 32 quadruples, then the
// second tokens, and so on.
template <int DK>
__device__ __forceinline__ void load_quads(const BlockScoreParams& p, const Shared<DK>& shared,
                                           const PipelineState<slots<DK>>& state, int plane, int begin) {
  constexpr int box_bytes = Shared<DK>::Storage::tile_box;
  mbarrier_wait(shared.empty(state.slot), state.phase ^ 1);
  mbarrier_arrive_expect_tx(shared.full(state.slot), DK / box_columns * box_bytes);
  for (int at = 0; at < dense_tile_tokens; at += p.kv.box_rows) {
    const RowCoordinate from = row_coordinate(p.kv.map, begin + at);
    for (int i = 0; i < min(quad_tokens, p.kv.box_rows); ++i) {
      const int row = (at + i) % quad_tokens * (dense_tile_tokens / quad_tokens) + (at + i) / quad_tokens;
      for (int box = 0; box < DK / box_columns; ++box)
        tma_load(shared.slot(state.slot) + box * box_bytes + row * 128, &p.kv.k, shared.full(state.slot),
                 box * box_columns, from.row + i, plane, from.rank);
    }
  }
}

template <int DK, bool Quads>
__device__ __forceinline__ void produce(const BlockScoreParams& p, const Shared<DK>& shared,
                                        std::int64_t first_position) {
  PipelineState<slots<DK>> state;
  int phase = 0;
  for (int index = blockIdx.x; index < p.work.items; index += gridDim.x, phase ^= 1) {
    const DenseWorkItem item(p.work, index, first_position);
    shared.load_queries(p.work, item, phase);
    const int tiles = kv_tile_count(p.work.shape.rules, item);
    for (int tile = 0; tile < tiles; ++tile, state.advance())
      if constexpr (Quads)
        load_quads(p, shared, state, item.plane, tile * dense_tile_tokens);
      else
        shared.template load_tile<DK>(p.kv, p.kv.k, state, item.plane, tile * dense_tile_tokens);
  }
}

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
  float row_lse[2];         // of rows g and g + 8, in base 2
  int visible, eligible;    // compressed tokens that the query sees, blocks it may select
  float halo_sum;           // Quads: sum over heads of the previous tile's last token
  float* to;                // the query's block scores; null past the tile's last query
  int ratio, halo, blocks;  // blocks: per tile

  __device__ __forceinline__ void store_score(int block, float sum) const {
    to[block] = !Tuned && !p.part.is_first() ? to[block] + sum : sum;
  }
  __device__ __forceinline__ void begin(const DenseWorkItem& item);
  __device__ __forceinline__ void sum_heads(float (&s)[64], int begin) const;
  __device__ __forceinline__ void sum_tokens(int first_block);
  __device__ __forceinline__ void sum_quads(float (&s)[64], int begin);
  __device__ __forceinline__ void store_quads(float sum, float last, int first_block);
  __device__ __forceinline__ void score_tile(int tile);
  __device__ __forceinline__ void score_item(const DenseWorkItem& item, int phase);
};

template <class T, int DK, bool Tuned, bool Quads>
__device__ __forceinline__ void ScoreConsumer<T, DK, Tuned, Quads>::begin(const DenseWorkItem& item) {
  const LayerShape& shape = p.work.shape;
  const int lane = threadIdx.x % 32, query = item.first_query + warpgroup * warpgroup_queries + threadIdx.x % 128 / 32;
  const std::int64_t t = item.t + query - item.first_query;
  const std::int64_t row = std::int64_t{item.sequence} * p.work.tile.tokens + query;
  const bool exists = query < p.work.tile.tokens;
  visible = visible_compressed_tokens(shape.rules, t);
  eligible = static_cast<int>(static_cast<unsigned>(t) / static_cast<unsigned>(shape.rules.l_sel)) + 1;
  to = exists ? p.scores + (row * shape.groups + item.group) * p.pitch : nullptr;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int head = lane / 4 + half * 8;
    row_lse[half] = INFINITY;
    if (!exists || head >= (Tuned ? shape.heads_per_group : p.part.heads)) continue;
    const float2 ms =
        reinterpret_cast<const float2*>(p.ms)[row * shape.heads() + item.group * shape.heads_per_group + head];
    if (ms.y > 0.0f) row_lse[half] = ms.x * log2_e + log2f(ms.y);
  }
  for (int i = lane; i < halo; i += 32) token_sums[i - halo] = 0.0f;
  halo_sum = 0.0f;
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
  if (begin + dense_tile_tokens > visible) {
    const int end = visible - begin;
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
    if (to && first_block + b < eligible) store_score(first_block + b, sum);
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
  if (begin + dense_tile_tokens > visible) {
    const int end = visible - begin - static_cast<int>(threadIdx.x) % 4 * 8;
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
  if (lane % 8 < 4) sum += lane == 0 ? halo_sum : before;
  halo_sum = before;
  if (to && block < eligible) store_score(block, sum);
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
  for (int tile = tiles; tile * blocks < eligible; ++tile) {
    if constexpr (Quads) {
      store_quads(0.0f, 0.0f, tile * blocks);
    } else {
      for (int i = threadIdx.x % 32; i < dense_tile_tokens; i += 32) token_sums[i] = 0.0f;
      sum_tokens(tile * blocks);
    }
  }
}

template <class T, int DK, bool Tuned, bool Quads>
__global__ void __launch_bounds__(threads, 1) score_kernel(const __grid_constant__ BlockScoreParams p) {
#ifdef NSA_WGMMA
  extern __shared__ char memory[];
  __shared__ __align__(16) float token_sums[4 * consumer_warpgroups][prefill_max_halo + dense_tile_tokens];
  __shared__ float overlap_weights[prefill_max_halo + dense_tile_tokens];
  const BlockRules& r = p.work.shape.rules;
  const int ratio = r.l_sel / r.d, halo = (r.l - 1) / r.d;
  for (int k = threadIdx.x; k < ratio + halo; k += threads)
    overlap_weights[k] = overlap(r, std::int64_t{r.l} * ratio - halo + k, r.l);  // of a block far from the start
  const Shared<DK> shared(memory);
  if (threadIdx.x == 0) shared.init_barriers();
  __syncthreads();
  griddep_wait();
  const std::int64_t first_position = *p.work.tile.first_position;
  const int warpgroup = warp_uniform(threadIdx.x / 128);
  if (warpgroup == consumer_warpgroups) {
    warpgroup_reg_dealloc<24>();
    if (threadIdx.x % 128 == 0) produce<DK, Quads>(p, shared, first_position);
  } else {
    warpgroup_reg_alloc<112>();
    ScoreConsumer<T, DK, Tuned, Quads> consumer{p, shared, warpgroup, token_sums[threadIdx.x / 32] + prefill_max_halo,
                                                overlap_weights};
    consumer.ratio = ratio;
    consumer.halo = halo;
    consumer.blocks = dense_tile_tokens / ratio;
    int phase = 0;
    for (int index = blockIdx.x; index < p.work.items; index += gridDim.x, phase ^= 1)
      consumer.score_item(DenseWorkItem(p.work, index, first_position), phase);
  }
#endif
}

}  // namespace nsa::gpu::block_scoring
