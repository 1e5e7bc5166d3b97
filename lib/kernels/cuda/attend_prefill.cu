// Prefill's compressed and window branches, 16-bit storage: dense tiles on Hopper's warpgroup products.
//
// Tiling: prefill.cuh. M = 4 queries x 16 heads a warpgroup, N = 128 tokens, all of Dk and Dv at once: 64 x 128 scores
// and 64 x Dv results in registers. The scores of tile j are under way together with tile j-1's weighted sum, and the
// two warpgroups take turns by themselves: one's exponentials run beside the other's products.
// FLOPs: 2 (Dk + Dv) a (head, token). Bytes: a tile's K and V once per 8 queries from L2. Bound: the tensor cores, with
// the exponentials (16 a cycle and SM) at half their time.
//
// Tiles begin at multiples of 128 and go up, and a tile that a row does not see changes nothing, not even by rounding:
// (m, sum) do not depend on how queries are tiled or K is laid out.

#include "kernels/cuda/prefill.cuh"
#include "kernels/cuda/stages.cuh"

namespace nsa::gpu {

namespace {

constexpr int slots = 6;

struct Params {
  DenseParams d;
  Partials out;
  std::int64_t* reads;
};

// Tokens [begin, end) that position t attends.
struct Span {
  std::int64_t begin, end;
};
template <Branch B>
__device__ __forceinline__ Span span_of(const BlockRules& r, std::int64_t t) {
  if constexpr (B == cmp) return {0, compressed_tokens(r, t)};
  return {window_begin(r, t), t + 1};
}

// Tiles of an item.
template <Branch B>
__device__ __forceinline__ Span tiles_of(const BlockRules& r, const DenseItem& item) {
  const std::int64_t end = span_of<B>(r, item.last).end;
  return {span_of<B>(r, item.t).begin / dense_tokens, (end + dense_tokens - 1) / dense_tokens};
}

template <int DK, int DV, Branch B, bool Weigh>
__device__ __forceinline__ void stream(const Params& p, const DenseShared<DK, DV, slots>& shared,
                                       std::int64_t first_position) {
  Turn<slots> turn;
  int phase = 0;
  for (int index = blockIdx.x; index < p.d.items; index += gridDim.x, phase ^= 1) {
    const DenseItem item(p.d, index, first_position);
    const Span tiles = tiles_of<B>(p.d.shape.rules, item);
    shared.stream_queries(p.d, item, phase);
    for (std::int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
      shared.template stream_tile<DK>(p.d, p.d.k, turn, item.plane, tile * dense_tokens);
      turn.next();
      if (tile == tiles.begin || !Weigh) continue;
      shared.template stream_tile<DV>(p.d, p.d.v, turn, item.plane, (tile - 1) * dense_tokens);
      turn.next();
    }
    if (tiles.end <= tiles.begin || !Weigh) continue;
    shared.template stream_tile<DV>(p.d, p.d.v, turn, item.plane, (tiles.end - 1) * dense_tokens);
    turn.next();
  }
}

// One warpgroup's state over an item.
template <class T, int DK, int DV, Branch B, bool Weigh>
struct Rows {
  const Params& p;
  const DenseShared<DK, DV, slots>& shared;
  int group;  // warpgroup
  Turn<slots> turn;
  int taken;  // the slot taken last
  float o[DV / 2], s[64];
  std::uint32_t weights[32];
  float m[2], sum[2], old[2];  // of rows g and g + 8; m in powers of two
  Span span;                   // of the warp's query
  std::int64_t count;

  __device__ __forceinline__ void release(int slot) const { arrive_if(shared.empty(slot), threadIdx.x % 32 == 0); }
  // Waits for the next slot.
  __device__ __forceinline__ void take() {
    wait_for(shared.full(turn.slot), turn.phase);
    taken = turn.slot;
    turn.next();
  }
  __device__ __forceinline__ void pack_weights() {
#pragma unroll
    for (int i = 0; i < 32; ++i) weights[i] = pack(s[2 * i], s[2 * i + 1], T{});
  }
  template <bool Cut>
  __device__ __forceinline__ void soften(std::int64_t begin);
  __device__ __forceinline__ void queue_values(int slot);
  __device__ __forceinline__ void clear_behind(int slot, std::int64_t begin);
  __device__ __forceinline__ void run(const DenseItem& item, int phase);
  __device__ __forceinline__ void put_out(const DenseItem& item);
};

// Scores of the tile from `begin` to weights relative to the new maximum; `old` is what o has to be scaled by.
template <class T, int DK, int DV, Branch B, bool Weigh>
template <bool Cut>
__device__ __forceinline__ void Rows<T, DK, DV, B, Weigh>::soften(std::int64_t begin) {
  const float scale = log2_e / sqrtf(static_cast<float>(DK));
  if constexpr (Cut) {
    const int from = static_cast<int>(span.begin - begin), to = static_cast<int>(span.end - begin);
    const int quad = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      const int column = i / 4 * 8 + quad * 2 + i % 2;
      if (column < from || column >= to) s[i] = -INFINITY;
    }
    count += max(0, min(to, dense_tokens) - max(from, 0));
  } else {
    count += dense_tokens;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = s[2 * half];
#pragma unroll
    for (int j = 0; j < 16; ++j) top = fmaxf(top, fmaxf(s[4 * j + 2 * half], s[4 * j + 2 * half + 1]));
    top = fmaxf(m[half], quad_max(top) * scale);
    old[half] = exp2_fast(m[half] - top);
    m[half] = top;
    float added = 0.0f;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      float& a = s[4 * j + 2 * half];
      float& b = s[4 * j + 2 * half + 1];
      a = exp2_fast(fmaf(a, scale, -top));
      b = exp2_fast(fmaf(b, scale, -top));
      added += a + b;
    }
    sum[half] = sum[half] * old[half] + added;
  }
}

