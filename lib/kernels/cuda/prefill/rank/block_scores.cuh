#pragma once
// Prefill's block scores (prefill/rank/rank.cu): q and k_cmp multiplied once more.
//
// Four warpgroups of 4 queries walk K_cmp in the dense tiles of prefill/prefill.cuh: 64 x 128 scores in registers, each
// at once turned into a probability with the row's (m, sum) that attend_cmp left, summed over the 16 heads of the query
// (16 rows of one warp, in a fixed tree) and folded into block scores, which alone go to memory: 1/64 of what the raw
// scores would take. Where a block is four tokens and the end of the one before (l = 2 d, l' = 4 d) the copies bring a
// tile's rows in such an order that a lane has all four tokens of its blocks: it folds first, and a third of the values
// is left for the tree. FLOPs: 2 Dk a (head, token): 2048 cycles a tile of the four, the exponentials as much time
// beside them, 1400 issue slots. Measured: some 3400 cycles, whichever way products and exponentials are put beside one
// another (docs/kernels/README.md).

#include "kernels/cuda/prefill/prefill.cuh"

namespace nsa::gpu::scored {

constexpr int slots = 4;
constexpr int groups = 4;  // warpgroups that multiply: one's products run beside the others' exponentials
constexpr int queries = groups * group_queries, threads = 128 * (groups + 1);
constexpr int quad_tokens = 4;  // of a block, where l' = 4 d

struct ScoreParams {
  DenseParams d;
  DenseSource source;
  const float* ms;  // [rows][H][2]
  float* scores;    // [rows][groups][pitch]
  std::int64_t pitch;
};

__device__ __forceinline__ int tiles_of(const BlockRules& r, const DenseItem& item) {
  return (tokens_seen(r, item.last) + dense_tokens - 1) / dense_tokens;
}

// Quads: a tile's K with the first tokens of its 32 quadruples first, then the second ones, and so on.
template <int DK>
__device__ __forceinline__ void stream_quads(const ScoreParams& p, const DenseShared<DK, DK, slots, groups>& shared,
                                             const Turn<slots>& turn, int plane, int begin) {
  constexpr int box_bytes = DenseLayout<DK, DK, slots, groups>::tile_box;
  wait_for(shared.empty(turn.slot), turn.phase ^ 1);
  arrive_expecting(shared.full(turn.slot), DK / box_columns * box_bytes);
  for (int at = 0; at < dense_tokens; at += p.source.box_rows) {
    const Place place = place_of(p.source.map, begin + at);
    for (int i = 0; i < min(quad_tokens, p.source.box_rows); ++i) {
      const int row = (at + i) % quad_tokens * (dense_tokens / quad_tokens) + (at + i) / quad_tokens;
      for (int box = 0; box < DK / box_columns; ++box)
        copy_box(shared.slot(turn.slot) + box * box_bytes + row * 128, &p.source.k, shared.full(turn.slot),
                 box * box_columns, place.row + i, plane, place.rank);
    }
  }
}

template <int DK, bool Quads>
__device__ __forceinline__ void stream(const ScoreParams& p, const DenseShared<DK, DK, slots, groups>& shared,
                                       std::int64_t first_position) {
  Turn<slots> turn;
  int phase = 0;
  for (int index = blockIdx.x; index < p.d.items; index += gridDim.x, phase ^= 1) {
    const DenseItem item(p.d, index, first_position);
    shared.stream_queries(p.d, item, phase);
    const int tiles = tiles_of(p.d.shape.rules, item);
    for (int tile = 0; tile < tiles; ++tile, turn.next())
      if constexpr (Quads)
        stream_quads(p, shared, turn, item.plane, tile * dense_tokens);
      else
        shared.template stream_tile<DK>(p.source, p.source.k, turn, item.plane, tile * dense_tokens);
  }
}

// One warpgroup's state over an item; `terms`: the warp's sums over heads, of 128 tokens and the `lead` before them.
template <class T, int DK, bool Quads>
struct Rows {
  const ScoreParams& p;
  const DenseShared<DK, DK, slots, groups>& shared;
  int group;
  float* terms;
  const float* overlaps;  // of the lead + ratio tokens that reach into a block
  Turn<slots> turn;
  float offset[2];          // of rows g and g + 8: log2 of the row's sum, in powers of two
  int n, eligible;          // compressed tokens that the query sees, its blocks
  float carried;            // sum over heads of the last token so far, where lead is 1
  float* to;                // the query's block scores; null: no such query
  int ratio, lead, blocks;  // blocks: that end in a tile

