// Prefill's selected branch, 16-bit storage: neighbouring queries share the blocks they have loaded.
//
// A CTA takes a group and 12 consecutive queries, a warp each: a query's (up to 16) heads are the M of m16n8k16, its q
// stays in registers. Four more warps serve them: one plans in which turn the union of the queries' blocks comes, two
// stream each block's K and V once through a ring each (tensor copies, 128-byte swizzle), and one tells every query
// that chose the block where it lies. K is given back as soon as the scores are formed, and a slot is free again when
// those who chose its block have given it back: a warp waits for its own blocks alone and is not held up by what others
// do. No product is wasted however little the choices agree. CTAs stay and take one of every gridDim.x items: late
// queries, whose blocks are more, first, where the L2 holds K and V of all groups; else the items of a group follow one
// another. FLOPs: 2 (Dk + Dv) a (head, chosen token). Bytes: from L2, a block's K and V once per 12 queries that share
// it; from shared memory, once per query that chose it (32 KB at Dk = Dv = 128: 256 cycles). Bound: the L2 where little
// is shared, else shared memory and tensor cores alike.

#include "kernels/cuda/prefill/selected/producer.cuh"
#include "kernels/cuda/prefill/selected/scheduler.cuh"
#include "kernels/cuda/prefill/stages.cuh"

namespace nsa::gpu {

using namespace selected;

namespace {

// One warp: its query.
template <class T, int DK, int DV>
struct Row {
  using At = Layout<DK, DV>;
  const Params& p;
  const Shared<DK, DV>& shared;
  unsigned k_row, v_row;        // the lane's row within 16 tokens, in bytes
  unsigned k_column, v_column;  // its 16 bytes within the row's first 32, swizzled
  Turn<letters> mail = {};
  std::uint32_t q[DK / 16][4];
  float o[DV / 8][4], s[8][4];
  std::uint32_t weights[4][4];  // s behind soften, as operands: 16 tokens each
  float m[2], sum[2];
  int count;

