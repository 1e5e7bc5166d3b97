// Prefill's selected branch, 16-bit storage: neighbouring queries share the blocks they have loaded.
//
// A CTA takes a group and 12 consecutive queries, 4 a warpgroup and one a warp: M = 4 queries x 16 heads, N = a block
// of 64 tokens. One more warp walks the union of the queries' blocks, which are sorted, and streams each block's K and
// V once through a ring of slots (tensor copies, 128-byte swizzle); with it goes the set of queries that chose it. A
// warpgroup multiplies the blocks that any of its four queries chose; the rows of those that did not get no weight.
// CTAs stay and take every gridDim-th item; the items of a group follow one another, so that its K and V stay in the
// L2. FLOPs: 2 (Dk + Dv) a (head, token of the union of 4 queries): up to 4 times what was chosen, where neighbours
// agree in nothing. Bytes: from L2, a block's K and V once per 12 queries that share it. Bound: the copies
// under way in the ring; then the L2 and the tensor cores.
//
// A warp a query on mma.sync wastes no product, and took as long: a block's way through one warp takes 1800 cycles, the
// copy before it as much, and five slots of 32 KB are too few to have enough of them under way (docs/kernels.md).

#include "kernels/cuda/prefill.cuh"
#include "kernels/cuda/stages.cuh"