  __device__ __forceinline__ void begin(const DenseItem& item);
  __device__ __forceinline__ void sum_heads(float (&s)[64], int begin) const;
  __device__ __forceinline__ void fold(int first_block);
  __device__ __forceinline__ void fold_quads(float (&s)[64], int begin);
  __device__ __forceinline__ void put_quads(float sum, float last, int first_block);
  __device__ __forceinline__ void add(int tile);
  __device__ __forceinline__ void run(const DenseItem& item, int phase);
};

template <class T, int DK, bool Quads>
__device__ __forceinline__ void Rows<T, DK, Quads>::begin(const DenseItem& item) {
  const LayerShape& shape = p.d.shape;
  const int lane = threadIdx.x % 32, query = item.first + group * group_queries + threadIdx.x % 128 / 32;
  const std::int64_t t = item.t + query - item.first;
  const std::int64_t row = std::int64_t{item.sequence} * p.d.tile.tokens + query;
  const bool exists = query < p.d.tile.tokens;
  n = tokens_seen(shape.rules, t);
  eligible = static_cast<int>(static_cast<unsigned>(t) / static_cast<unsigned>(shape.rules.l_sel)) + 1;
  to = exists ? p.scores + (row * shape.groups + item.group) * p.pitch : nullptr;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int head = lane / 4 + half * 8;
    offset[half] = INFINITY;
    if (!exists || head >= shape.heads_per_group) continue;
    const float2 ms =
        reinterpret_cast<const float2*>(p.ms)[row * shape.heads() + item.group * shape.heads_per_group + head];
    if (ms.y > 0.0f) offset[half] = ms.x * log2_e + log2f(ms.y);
  }
  for (int i = lane; i < lead; i += 32) terms[i - lead] = 0.0f;
  carried = 0.0f;
}

// exp2_fast, and the compiler leaves it where it stands.
__device__ __forceinline__ float exp2_in_place(float x) {
  float y;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Lanes `Half` apart share 2 * Half values: each keeps half of them, the upper lane the upper half, and adds the
// other's.
template <int Half>
__device__ __forceinline__ void hand_over(float (&x)[32], int i) {
  const bool upper = threadIdx.x & Half;
  const float kept = upper ? x[i + Half] : x[i], given = upper ? x[i] : x[i + Half];
  x[i] = kept + __shfl_xor_sync(0xffffffffu, given, Half);
}

// Probabilities of the tile from `begin`, summed over the query's heads, to `terms`. The tree: rows g and g + 8,
// then lanes 16, 8 and 4 apart, each time handing half of the columns over. No branch behind the first exponential, and
// four columns at a time go down the tree: handing over runs beside the exponentials.
template <class T, int DK, bool Quads>
__device__ __forceinline__ void Rows<T, DK, Quads>::sum_heads(float (&s)[64], int begin) const {
  const float scale = log2_e / sqrtf(static_cast<float>(DK));
  const int lane = threadIdx.x % 32, quad = lane % 4;
  if (begin + dense_tokens > n) {
    const int end = n - begin;
#pragma unroll
    for (int i = 0; i < 64; ++i)
      if (i / 4 * 8 + quad * 2 + i % 2 >= end) s[i] = -INFINITY;
  }
  const auto both = [&](int i) {
    const int at = i / 2 * 4 + i % 2;
    return exp2_in_place(fmaf(s[at], scale, -offset[0])) + exp2_in_place(fmaf(s[at + 2], scale, -offset[1]));
  };
  float x[32];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = i; j < 16; j += 4) {
      x[j] = both(j), x[j + 16] = both(j + 16);
      hand_over<16>(x, j);
    }
    hand_over<8>(x, i), hand_over<8>(x, i + 4);
    hand_over<4>(x, i);
  }
  const int first = (lane & 16 ? 64 : 0) + (lane & 8 ? 32 : 0) + (lane & 4 ? 16 : 0) + quad * 2;
  *reinterpret_cast<float2*>(terms + first) = make_float2(x[0], x[1]);
  *reinterpret_cast<float2*>(terms + first + 8) = make_float2(x[2], x[3]);
}