  __device__ __forceinline__ Row(const Params& params, const Shared<DK, DV>& at) : p(params), shared(at) {
    const unsigned lane = threadIdx.x % 32, matrix = lane / 8, r = lane % 8;
    k_row = (matrix / 2 * 8 + r) * 128;
    k_column = (matrix % 2 ^ r) * 16;
    v_row = (matrix % 2 * 8 + r) * 128;
    v_column = (matrix / 2 ^ r) * 16;
  }
  __device__ __forceinline__ void begin(const T* from, int heads);
  __device__ __forceinline__ void scores(unsigned keys);
  __device__ __forceinline__ void soften(int tokens);
  template <bool Whole>
  __device__ __forceinline__ void add_values(unsigned values, int tokens);
  __device__ __forceinline__ void add(Letter letter, int t);
  __device__ __forceinline__ void run(const Item& item, int query, int t);
  __device__ __forceinline__ void put_out(const Item& item, int query) const;
  __device__ __forceinline__ void put_partial(std::int64_t at, int half, float total) const;
  __device__ __forceinline__ void put_gated(const std::int64_t (&at)[2], int heads, float gate,
                                            const float (&total)[2]) const;
};

// Row r of `from` is head r; those past `heads` are zero.
template <class T, int DK, int DV>
__device__ __forceinline__ void Row<T, DK, DV>::begin(const T* from, int heads) {
  const int lane = threadIdx.x % 32, g = lane / 4, quad = lane % 4;
#pragma unroll
  for (int step = 0; step < DK / 16; ++step) {
    const auto* low = reinterpret_cast<const std::uint32_t*>(from + g * DK + step * 16 + quad * 2);
    const auto* high = reinterpret_cast<const std::uint32_t*>(from + (g + 8) * DK + step * 16 + quad * 2);
    q[step][0] = g < heads ? low[0] : 0u;
    q[step][1] = g + 8 < heads ? high[0] : 0u;
    q[step][2] = g < heads ? low[4] : 0u;
    q[step][3] = g + 8 < heads ? high[4] : 0u;
  }
#pragma unroll
  for (auto& x : o) x[0] = x[1] = x[2] = x[3] = 0.0f;
  m[0] = m[1] = neg_inf;
  sum[0] = sum[1] = 0.0f;
  count = 0;
}

template <class T, int DK, int DV>
__device__ __forceinline__ void Row<T, DK, DV>::scores(unsigned keys) {
#pragma unroll
  for (auto& x : s) x[0] = x[1] = x[2] = x[3] = 0.0f;
#pragma unroll
  for (int step = 0; step < DK / 16; ++step)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      std::uint32_t k[4];
      ldmatrix_x4(k, keys + step / 4 * At::box + j * 2048 + k_row + (k_column ^ step % 4 * 32));
      mma(s[2 * j], q[step][0], q[step][1], q[step][2], q[step][3], k[0], k[1], T{});
      mma(s[2 * j + 1], q[step][0], q[step][1], q[step][2], q[step][3], k[2], k[3], T{});
    }
}

// Scores to weights relative to `m`, o along with it; the query sees the block's first `tokens`.
template <class T, int DK, int DV>
__device__ __forceinline__ void Row<T, DK, DV>::soften(int tokens) {
  const float scale = log2_e / sqrtf(static_cast<float>(DK));
  const int quad = threadIdx.x % 4;
  if (tokens < block_tokens) {
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (j * 8 + quad * 2 + i % 2 >= tokens) s[j][i] = -INFINITY;
  }
  float old[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = s[0][2 * half];
#pragma unroll
    for (int j = 0; j < 8; ++j) top = fmaxf(top, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
    top = reference(m[half], quad_max(top) * scale);
    old[half] = exp2_fast(m[half] - top);
    m[half] = top;
    float added = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      s[j][2 * half] = exp2_fast(fmaf(s[j][2 * half], scale, -top));
      s[j][2 * half + 1] = exp2_fast(fmaf(s[j][2 * half + 1], scale, -top));
      added += s[j][2 * half] + s[j][2 * half + 1];
    }
    sum[half] = sum[half] * old[half] + added;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = &s[2 * j + i / 2][i % 2 * 2];
      weights[j][i] = pack(pair[0], pair[1], T{});
      asm volatile("" : "+r"(weights[j][i]));
    }
  if (__any_sync(0xffffffffu, old[0] != 1.0f || old[1] != 1.0f)) {
#pragma unroll
    for (auto& x : o) x[0] *= old[0], x[1] *= old[0], x[2] *= old[1], x[3] *= old[1];
  }
}

// Tokens that were never written may hold NaN, which a weight of zero would not undo: they become zero.
template <class T, int DK, int DV>
template <bool Whole>
__device__ __forceinline__ void Row<T, DK, DV>::add_values(unsigned values, int tokens) {
  const int quad = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const auto& a = weights[j];
    const auto seen = [&](int token) {
      return (token < tokens ? 0xFFFFu : 0u) | (token + 1 < tokens ? 0xFFFF0000u : 0u);
    };
    const unsigned low = Whole ? ~0u : seen(j * 16 + quad * 2), high = Whole ? ~0u : seen(j * 16 + quad * 2 + 8);
#pragma unroll
    for (int pair = 0; pair < DV / 16; ++pair) {
      std::uint32_t v[4];
      ldmatrix_x4_trans(v, values + pair / 4 * At::box + j * 2048 + v_row + (v_column ^ pair % 4 * 32));
      if constexpr (!Whole) v[0] &= low, v[1] &= high, v[2] &= low, v[3] &= high;
      mma(o[2 * pair], a[0], a[1], a[2], a[3], v[0], v[1], T{});
      mma(o[2 * pair + 1], a[0], a[1], a[2], a[3], v[2], v[3], T{});
    }
  }
}

template <class T, int DK, int DV>
__device__ __forceinline__ void Row<T, DK, DV>::add(Letter letter, int t) {
  const bool first_lane = threadIdx.x % 32 == 0;
  const int tokens = min(t + 1 - letter.block() * block_tokens, block_tokens);
  const int slot = letter.slot();
  wait_for(shared.key_full(slot), letter.phase());
  scores(shared.key(slot));
  fence_proxy_async();
  __syncwarp();
  arrive_if(shared.key_empty(slot), first_lane);
  soften(tokens);
  wait_for(shared.value_full(slot), letter.phase());
  if (tokens == block_tokens)
    add_values<true>(shared.value(slot), tokens);
  else
    add_values<false>(shared.value(slot), tokens);
  fence_proxy_async();
  __syncwarp();
  arrive_if(shared.value_empty(slot), first_lane);
  count += tokens;
}