namespace nsa::gpu {

namespace {

constexpr int groups = 3;  // warpgroups that multiply
constexpr int warps = 4 * groups;
constexpr int item_queries = groups * group_queries;
constexpr int threads = 128 * (groups + 1);
constexpr int early_blocks = 2;  // of an item that are on their way before its queries
constexpr int block_tokens = 64;
constexpr int most_chosen = 32;

struct Params {
  CUtensorMap q, k, v;
  AttendArgs a;
  int box_rows, query_tiles, items;
  std::int64_t rows;  // of k and v that were written; what follows may be anything
};

struct Item {
  int sequence, group, first, plane;
  __device__ __forceinline__ Item(const Params& p, int index) {
    const LayerShape& s = p.a.shape;
    first = index % p.query_tiles * item_queries;
    const int list = index / p.query_tiles;
    sequence = list / s.groups;
    group = list % s.groups;
    plane = (p.a.tile.batch_begin + sequence) * s.groups + group;
  }
};

// What the streaming warp says of a filled slot: the block (-1: the item is over) and who chose it.
struct Told {
  int block;
  unsigned queries;
};

template <int DK, int DV>
struct Layout {
  static constexpr int query_box = 64 * 128, query_group = DK / box_columns * query_box;
  static constexpr int box = block_tokens * 128, keys = DK / box_columns * box, slot = keys + DV / box_columns * box;
  static constexpr int slots = std::min(8, (224 * 1024 - groups * query_group) / slot);
  static constexpr int queries = slots * slot, barriers = queries + groups * query_group;
  static constexpr int told = barriers + 8 * (2 * slots + 2), lists = told + 8 * slots;
  static constexpr int bytes = lists + item_queries * most_chosen * 4;
  static_assert(bytes <= 227 * 1024);
};

template <int DK, int DV>
struct Shared {
  using At = Layout<DK, DV>;
  char* memory;
  unsigned base;
  __device__ __forceinline__ explicit Shared(char* given) : memory(given), base(shared_address(given)) {}
  __device__ __forceinline__ unsigned slot(int i) const { return base + i * At::slot; }
  __device__ __forceinline__ unsigned queries(int group) const { return base + At::queries + group * At::query_group; }
  __device__ __forceinline__ unsigned full(int i) const { return base + At::barriers + 8 * i; }
  __device__ __forceinline__ unsigned empty(int i) const { return full(At::slots + i); }
  __device__ __forceinline__ unsigned queries_full() const { return full(2 * At::slots); }
  __device__ __forceinline__ unsigned queries_empty() const { return full(2 * At::slots + 1); }
  __device__ __forceinline__ Told& told(int i) const { return reinterpret_cast<Told*>(memory + At::told)[i]; }
  __device__ __forceinline__ int* lists() const { return reinterpret_cast<int*>(memory + At::lists); }
  __device__ __forceinline__ void open() const {
    for (int i = 0; i < At::slots; ++i) {
      open_barrier(full(i), 1);
      open_barrier(empty(i), warps);
    }
    open_barrier(queries_full(), 1);
    open_barrier(queries_empty(), warps);
    barriers_opened();
  }
};

// The streaming warp: lane q has query q's next block; the least of them is the next of the union.
template <int DK, int DV>
__device__ __forceinline__ void stream(const Params& p, const Shared<DK, DV>& shared) {
  using At = Layout<DK, DV>;
  const LayerShape& s = p.a.shape;
  const int lane = threadIdx.x % 32, n = s.rules.n_sel;
  const RowMap& map = p.a.k.map;
  int* lists = shared.lists();
  Turn<At::slots> turn;
  const auto fill = [&](const Item& item, int block, unsigned queries) {
    wait_for(shared.empty(turn.slot), turn.phase ^ 1);
    shared.told(turn.slot) = {block, queries};
    if (block < 0) return arrive(shared.full(turn.slot));
    arrive_expecting(shared.full(turn.slot), At::slot);
    const std::int64_t begin = std::int64_t{block} * block_tokens;
    for (int at = 0; at < block_tokens; at += p.box_rows) {
      std::int64_t row = begin + at;
      int rank = 0;
      if (map.chunk != INT64_MAX) {
        const std::int64_t c = chunk_of(map, row);
        row = row_in_chunk(map, c, row);
        rank = owner_of_chunk(map, c);
      }
      const unsigned to = shared.slot(turn.slot) + at * 128;
      for (int box = 0; box < DK / box_columns; ++box)
        copy_box(to + box * At::box, &p.k, shared.full(turn.slot), box * box_columns, static_cast<int>(row), item.plane,
                 rank);
      for (int box = 0; box < DV / box_columns; ++box)
        copy_box(to + At::keys + box * At::box, &p.v, shared.full(turn.slot), box * box_columns, static_cast<int>(row),
                 item.plane, rank);
    }
  };
  const auto fill_queries = [&](const Item& item, int phase) {
    wait_for(shared.queries_empty(), phase ^ 1);
    arrive_expecting(shared.queries_full(), groups * At::query_group);
    for (int group = 0; group < groups; ++group)
      for (int box = 0; box < DK / box_columns; ++box)
        copy_box(shared.queries(group) + box * At::query_box, &p.q, shared.queries_full(), box * box_columns,
                 item.group * s.heads_per_group, item.sequence * p.a.tile.tokens + item.first + group * group_queries);
  };
  int phase = 0;
  for (int index = blockIdx.x; index < p.items; index += gridDim.x, phase ^= 1) {
    const Item item(p, index);
    __syncwarp();
    for (int i = lane; i < item_queries * n; i += 32) {
      const int query = item.first + i / n;
      const std::int64_t row = std::int64_t{item.sequence} * p.a.tile.tokens + query;
      lists[i] = query < p.a.tile.tokens ? p.a.selected[(row * s.groups + item.group) * n + i % n] : -1;
    }
    __syncwarp();
    constexpr int none = INT32_MAX;
    int at = 0;
    const auto next = [&] {
      const int block = lane < item_queries && at < n ? lists[lane * n + at] : none;
      ++at;
      return block < 0 ? none : block;
    };
    int filled = 0;
    for (int mine = next();; ++filled) {
      const int block = __reduce_min_sync(0xffffffffu, mine);
      const unsigned queries = __ballot_sync(0xffffffffu, mine == block);
      if (lane == 0 && (filled == early_blocks || (block == none && filled < early_blocks))) fill_queries(item, phase);
      if (lane == 0) fill(item, block == none ? -1 : block, queries);
      turn.next();
      if (block == none) break;
      if (mine == block) mine = next();
    }
  }
}

// One warpgroup's state over an item; its warp w has query w.
template <class T, int DK, int DV>
struct Rows {
  using At = Layout<DK, DV>;
  const Params& p;
  const Shared<DK, DV>& shared;
  int group;  // warpgroup
  float o[DV / 2], s[32];
  std::uint32_t weights[16];
  float m[2], sum[2];  // of rows g and g + 8; m in powers of two
  int count;

