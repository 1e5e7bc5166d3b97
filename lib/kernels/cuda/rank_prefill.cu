// Prefill's rank: importance of the selection blocks formed once more from q and k_cmp, and the best n of them.
//
// score_kernel walks K_cmp in the dense tiles of prefill.cuh, 4 warpgroups to a CTA: 64 x 128 scores in registers, each
// at once turned into a probability with the row's (m, sum) that attend_cmp left, summed over the 16 heads of the query
// (16 rows of one warp, in a fixed tree) and folded into block scores, which alone go to memory: 1/64 of what the raw
// scores would take. FLOPs: 2 Dk a (head, token), the exponentials as much time again. Bound: either, half of
// attend_cmp's time. choose_kernel takes a warp a (row, group): the n-th best of 32 lanes' maxima is a bound below
// which nothing is chosen; what passes it, some 25 blocks of a thousand, is sorted. Bound: reading the block scores, 4
// bytes each, twice.
//
// Tokens add up by rising index within blocks, tiles begin at multiples of 128: no layout changes a bit.

#include <algorithm>

#include "kernels/cuda/prefill.cuh"
#include "kernels/cuda/stages.cuh"

namespace nsa::gpu {

namespace {

constexpr int slots = 4;
constexpr int groups = 4;  // warpgroups that multiply: one's products run beside the others' exponentials
constexpr int queries = groups * group_queries, threads = 128 * (groups + 1);
constexpr int choose_warps = 8;

struct ScoreParams {
  DenseParams d;
  DenseSource source;
  const float* ms;  // [rows][H][2]
  float* scores;    // [rows][groups][pitch]
  std::int64_t pitch;
};

// Compressed tokens that the item's tiles hold, and those that it takes to finish every eligible block.
__device__ __forceinline__ std::int64_t tiles_of(std::int64_t tokens) {
  return (tokens + dense_tokens - 1) / dense_tokens;
}

template <int DK>
__device__ __forceinline__ void stream(const ScoreParams& p, const DenseShared<DK, DK, slots, groups>& shared,
                                       std::int64_t first_position) {
  Turn<slots> turn;
  int phase = 0;
  for (int index = blockIdx.x; index < p.d.items; index += gridDim.x, phase ^= 1) {
    const DenseItem item(p.d, index, first_position);
    shared.stream_queries(p.d, item, phase);
    const std::int64_t tiles = tiles_of(compressed_tokens(p.d.shape.rules, item.last));
    for (std::int64_t tile = 0; tile < tiles; ++tile, turn.next())
      shared.template stream_tile<DK>(p.source, p.source.k, turn, item.plane, tile * dense_tokens);
  }
}

// One warpgroup's state over an item; `terms`: the warp's sums over heads, of 128 tokens and the `lead` before them.
template <class T, int DK>
struct Rows {
  const ScoreParams& p;
  const DenseShared<DK, DK, slots, groups>& shared;
  int group;
  float* terms;
  const float* overlaps;  // of the lead + ratio tokens that reach into a block
  Turn<slots> turn;
  float offset[2];  // of rows g and g + 8: log2 of the row's sum, in powers of two
  std::int64_t n;
  int eligible;
  float carried;            // sum over heads of the last token so far, where lead is 1
  float* to;                // the query's block scores; null: no such query
  int ratio, lead, blocks;  // blocks: that end in a tile