template <class T, int DK, int DV>
__device__ __forceinline__ void Row<T, DK, DV>::run(const Item& item, int query, int t) {
  const LayerShape& shape = p.a.shape;
  const int lane = threadIdx.x % 32, n = shape.rules.n_sel;
  if (!item.has(p, query)) return;
  const std::int64_t list = item.row(p, query) * shape.groups + item.group;
  const bool chooses = lane < n && p.a.selected[list * n + lane] >= 0;
  begin(static_cast<const T*>(p.a.q) + list * shape.heads_per_group * DK, shape.heads_per_group);
  const int chosen = __popc(__ballot_sync(0xffffffffu, chooses));
  for (int i = 0; i < chosen; ++i, mail.next()) {
    wait_for(shared.told(query, mail.slot), mail.phase);
    add(shared.read_letter(query, mail.slot), t);
  }
  put_out(item, query);
}

template <class T, int DK, int DV>
__device__ __forceinline__ void Row<T, DK, DV>::put_out(const Item& item, int query) const {
  const LayerShape& shape = p.a.shape;
  const int lane = threadIdx.x % 32;
  const std::int64_t list = item.row(p, query) * shape.groups + item.group;
  float total[2];
  std::int64_t at[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    total[half] = quad_sum(sum[half]);
    at[half] = list * shape.heads_per_group + min(lane / 4 + half * 8, shape.heads_per_group - 1);
  }
  const int heads = shape.heads_per_group - lane / 4;  // of the lane's two, those that are there: more than 0, 8
  if (p.gate)
    put_gated(at, heads, p.gate[list * branches + sel], total);
  else
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (heads > half * 8) put_partial(at[half], half, total[half]);
  if (lane == 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(p.a.reads) + item.sequence * shape.groups + item.group,
              static_cast<unsigned long long>(count));
}

template <class T, int DK, int DV>
__device__ __forceinline__ void Row<T, DK, DV>::put_partial(std::int64_t at, int half, float total) const {
  if (threadIdx.x % 4 == 0)
    reinterpret_cast<float2*>(p.a.out.ms)[at] =
        make_float2(total > 0.0f ? m[half] * 0.6931471805599453f : -INFINITY, total);
  float* to = p.a.out.o + at * DV + threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < DV / 8; ++j)
    *reinterpret_cast<float2*>(to + 8 * j) = make_float2(o[j][2 * half], o[j][2 * half + 1]);
}

// Both heads' loads are under way before the first is used.
template <class T, int DK, int DV>
__device__ __forceinline__ void Row<T, DK, DV>::put_gated(const std::int64_t (&at)[2], int heads, float gate,
                                                          const float (&total)[2]) const {
  const int column = threadIdx.x % 4 * 2;
  float2 others[2][DV / 8];
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int j = 0; j < DV / 8; ++j)
      others[half][j] = __ldcs(reinterpret_cast<const float2*>(p.a.out.o + at[half] * DV + column + 8 * j));
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (heads <= half * 8) continue;
    const float weight = total[half] > 0.0f ? gate / total[half] : 0.0f;
    T* to = static_cast<T*>(p.o) + at[half] * DV + column;
#pragma unroll
    for (int j = 0; j < DV / 8; ++j)
      __stcs(reinterpret_cast<std::uint32_t*>(to + 8 * j),
             pack(fmaf(o[j][2 * half], weight, others[half][j].x), fmaf(o[j][2 * half + 1], weight, others[half][j].y),
                  T{}));
  }
}