// The blocks that end in the tile; its last `lead` tokens reach into the next one's first block.
template <class T, int DK, bool Quads>
__device__ __forceinline__ void Rows<T, DK, Quads>::fold(int first_block) {
  __syncwarp();
  const int lane = threadIdx.x % 32;
  for (int b = lane; b < blocks; b += 32) {
    float sum = 0.0f;
    for (int k = 0; k < ratio + lead; ++k) sum += terms[b * ratio + k - lead] * overlaps[k];
    if (to && first_block + b < eligible) to[first_block + b] = sum;
  }
  __syncwarp();
  for (int i = lane; i < lead; i += 32) terms[i - lead] = terms[dense_tokens + i - lead];  // lead < 128: no overlap
  __syncwarp();
}

// Of two values, one of which is a lane's and the other that of the lane `Half` apart: each keeps its own, the upper
// lane `high`, and adds the other's.
template <int Half>
__device__ __forceinline__ float handed_over(float low, float high) {
  const bool upper = threadIdx.x & Half;
  return (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, Half);
}

// l = 2 d, l' = 4 d: a block is twice its first three tokens, and once its last and the one before it. Column 32 i + b
// of the tile is token i of block b, so a lane has all of 8 blocks, 8 u + 2 quad + e, for two heads; only what a block
// takes of the one before comes from elsewhere. Then the heads: lanes 16, 8 and 4 apart, each handing half of the
// blocks over.
template <class T, int DK, bool Quads>
__device__ __forceinline__ void Rows<T, DK, Quads>::fold_quads(float (&s)[64], int begin) {
  const float scale = log2_e / sqrtf(static_cast<float>(DK));
  if (begin + dense_tokens > n) {
    const int end = n - begin - static_cast<int>(threadIdx.x) % 4 * 8;
#pragma unroll
    for (int i = 0; i < 64; ++i)
      if (i / 4 % 4 * 32 + i % 2 * 4 + i / 16 >= end) s[i] = -INFINITY;
  }
  const auto both = [&](int i, int u, int e) {
    const int at = 16 * i + 4 * u + e;
    return exp2_in_place(fmaf(s[at], scale, -offset[0])) + exp2_in_place(fmaf(s[at + 2], scale, -offset[1]));
  };
  float sum[4][2], last[4];
#pragma unroll
  for (int u = 0; u < 2; ++u) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int v = u; v < 4; v += 2) {
        const float before = e ? last[v] : 0.0f;
        const float twice = both(0, v, e) + both(1, v, e) + both(2, v, e);
        last[v] = both(3, v, e);
        sum[v][e] = fmaf(2.0f, twice, last[v]);
        if (e) sum[v][e] += before;
      }
      sum[u][e] = handed_over<16>(sum[u][e], sum[u + 2][e]);
    }
    last[u] = handed_over<16>(last[u], last[u + 2]);
  }
  const float mine = handed_over<4>(handed_over<8>(sum[0][0], sum[1][0]), handed_over<8>(sum[0][1], sum[1][1]));
  const float end = handed_over<8>(last[0], last[1]);
  put_quads(mine, end + __shfl_xor_sync(0xffffffffu, end, 4), begin / quad_tokens);
}