  __device__ __forceinline__ void begin(const DenseItem& item);
  __device__ __forceinline__ void sum_heads(float (&s)[64], std::int64_t begin) const;
  __device__ __forceinline__ void fold(int first_block);
  __device__ __forceinline__ void add(int tile);
  __device__ __forceinline__ void run(const DenseItem& item, int phase);
};

template <class T, int DK>
__device__ __forceinline__ void Rows<T, DK>::begin(const DenseItem& item) {
  const LayerShape& shape = p.d.shape;
  const int lane = threadIdx.x % 32, query = item.first + group * group_queries + threadIdx.x % 128 / 32;
  const std::int64_t t = item.t + query - item.first;
  const std::int64_t row = std::int64_t{item.sequence} * p.d.tile.tokens + query;
  const bool exists = query < p.d.tile.tokens;
  n = compressed_tokens(shape.rules, t);
  eligible = static_cast<int>(eligible_blocks(shape.rules, t));
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
template <class T, int DK>
__device__ __forceinline__ void Rows<T, DK>::sum_heads(float (&s)[64], std::int64_t begin) const {
  const float scale = log2_e / sqrtf(static_cast<float>(DK));
  const int lane = threadIdx.x % 32, quad = lane % 4;
  if (begin + dense_tokens > n) {
    const int end = static_cast<int>(n - begin);
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
template <class T, int DK>
__device__ __forceinline__ void Rows<T, DK>::fold(int first_block) {
  __syncwarp();
  const int lane = threadIdx.x % 32;
  if (ratio == 4 && lead == 1) {  // l = 2 d, l' = 4 d: a lane a block
    const float4 x = *reinterpret_cast<const float4*>(terms + 4 * lane);
    const float last = __shfl_up_sync(0xffffffffu, x.w, 1), before = lane == 0 ? carried : last;
    carried = __shfl_sync(0xffffffffu, x.w, 31);
    if (to && first_block + lane < eligible) to[first_block + lane] = before + 2 * x.x + 2 * x.y + 2 * x.z + x.w;
    __syncwarp();
    return;
  }
  for (int b = lane; b < blocks; b += 32) {
    float sum = 0.0f;
    for (int k = 0; k < ratio + lead; ++k) sum += terms[b * ratio + k - lead] * overlaps[k];
    if (to && first_block + b < eligible) to[first_block + b] = sum;
  }
  __syncwarp();
  for (int i = lane; i < lead; i += 32) terms[i - lead] = terms[dense_tokens + i - lead];  // lead < 128: no overlap
  __syncwarp();
}

template <class T, int DK>
__device__ __forceinline__ void Rows<T, DK>::add(int tile) {
  float s[64];
  wait_for(shared.full(turn.slot), turn.phase);
  products_begin();
  queue_scores<T>(s, shared, group, turn.slot);
  products_wait<0>();
  settled(s);
  arrive_if(shared.empty(turn.slot), threadIdx.x % 32 == 0);
  turn.next();
  sum_heads(s, std::int64_t{tile} * dense_tokens);
  fold(tile * blocks);
}

template <class T, int DK>
__device__ __forceinline__ void Rows<T, DK>::run(const DenseItem& item, int phase) {
  begin(item);
  const int tiles = static_cast<int>(tiles_of(compressed_tokens(p.d.shape.rules, item.last)));
  wait_for(shared.queries_full(), phase);
  for (int tile = 0; tile < tiles; ++tile) add(tile);
  if (threadIdx.x % 32 == 0) arrive(shared.queries_empty());
  // An eligible block may begin behind the last tile.
  for (int tile = tiles; tile * blocks < eligible; ++tile) {
    for (int i = threadIdx.x % 32; i < dense_tokens; i += 32) terms[i] = 0.0f;
    fold(tile * blocks);
  }
}

template <class T, int DK>
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
  wait_for_previous();
  const std::int64_t first_position = *p.d.tile.first_position;
  const int group = threadIdx.x / 128;
  if (group == groups) {
    give_registers<24>();
    if (threadIdx.x % 128 == 0) stream(p, shared, first_position);
  } else {
    take_registers<112>();
    Rows<T, DK> rows{p, shared, group, terms[threadIdx.x / 32] + most_lead, overlaps};
    rows.ratio = ratio;
    rows.lead = lead;
    rows.blocks = dense_tokens / ratio;
    int phase = 0;
    for (int index = blockIdx.x; index < p.d.items; index += gridDim.x, phase ^= 1)
      rows.run(DenseItem(p.d, index, first_position), phase);
  }
#endif
}

// A block's place in the order of choice: score above, index below, turned round; the larger the better. 0: none.
using Entry = std::uint64_t;
__device__ __forceinline__ int block_of(Entry entry) { return static_cast<int>(~static_cast<unsigned>(entry)); }

__device__ __forceinline__ Entry exchanged(Entry mine, unsigned step, bool keeps_larger) {
  const Entry other = __shfl_xor_sync(0xffffffffu, mine, step);
  return (other > mine) == keeps_larger ? other : mine;
}
// A warp's 32 entries from the best down (bitonic).
__device__ __forceinline__ Entry sorted(Entry mine) {
  const unsigned lane = threadIdx.x % 32;
#pragma unroll
  for (unsigned size = 2; size <= 32; size *= 2)
#pragma unroll
    for (unsigned step = size / 2; step > 0; step /= 2)
      mine = exchanged(mine, step, ((lane & step) == 0) == ((lane & size) == 0 || size == 32));
  return mine;
}
// The best 32 of two sorted lots, sorted.
__device__ __forceinline__ Entry merged(Entry a, Entry b) {
  const Entry other = __shfl_sync(0xffffffffu, b, 31 - threadIdx.x % 32);
  Entry mine = a > other ? a : other;
#pragma unroll
  for (unsigned step = 16; step > 0; step /= 2) mine = exchanged(mine, step, (threadIdx.x & step) == 0);
  return mine;
}

struct ChooseParams {
  RankArgs a;
  const float* scores;
  std::int64_t pitch;
};

// The list's best n, lane c the c-th (0 behind them). `kept`: the warp's, [64].
__device__ __forceinline__ Entry best_of(const BlockRules& r, const float* scores, int eligible, std::int64_t t,
                                         Entry* kept) {
  const int lane = threadIdx.x % 32, n = r.n_sel;
  const auto entry = [&](int j) -> Entry {
    if (j >= eligible) return 0;
    const unsigned key = is_forced(r, j, t) ? 0x7F800000u : __float_as_uint(scores[j]);
    return static_cast<Entry>(key) << 32 | static_cast<unsigned>(~j);
  };
  Entry top = 0;
#pragma unroll 4
  for (int j = lane; j < eligible; j += 32) {
    const Entry mine = entry(j);
    top = mine > top ? mine : top;
  }
  // Where fewer than n lanes have a block, the bound is 0 and everything passes.
  Entry bound = __shfl_sync(0xffffffffu, sorted(top), n - 1);
  int count = 0;
  const auto reduce = [&] {
    __syncwarp();
    const Entry first = sorted(lane < count ? kept[lane] : 0), second = sorted(lane + 32 < count ? kept[lane + 32] : 0);
    const Entry best = merged(first, second);
    __syncwarp();
    return lane < n ? best : 0;
  };
#pragma unroll 2
  for (int j0 = 0; j0 < eligible; j0 += 32) {
    const Entry mine = entry(j0 + lane);
    const bool passes = mine != 0 && mine >= bound;
    const unsigned mask = __ballot_sync(0xffffffffu, passes);
    if (passes) kept[count + __popc(mask & ((1u << lane) - 1))] = mine;
    count += __popc(mask);
    if (count <= 32) continue;
    const Entry best = reduce();
    kept[lane] = best;
    count = n;
    const Entry last = __shfl_sync(0xffffffffu, best, n - 1);
    bound = last > bound ? last : bound;
    __syncwarp();
  }
  return reduce();
}

__global__ void __launch_bounds__(32 * choose_warps) choose_kernel(const __grid_constant__ ChooseParams p) {
  __shared__ Entry kept[choose_warps][64];
  wait_for_previous();
  const LayerShape& s = p.a.shape;
  const BlockRules& r = s.rules;
  const int lane = threadIdx.x % 32, n = r.n_sel;
  const std::int64_t list = std::int64_t{blockIdx.x} * choose_warps + threadIdx.x / 32;
  if (list >= p.a.tile.rows() * s.groups) return;
  const std::int64_t t = tile_row(p.a.tile, list / s.groups).t;
  const int eligible = static_cast<int>(eligible_blocks(r, t));
  const float* scores = p.scores + list * p.pitch;
  const Entry mine = best_of(r, scores, eligible, t, kept[threadIdx.x / 32]);
  const int block = mine == 0 ? -1 : block_of(mine);
  if (p.a.candidates && lane < n)
    p.a.candidates[list * n + lane] =
        block < 0 ? Candidate{} : Candidate{__uint_as_float(static_cast<unsigned>(mine >> 32)), block};
  if (p.a.selected) {
    int place = 0;
    for (int c = 0; c < n; ++c) {
      const int other = __shfl_sync(0xffffffffu, block, c);
      place += other >= 0 && other < block;
    }
    if (lane < n) p.a.selected[list * n + (block < 0 ? lane : place)] = block;
  }
  if (!p.a.p_slc) return;
  for (std::int64_t j = lane; j < p.a.p_slc_blocks; j += 32)
    p.a.p_slc[list * p.a.p_slc_blocks + j] = j < eligible ? scores[j] : 0.0f;
}

std::int64_t score_pitch_of(const BlockRules& r, std::int64_t positions) {
  return (eligible_blocks(r, positions - 1) + 31) / 32 * 32;
}

template <class T, int DK>
void launch_scores(const RankArgs& a, Stream* stream) {
  const LayerShape& s = a.shape;
  const ScoreParams p{dense_params(s, a.tile, a.q, queries),
                      dense_source(s, a.tile, a.k_cmp, nullptr, compressed_tokens(s.rules, a.tile.max_positions - 1)),
                      a.cmp_ms, static_cast<float*>(a.scratch), score_pitch_of(s.rules, a.tile.max_positions)};
  launch_early(score_kernel<T, DK>, dim3(dense_ctas(p.d)), threads, DenseLayout<DK, DK, slots, groups>::bytes, stream,
               1, p);
}

template <class T>
void launch_scores(const RankArgs& a, Stream* stream) {
  if (a.shape.d_k == 64)
    launch_scores<T, 64>(a, stream);
  else
    launch_scores<T, 128>(a, stream);
}

}  // namespace

std::size_t rank_prefill_scratch(const LayerShape& s, const QueryTile& tile) {
  if (!tiles_shape(s)) return 0;
  return static_cast<std::size_t>(tile.rows() * s.groups * score_pitch_of(s.rules, tile.max_positions)) * sizeof(float);
}

void rank_prefill(const RankArgs& a, Stream* stream) {
  const std::int64_t lists = a.tile.rows() * a.shape.groups;
  if (lists == 0) return;
  if (!map_is_whole(a.k_cmp.map)) throw InternalError("rank: no raw scores, and K_cmp is cut");
  if (a.scratch_bytes < rank_prefill_scratch(a.shape, a.tile)) throw InternalError("rank: scratch too small");
  if (a.shape.dtype == DType::bf16)
    launch_scores<__nv_bfloat16>(a, stream);
  else
    launch_scores<__half>(a, stream);
  const ChooseParams p{a, static_cast<const float*>(a.scratch), score_pitch_of(a.shape.rules, a.tile.max_positions)};
  launch_early(choose_kernel, dim3(static_cast<unsigned>((lists + choose_warps - 1) / choose_warps)), 32 * choose_warps,
               0, stream, 1, p);
}

}  // namespace nsa::gpu