// The warps that plan, stream and tell.
template <int DK, int DV, int Most>
__device__ __forceinline__ void feed(const Params& p, const Shared<DK, DV>& shared, int warp) {
  if (threadIdx.x == 32 * queries)
    Streamer<DK, DV>{p, shared}.stream_keys();
  else if (threadIdx.x == 32 * (queries + 1))
    Streamer<DK, DV>{p, shared}.stream_values();
  else if (warp == queries + 2)
    Planner<DK, DV, Most>{p, shared}.run();
  else if (warp == queries + 3)
    Streamer<DK, DV>{p, shared}.tell();
}

template <class T, int DK, int DV, int Most>
__global__ void __launch_bounds__(threads, 1) sel_kernel(const __grid_constant__ Params p) {
#ifdef NSA_WGMMA
  extern __shared__ __align__(1024) char memory[];
  const Shared<DK, DV> shared(memory);
  if (threadIdx.x == 0) shared.open();
  __syncthreads();
  griddep_wait();
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (warp >= queries) {
    warpgroup_reg_dealloc<56>();
    feed<DK, DV, Most>(p, shared, warp);
  } else {
    warpgroup_reg_alloc<152>();
    const int first_position = static_cast<int>(*p.a.tile.first_position);
    Row<T, DK, DV> row(p, shared);
    for (Items items(p); items.more(); items.next()) {
      const Item item(p, items.index());
      row.run(item, warp, first_position + item.first + warp);
    }
  }
#endif
}

constexpr std::int64_t most_side_by_side = 24 << 20;  // bytes of K and V: half of the L2

int query_tiles_of(const QueryTile& tile) { return (tile.tokens + queries - 1) / queries; }
int items_of(const LayerShape& s, const QueryTile& tile) { return tile.batches * s.groups * query_tiles_of(tile); }

template <class T, int DK, int DV>
void launch(const AttendArgs& a, const float* gate, void* o, Stream* stream) {
  Params p{};
  p.a = a;
  p.gate = gate;
  p.o = o;
  p.box_rows = box_rows_of(a.k.map, block_tokens);
  const std::int64_t planes = std::int64_t{a.tile.batch_begin + a.tile.batches} * a.shape.groups;
  p.k = rows_map(a.k, a.shape.dtype, planes, p.box_rows);
  p.v = rows_map(a.v, a.shape.dtype, planes, p.box_rows);
  p.query_tiles = query_tiles_of(a.tile);
  p.items = items_of(a.shape, a.tile);
  p.side_by_side = planes * a.tile.max_positions * (DK + DV) * std::int64_t{sizeof(T)} <= most_side_by_side;
  const auto start = [&](auto* kernel) {
    launch_pdl(kernel, dim3(std::min(p.items, limits().sms)), threads, Layout<DK, DV>::bytes, stream, 1, p);
  };
  if (a.shape.rules.n_sel <= few_chosen)
    start(sel_kernel<T, DK, DV, few_chosen>);
  else
    start(sel_kernel<T, DK, DV, most_chosen>);
}

void launch(const AttendArgs& a, const float* gate, void* o, Stream* stream) {
  if (a.tile.rows() == 0) return;
  if (a.tile.max_positions > most_positions) throw LaunchError("tiled has no room for so many positions");
  const auto sized = [&](auto type) {
    using T = decltype(type);
    if (a.shape.d_k == 64)
      launch<T, 64, 64>(a, gate, o, stream);
    else
      launch<T, 128, 128>(a, gate, o, stream);
  };
  if (a.shape.dtype == DType::bf16)
    sized(__nv_bfloat16{});
  else
    sized(__half{});
}

}  // namespace

bool prefill_sel_accepts(const LayerShape& s, const RowMap& map) {
  return tiles_shape(s) && s.rules.l_sel == block_tokens && s.rules.n_sel <= most_chosen && map_is_whole(map);
}

bool prefill_sel_pays(const LayerShape& s, const QueryTile& tile) {
  return tile.max_positions <= most_positions && std::int64_t{3} * items_of(s, tile) > limits().sms;
}

void attend_prefill_sel(const AttendArgs& a, Stream* stream) { launch(a, nullptr, nullptr, stream); }

void attend_prefill_sel_gated(const AttendArgs& a, const float* gate, void* o, Stream* stream) {
  launch(a, gate, o, stream);
}

}  // namespace nsa::gpu