// Lane 8 u + 4 e + quad has block 8 u + 2 quad + e of the tile and the last token of 8 u + 2 quad + 1.
template <class T, int DK, bool Quads>
__device__ __forceinline__ void Rows<T, DK, Quads>::put_quads(float sum, float last, int first_block) {
  const int lane = threadIdx.x % 32, block = first_block + lane / 8 * 8 + lane % 4 * 2 + lane / 4 % 2;
  const float before = __shfl_sync(0xffffffffu, last, lane % 4 ? lane - 1 : lane - 5);
  if (lane % 8 < 4) sum += lane == 0 ? carried : before;
  carried = before;
  if (to && block < eligible) to[block] = sum;
}

template <class T, int DK, bool Quads>
__device__ __forceinline__ void Rows<T, DK, Quads>::add(int tile) {
  float s[64];
  const int slot = uniform(turn.slot);
  wait_for(shared.full(slot), turn.phase);
  products_begin();
  queue_scores<T>(s, shared, group, slot);
  products_wait<0>();
  settled(s);
  arrive_if(shared.empty(slot), threadIdx.x % 32 == 0);
  turn.next();
  if constexpr (Quads) {
    fold_quads(s, tile * dense_tokens);
  } else {
    sum_heads(s, tile * dense_tokens);
    fold(tile * blocks);
  }
}

template <class T, int DK, bool Quads>
__device__ __forceinline__ void Rows<T, DK, Quads>::run(const DenseItem& item, int phase) {
  begin(item);
  const int tiles = uniform(tiles_of(p.d.shape.rules, item));
  wait_for(shared.queries_full(), phase);
  for (int tile = 0; tile < tiles; ++tile) add(tile);
  if (threadIdx.x % 32 == 0) arrive(shared.queries_empty());
  // An eligible block may begin behind the last tile.
  for (int tile = tiles; tile * blocks < eligible; ++tile) {
    if constexpr (Quads) {
      put_quads(0.0f, 0.0f, tile * blocks);
    } else {
      for (int i = threadIdx.x % 32; i < dense_tokens; i += 32) terms[i] = 0.0f;
      fold(tile * blocks);
    }
  }
}

template <class T, int DK, bool Quads>
__global__ void __launch_bounds__(threads, 1) score_kernel(const __grid_constant__ ScoreParams p) {
#ifdef NSA_WGMMA
  extern __shared__ char memory[];
  __shared__ __align__(16) float terms[4 * groups][most_lead + dense_tokens];
  __shared__ float overlaps[most_lead + dense_tokens];
  const BlockRules& r = p.d.shape.rules;
  const int ratio = r.l_sel / r.d, lead = (r.l - 1) / r.d;
  for (int k = threadIdx.x; k < ratio + lead; k += threads)
    overlaps[k] = overlap(r, std::int64_t{r.l} * ratio - lead + k, r.l);  // of a block far from the start
  const DenseShared<DK, DK, slots, groups> shared(memory);
  if (threadIdx.x == 0) shared.open();
  __syncthreads();
  griddep_wait();
  const std::int64_t first_position = *p.d.tile.first_position;
  const int group = uniform(threadIdx.x / 128);
  if (group == groups) {
    warpgroup_reg_dealloc<24>();
    if (threadIdx.x % 128 == 0) stream<DK, Quads>(p, shared, first_position);
  } else {
    warpgroup_reg_alloc<112>();
    Rows<T, DK, Quads> rows{p, shared, group, terms[threadIdx.x / 32] + most_lead, overlaps};
    rows.ratio = ratio;
    rows.lead = lead;
    rows.blocks = dense_tokens / ratio;
    int phase = 0;
    for (int index = blockIdx.x; index < p.d.items; index += gridDim.x, phase ^= 1)
      rows.run(DenseItem(p.d, index, first_position), phase);
  }
#endif
}

}  // namespace nsa::gpu::scored