// o += weights v, queued.
template <class T, int DK, int DV, Branch B, bool Weigh>
__device__ __forceinline__ void Rows<T, DK, DV, B, Weigh>::queue_values(int slot) {
  using Layout = DenseLayout<DK, DV, slots>;
#pragma unroll
  for (int step = 0; step < dense_tokens / 16; ++step)
    add_product(o, weights + 4 * step, operand_at(shared.slot(slot) + step * 16 * 128, Layout::tile_box), T{});
  products_queued();
}

// Rows that were never written may hold NaN, which a weight of zero would not undo: they become zero.
template <class T, int DK, int DV, Branch B, bool Weigh>
__device__ __forceinline__ void Rows<T, DK, DV, B, Weigh>::clear_behind(int slot, std::int64_t begin) {
  using Layout = DenseLayout<DK, DV, slots>;
  if (begin + dense_tokens <= p.d.rows) return;
  const int written = static_cast<int>(p.d.rows - begin) * 8;  // pieces of 16 bytes
  for (int box = 0; box < DV / box_columns; ++box)
    for (int i = written + group * 128 + threadIdx.x % 128; i < dense_tokens * 8; i += dense_groups * 128)
      asm volatile(
          "st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(shared.slot(slot) + box * Layout::tile_box + i * 16), "r"(0)
          : "memory");
  copies_see_stores();
  meet(1, dense_groups * 128);
}

template <class T, int DK, int DV, Branch B, bool Weigh>
__device__ __forceinline__ void Rows<T, DK, DV, B, Weigh>::run(const DenseItem& item, int phase) {
  const std::int64_t t = item.t + group * group_queries + threadIdx.x % 128 / 32;
  span = span_of<B>(p.d.shape.rules, t);
  m[0] = m[1] = nothing;
  sum[0] = sum[1] = 0.0f;
  count = 0;
#pragma unroll
  for (float& x : o) x = 0.0f;
  const Span tiles = tiles_of<B>(p.d.shape.rules, item), earliest = span_of<B>(p.d.shape.rules, item.t),
             latest = span_of<B>(p.d.shape.rules, item.t + dense_queries - 1);
  wait_for(shared.queries_full(), phase);
  if (tiles.begin < tiles.end) {
    take();
    products_begin();
    queue_scores<T>(s, shared, group, taken);
    products_wait<0>();
    settled(s);
    release(taken);
    soften<true>(tiles.begin * dense_tokens);
    pack_weights();
  }
  for (std::int64_t tile = tiles.begin + 1; tile < tiles.end; ++tile) {
    take();
    products_begin();
    queue_scores<T>(s, shared, group, taken);
    const int k_slot = taken;
    if constexpr (Weigh) {
      take();
      products_begin();
      queue_values(taken);
      products_wait<1>();
    } else {
      products_wait<0>();
    }
    settled(s);
    release(k_slot);
    // The same for all warps: a branch that they take apart would make the products wait.
    if (tile * dense_tokens < latest.begin || (tile + 1) * dense_tokens > earliest.end)
      soften<true>(tile * dense_tokens);
    else
      soften<false>(tile * dense_tokens);
    if constexpr (Weigh) {
      products_wait<0>();
      settled(o);
      release(taken);
#pragma unroll
      for (int i = 0; i < DV / 2; ++i) o[i] *= old[i / 2 % 2];
    }
    pack_weights();
  }
  if (threadIdx.x % 32 == 0) arrive(shared.queries_empty());
  if (!Weigh || tiles.end <= tiles.begin) return;
  take();
  clear_behind(taken, (tiles.end - 1) * dense_tokens);
  products_begin();
  queue_values(taken);
  products_wait<0>();
  settled(o);
  release(taken);
}