  __device__ __forceinline__ void begin() {
#pragma unroll
    for (float& x : o) x = 0.0f;
    m[0] = m[1] = nothing;
    sum[0] = sum[1] = 0.0f;
    count = 0;
  }
  __device__ __forceinline__ void add(int slot, int block, std::int64_t t, bool is_mine);
  __device__ __forceinline__ void soften(int tokens);
  __device__ __forceinline__ void clear_behind(int slot, std::int64_t begin) const;
  __device__ __forceinline__ void put_out(const Item& item) const;
};

// Rows that were never written may hold NaN, which a weight of zero would not undo: they become zero. Every warpgroup
// that multiplies the block writes the same zeros.
template <class T, int DK, int DV>
__device__ __forceinline__ void Rows<T, DK, DV>::clear_behind(int slot, std::int64_t begin) const {
  const int written = static_cast<int>(p.rows - begin) * 8;  // pieces of 16 bytes
  for (int box = 0; box < DV / box_columns; ++box)
    for (int i = written + threadIdx.x % 128; i < block_tokens * 8; i += 128)
      asm volatile(
          "st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(shared.slot(slot) + At::keys + box * At::box + i * 16),
          "r"(0)
          : "memory");
  copies_see_stores();
  meet(1 + group, 128);
}

// Scores to weights relative to the new maximum, o along with it; the query sees the block's first `tokens`.
template <class T, int DK, int DV>
__device__ __forceinline__ void Rows<T, DK, DV>::soften(int tokens) {
  const float scale = log2_e / sqrtf(static_cast<float>(DK));
  const int quad = threadIdx.x % 4;
  if (tokens < block_tokens) {
#pragma unroll
    for (int i = 0; i < 32; ++i)
      if (i / 4 * 8 + quad * 2 + i % 2 >= tokens) s[i] = -INFINITY;
  }
  float old[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = s[2 * half];
#pragma unroll
    for (int j = 0; j < 8; ++j) top = fmaxf(top, fmaxf(s[4 * j + 2 * half], s[4 * j + 2 * half + 1]));
    top = fmaxf(m[half], quad_max(top) * scale);
    old[half] = exp2_fast(m[half] - top);
    m[half] = top;
    float added = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float& a = s[4 * j + 2 * half];
      float& b = s[4 * j + 2 * half + 1];
      a = exp2_fast(fmaf(a, scale, -top));
      b = exp2_fast(fmaf(b, scale, -top));
      added += a + b;
    }
    sum[half] = sum[half] * old[half] + added;
  }
  if (__any_sync(0xffffffffu, old[0] != 1.0f || old[1] != 1.0f)) {
#pragma unroll
    for (int i = 0; i < DV / 2; ++i) o[i] *= old[i / 2 % 2];
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) weights[i] = pack(s[2 * i], s[2 * i + 1], T{});
}

template <class T, int DK, int DV>
__device__ __forceinline__ void Rows<T, DK, DV>::add(int slot, int block, std::int64_t t, bool is_mine) {
  const std::int64_t begin = std::int64_t{block} * block_tokens;
  products_begin();
#pragma unroll
  for (int step = 0; step < DK / 16; ++step)
    product(s, operand_at(shared.queries(group) + step / 4 * At::query_box + step % 4 * 32),
            operand_at(shared.slot(slot) + step / 4 * At::box + step % 4 * 32), step > 0, T{});
  products_queued();
  products_wait<0>();
  settled(s);
  if (is_mine) {
    const int tokens = t + 1 - begin < block_tokens ? static_cast<int>(t + 1 - begin) : block_tokens;
    soften(tokens);
    count += tokens;
  } else {
#pragma unroll
    for (std::uint32_t& w : weights) w = 0;
  }
  if (begin + block_tokens > p.rows) clear_behind(slot, begin);
  products_begin();
#pragma unroll
  for (int step = 0; step < block_tokens / 16; ++step)
    add_product(o, weights + 4 * step, operand_at(shared.slot(slot) + At::keys + step * 16 * 128, At::box), T{});
  products_queued();
  products_wait<0>();
  settled(o);
}

template <class T, int DK, int DV>
__device__ __forceinline__ void Rows<T, DK, DV>::put_out(const Item& item) const {
  const LayerShape& shape = p.a.shape;
  const int lane = threadIdx.x % 32, query = item.first + threadIdx.x / 32;
  if (query >= p.a.tile.tokens) return;
  const std::int64_t row = std::int64_t{item.sequence} * p.a.tile.tokens + query;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int head = lane / 4 + half * 8;
    const float total = quad_sum(sum[half]);
    if (head >= shape.heads_per_group) continue;
    const std::int64_t at = row * shape.heads() + item.group * shape.heads_per_group + head;
    if (lane % 4 == 0)
      reinterpret_cast<float2*>(p.a.out.ms)[at] =
          make_float2(total > 0.0f ? m[half] * 0.6931471805599453f : -INFINITY, total);
    float* to = p.a.out.o + at * DV + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < DV / 8; ++j)
      *reinterpret_cast<float2*>(to + 8 * j) = make_float2(o[4 * j + 2 * half], o[4 * j + 2 * half + 1]);
  }
  if (lane == 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(p.a.reads) + item.sequence * shape.groups + item.group,
              static_cast<unsigned long long>(count));
}

template <class T, int DK, int DV>
__global__ void __launch_bounds__(threads, 1) sel_kernel(const __grid_constant__ Params p) {
#ifdef NSA_WGMMA
  using At = Layout<DK, DV>;
  extern __shared__ __align__(1024) char memory[];
  const Shared<DK, DV> shared(memory);
  if (threadIdx.x == 0) shared.open();
  __syncthreads();
  wait_for_previous();
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (warp >= warps) {
    give_registers<32>();
    if (warp == warps) stream(p, shared);
    return;
  }
  take_registers<160>();
  const std::int64_t first_position = *p.a.tile.first_position;
  Rows<T, DK, DV> rows{p, shared, warp / 4};
  Turn<At::slots> turn;
  int phase = 0;
  for (int index = blockIdx.x; index < p.items; index += gridDim.x, phase ^= 1) {
    const Item item(p, index);
    rows.begin();
    wait_for(shared.queries_full(), phase);
    for (bool over = false; !over; turn.next()) {
      wait_for(shared.full(turn.slot), turn.phase);
      // One lane reads, and is the one that gives the slot back. The same for all lanes, and told so to the compiler:
      // products under a branch that may part a warp are slow.
      Told told{};
      if (lane == 0) told = shared.told(turn.slot);
      const int block = __shfl_sync(0xffffffffu, told.block, 0);
      const unsigned chosen = __shfl_sync(0xffffffffu, told.queries, 0);
      over = block < 0;
      if (!over && (chosen >> rows.group * group_queries & 15u) != 0)
        rows.add(turn.slot, block, first_position + item.first + warp, chosen >> warp & 1u);
      __syncwarp();
      if (lane == 0) arrive(shared.empty(turn.slot));
    }
    if (lane == 0) arrive(shared.queries_empty());
    rows.put_out(item);
  }
#endif
}

int query_tiles_of(const QueryTile& tile) { return (tile.tokens + item_queries - 1) / item_queries; }
int items_of(const LayerShape& s, const QueryTile& tile) { return tile.batches * s.groups * query_tiles_of(tile); }

template <class T, int DK, int DV>
void launch(const AttendArgs& a, Stream* stream) {
  Params p{};
  p.a = a;
  p.box_rows = box_rows_of(a.k.map, block_tokens);
  const std::int64_t planes = std::int64_t{a.tile.batch_begin + a.tile.batches} * a.shape.groups;
  p.k = rows_map(a.k, a.shape.dtype, planes, p.box_rows);
  p.v = rows_map(a.v, a.shape.dtype, planes, p.box_rows);
  p.q = query_map(a.q, a.shape.dtype, a.tile.rows(), a.shape.heads(), DK, heads_per_tile, group_queries);
  p.rows = a.tile.max_positions;
  p.query_tiles = query_tiles_of(a.tile);
  p.items = items_of(a.shape, a.tile);
  launch_early(sel_kernel<T, DK, DV>, dim3(std::min(p.items, limits().units)), threads, Layout<DK, DV>::bytes, stream,
               1, p);
}

template <class T>
void launch_sized(const AttendArgs& a, Stream* stream) {
  if (a.shape.d_k == 64)
    launch<T, 64, 64>(a, stream);
  else
    launch<T, 128, 128>(a, stream);
}

}  // namespace

bool prefill_sel_accepts(const LayerShape& s, const RowMap& map) {
  return tiles_shape(s) && s.rules.l_sel == block_tokens && s.rules.n_sel <= most_chosen && map_is_whole(map);
}

bool prefill_sel_pays(const LayerShape& s, const QueryTile& tile) {
  return std::int64_t{2} * items_of(s, tile) > limits().units;
}

void attend_prefill_sel(const AttendArgs& a, Stream* stream) {
  if (a.tile.rows() == 0) return;
  if (a.shape.dtype == DType::bf16)
    launch_sized<__nv_bfloat16>(a, stream);
  else
    launch_sized<__half>(a, stream);
}

}  // namespace nsa::gpu