template <class T, int DK, int DV, Branch B, bool Weigh>
__device__ __forceinline__ void Rows<T, DK, DV, B, Weigh>::put_out(const DenseItem& item) {
  const LayerShape& shape = p.d.shape;
  const int lane = threadIdx.x % 32, query = item.first + group * group_queries + threadIdx.x % 128 / 32;
  if (query >= p.d.tile.tokens) return;
  const std::int64_t row = std::int64_t{item.sequence} * p.d.tile.tokens + query;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int head = lane / 4 + half * 8;
    const float total = quad_sum(sum[half]);
    if (head >= shape.heads_per_group) continue;
    const std::int64_t at = row * shape.heads() + item.group * shape.heads_per_group + head;
    if (lane % 4 == 0)
      reinterpret_cast<float2*>(p.out.ms)[at] =
          make_float2(total > 0.0f ? m[half] * 0.6931471805599453f : -INFINITY, total);
    if (!Weigh) continue;
    float* to = p.out.o + at * DV + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < DV / 8; ++j)
      *reinterpret_cast<float2*>(to + 8 * j) = make_float2(o[4 * j + 2 * half], o[4 * j + 2 * half + 1]);
  }
  if (lane == 0 && count > 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(p.reads) + item.sequence * shape.groups + item.group,
              static_cast<unsigned long long>(count));
}

template <class T, int DK, int DV, Branch B, bool Weigh>
__global__ void __launch_bounds__(dense_threads, 1) dense_kernel(const __grid_constant__ Params p) {
#ifdef NSA_WGMMA
  extern __shared__ char memory[];
  const DenseShared<DK, DV, slots> shared(memory);
  if (threadIdx.x == 0) shared.open();
  __syncthreads();
  wait_for_previous();
  const std::int64_t first_position = *p.d.tile.first_position;
  const int group = threadIdx.x / 128;
  if (group == dense_groups) {
    give_registers<24>();
    if (threadIdx.x % 128 == 0) stream<DK, DV, B, Weigh>(p, shared, first_position);
  } else {
    take_registers<240>();
    Rows<T, DK, DV, B, Weigh> rows{p, shared, group};
    int phase = 0;
    for (int index = blockIdx.x; index < p.d.items; index += gridDim.x, phase ^= 1) {
      const DenseItem item(p.d, index, first_position);
      rows.run(item, phase);
      rows.put_out(item);
    }
  }
#endif
}

template <class T, int DK, int DV, Branch B>
void launch(const AttendArgs& a, Stream* stream) {
  const std::int64_t end = a.tile.max_positions;
  Params p{dense_params(a.shape, a.tile, a.q, a.k.map, B == cmp ? compressed_tokens(a.shape.rules, end - 1) : end),
           a.out, a.reads};
  const std::int64_t planes = std::int64_t{a.tile.batch_begin + a.tile.batches} * a.shape.groups;
  p.d.k = rows_map(a.k, a.shape.dtype, planes, p.d.box_rows);
  p.d.v = rows_map(a.v, a.shape.dtype, planes, p.d.box_rows);
  auto* kernel = B == cmp && a.scores_only ? dense_kernel<T, DK, DV, B, B != cmp> : dense_kernel<T, DK, DV, B, true>;
  launch_early(kernel, dim3(dense_ctas(p.d)), dense_threads, DenseLayout<DK, DV, slots>::bytes, stream, 1, p);
}

template <class T, Branch B>
void launch_sized(const AttendArgs& a, Stream* stream) {
  if (a.shape.d_k == 64)
    launch<T, 64, 64, B>(a, stream);
  else
    launch<T, 128, 128, B>(a, stream);
}

}  // namespace

bool tiles_shape(const LayerShape& s) {
#ifdef NSA_HAS_SM90A
  const BlockRules& r = s.rules;
  const int ratio = r.l_sel / r.d;
  return limits().capability == 90 && s.dtype != DType::f32 && s.d_k == s.d_v && (s.d_k == 64 || s.d_k == 128) &&
         s.heads_per_group <= heads_per_tile && dense_tokens % ratio == 0 && (r.l - 1) / r.d <= most_lead &&
         s.leaf % 8 == 0 && r.n_sel <= 32;
#else
  (void)s;
  return false;
#endif
}

DenseParams dense_params(const LayerShape& s, const QueryTile& tile, const void* q, const RowMap& map,
                         std::int64_t rows) {
  DenseParams p{};
  p.q = query_map(q, s.dtype, tile.rows(), s.heads(), s.d_k, heads_per_tile, group_queries);
  p.shape = s;
  p.tile = tile;
  p.map = map;
  p.box_rows = box_rows_of(map, dense_tokens);
  p.query_tiles = (tile.tokens + dense_queries - 1) / dense_queries;
  p.items = tile.batches * s.groups * p.query_tiles;
  p.rows = rows;
  return p;
}

bool prefill_accepts(Branch branch, const LayerShape& s, const RowMap& map) {
  return branch != sel && tiles_shape(s) && map_is_whole(map) &&
         (branch == cmp || map.chunk == INT64_MAX || map.chunk % 8 == 0);
}

void attend_prefill(Branch branch, const AttendArgs& a, Stream* stream) {
  if (a.tile.rows() == 0) return;
  const auto run = [&](auto type) {
    using T = decltype(type);
    if (branch == cmp)
      launch_sized<T, cmp>(a, stream);
    else
      launch_sized<T, win>(a, stream);
  };
  if (a.shape.dtype == DType::bf16)
    run(__nv_bfloat16{});
  else
    run(__half{});
}

}  // namespace nsa::gpu
