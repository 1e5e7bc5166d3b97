// Prefill's selected branch, 16-bit storage: neighbouring queries share the blocks they have loaded.
//
// A CTA takes a group and 16 consecutive queries, a warp each: a query's (up to 16) heads are the M of m16n8k16. One
// more warp walks the union of the queries' blocks, which are sorted, and streams each block's K and V once through a
// ring of slots (tensor copies, 128-byte swizzle); with it goes the set of queries that chose it. Every warp goes
// through the ring at its own pace and multiplies only the blocks that are its own, so no product is wasted however
// little the choices agree. CTAs stay and take every gridDim-th item; the items of a group follow one another, so that
// its K and V stay in the L2. FLOPs: 2 (Dk + Dv) a (head, chosen token). Bytes: from L2, a block's K and V once per 16
// queries that share it, and 16 times where they share nothing; from shared memory, a block once per query that chose
// it (32 KB at Dk = Dv = 128: 256 cycles at 128 bytes a cycle, twice what the products alone would take). Bound: those
// two together.

#include "kernels/cuda/prefill.cuh"
#include "kernels/cuda/stages.cuh"

namespace nsa::gpu {

namespace {

constexpr int warps = 12;                  // that multiply: queries of an item
constexpr int threads = 32 * (warps + 4);  // registers change hands between whole warpgroups
constexpr int block_tokens = 64;
constexpr int most_chosen = 32;

struct Params {
  CUtensorMap k, v;
  AttendArgs a;
  int box_rows, query_tiles, items;
};

struct Item {
  int sequence, group, first, plane;
  __device__ __forceinline__ Item(const Params& p, int index) {
    const LayerShape& s = p.a.shape;
    first = index % p.query_tiles * warps;
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
  static constexpr int query_bytes = DK * 16 * 2, box = block_tokens * 128;
  static constexpr int keys = DK / box_columns * box, slot = keys + DV / box_columns * box;
  static constexpr int slots = std::min(8, (224 * 1024 - warps * query_bytes) / slot);
  static constexpr int queries = slots * slot, barriers = queries + warps * query_bytes;
  static constexpr int told = barriers + 16 * slots, lists = told + 8 * slots;
  static constexpr int bytes = lists + warps * most_chosen * 4;
  static_assert(bytes <= 227 * 1024);
};

template <int DK, int DV>
struct Shared {
  using At = Layout<DK, DV>;
  char* memory;
  unsigned base;
  __device__ __forceinline__ explicit Shared(char* given) : memory(given), base(shared_address(given)) {}
  __device__ __forceinline__ unsigned slot(int i) const { return base + i * At::slot; }
  __device__ __forceinline__ unsigned full(int i) const { return base + At::barriers + 8 * i; }
  __device__ __forceinline__ unsigned empty(int i) const { return full(At::slots + i); }
  __device__ __forceinline__ Told& told(int i) const { return reinterpret_cast<Told*>(memory + At::told)[i]; }
  __device__ __forceinline__ int* lists() const { return reinterpret_cast<int*>(memory + At::lists); }
  __device__ __forceinline__ uint4* query(int warp) const {
    return reinterpret_cast<uint4*>(memory + At::queries + warp * At::query_bytes);
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
  for (int index = blockIdx.x; index < p.items; index += gridDim.x) {
    const Item item(p, index);
    __syncwarp();
    for (int i = lane; i < warps * n; i += 32) {
      const int query = item.first + i / n;
      const std::int64_t row = std::int64_t{item.sequence} * p.a.tile.tokens + query;
      lists[i] = query < p.a.tile.tokens ? p.a.selected[(row * s.groups + item.group) * n + i % n] : -1;
    }
    __syncwarp();
    constexpr int none = INT32_MAX;
    int at = 0;
    const auto next = [&] {
      const int block = lane < warps && at < n ? lists[lane * n + at] : none;
      ++at;
      return block < 0 ? none : block;
    };
    for (int mine = next();;) {
      const int block = __reduce_min_sync(0xffffffffu, mine);
      const unsigned queries = __ballot_sync(0xffffffffu, mine == block);
      if (lane == 0) fill(item, block == none ? -1 : block, queries);
      turn.next();
      if (block == none) break;
      if (mine == block) mine = next();
    }
  }
}

__device__ __forceinline__ uint4 load_matrices(unsigned at) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(at));
  return v;
}
__device__ __forceinline__ uint4 load_transposed(unsigned at) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(at));
  return v;
}

// One warp: its query.
template <class T, int DK, int DV>
struct Row {
  using At = Layout<DK, DV>;
  unsigned query;               // of its heads, in operand order
  unsigned k_row, v_row;        // the lane's row within 16 tokens, in bytes
  unsigned k_column, v_column;  // its 16 bytes within the row's first 32, swizzled
  float o[DV / 8][4];
  float m[2], sum[2];

  __device__ __forceinline__ explicit Row(unsigned q) : query(q) {
    const unsigned lane = threadIdx.x % 32, matrix = lane / 8, r = lane % 8;
    k_row = (matrix / 2 * 8 + r) * 128;
    k_column = (matrix % 2 ^ r) * 16;
    v_row = (matrix % 2 * 8 + r) * 128;
    v_column = (matrix / 2 ^ r) * 16;
  }
  __device__ __forceinline__ void begin(const T* from, int heads, uint4* to);
  template <bool Whole>
  __device__ __forceinline__ void add(unsigned slot, int tokens);
};

// Row r of `from` is head r; those past `heads` are zero.
template <class T, int DK, int DV>
__device__ __forceinline__ void Row<T, DK, DV>::begin(const T* from, int heads, uint4* to) {
  const int lane = threadIdx.x % 32, g = lane / 4, quad = lane % 4;
  __syncwarp();
#pragma unroll
  for (int step = 0; step < DK / 16; ++step) {
    const auto* low = reinterpret_cast<const std::uint32_t*>(from + g * DK + step * 16 + quad * 2);
    const auto* high = reinterpret_cast<const std::uint32_t*>(from + (g + 8) * DK + step * 16 + quad * 2);
    to[step * 32 + lane] = {g < heads ? low[0] : 0u, g + 8 < heads ? high[0] : 0u, g < heads ? low[4] : 0u,
                            g + 8 < heads ? high[4] : 0u};
  }
  __syncwarp();
#pragma unroll
  for (auto& x : o) x[0] = x[1] = x[2] = x[3] = 0.0f;
  m[0] = m[1] = nothing;
  sum[0] = sum[1] = 0.0f;
}

// The block in `slot`, of which the query sees the first `tokens`.
template <class T, int DK, int DV>
template <bool Whole>
__device__ __forceinline__ void Row<T, DK, DV>::add(unsigned slot, int tokens) {
  const float scale = log2_e / sqrtf(static_cast<float>(DK));
  const int lane = threadIdx.x % 32, quad = lane % 4;
  float s[8][4];
#pragma unroll
  for (auto& x : s) x[0] = x[1] = x[2] = x[3] = 0.0f;
#pragma unroll
  for (int step = 0; step < DK / 16; ++step) {
    uint4 q;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(q.x), "=r"(q.y), "=r"(q.z), "=r"(q.w)
                 : "r"(query + (step * 32 + lane) * 16));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint4 k = load_matrices(slot + step / 4 * At::box + j * 2048 + k_row + (k_column ^ step % 4 * 32));
      mma(s[2 * j], q.x, q.y, q.z, q.w, k.x, k.y, T{});
      mma(s[2 * j + 1], q.x, q.y, q.z, q.w, k.z, k.w, T{});
    }
  }
  if constexpr (!Whole) {
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
    top = fmaxf(m[half], quad_max(top) * scale);
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
  if (__any_sync(0xffffffffu, old[0] != 1.0f || old[1] != 1.0f)) {
#pragma unroll
    for (auto& x : o) x[0] *= old[0], x[1] *= old[0], x[2] *= old[1], x[3] *= old[1];
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const std::uint32_t a0 = pack(s[2 * j][0], s[2 * j][1], T{}), a1 = pack(s[2 * j][2], s[2 * j][3], T{}),
                        a2 = pack(s[2 * j + 1][0], s[2 * j + 1][1], T{}),
                        a3 = pack(s[2 * j + 1][2], s[2 * j + 1][3], T{});
    // Tokens that were never written may hold NaN, which a weight of zero would not undo.
    const auto seen = [&](int token) {
      return (token < tokens ? 0xFFFFu : 0u) | (token + 1 < tokens ? 0xFFFF0000u : 0u);
    };
    const unsigned low = Whole ? ~0u : seen(j * 16 + quad * 2), high = Whole ? ~0u : seen(j * 16 + quad * 2 + 8);
#pragma unroll
    for (int pair = 0; pair < DV / 16; ++pair) {
      uint4 v = load_transposed(slot + At::keys + pair / 4 * At::box + j * 2048 + v_row + (v_column ^ pair % 4 * 32));
      if constexpr (!Whole) v = {v.x & low, v.y & high, v.z & low, v.w & high};
      mma(o[2 * pair], a0, a1, a2, a3, v.x, v.y, T{});
      mma(o[2 * pair + 1], a0, a1, a2, a3, v.z, v.w, T{});
    }
  }
}

template <class T, int DK, int DV>
__global__ void __launch_bounds__(threads, 1) sel_kernel(const __grid_constant__ Params p) {
#ifdef NSA_WGMMA
  using At = Layout<DK, DV>;
  extern __shared__ __align__(1024) char memory[];
  const Shared<DK, DV> shared(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < At::slots; ++i) {
      open_barrier(shared.full(i), 1);
      open_barrier(shared.empty(i), warps);
    }
    barriers_opened();
  }
  __syncthreads();
  wait_for_previous();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp >= warps) {
    give_registers<24>();
    if (warp == warps) stream(p, shared);
    return;
  }
  take_registers<160>();
  const LayerShape& shape = p.a.shape;
  const int heads = shape.heads_per_group;
  const std::int64_t first_position = *p.a.tile.first_position;
  Row<T, DK, DV> row(shared_address(shared.query(warp)));
  Turn<At::slots> turn;
  for (int index = blockIdx.x; index < p.items; index += gridDim.x) {
    const Item item(p, index);
    const bool exists = item.first + warp < p.a.tile.tokens;
    const std::int64_t at = std::int64_t{item.sequence} * p.a.tile.tokens + item.first + warp,
                       t = first_position + item.first + warp;
    const std::int64_t head_at = at * shape.heads() + item.group * heads;
    row.begin(static_cast<const T*>(p.a.q) + head_at * DK, exists ? heads : 0, shared.query(warp));
    int count = 0;
    for (;; turn.next()) {
      wait_for(shared.full(turn.slot), turn.phase);
      const Told told = shared.told(turn.slot);
      if (told.block >= 0 && told.queries >> warp & 1u) {
        const std::int64_t seen = t + 1 - std::int64_t{told.block} * block_tokens;
        if (seen >= block_tokens)
          row.template add<true>(shared.slot(turn.slot), block_tokens);
        else
          row.template add<false>(shared.slot(turn.slot), static_cast<int>(seen));
        count += seen < block_tokens ? static_cast<int>(seen) : block_tokens;
      }
      __syncwarp();
      if (lane == 0) arrive(shared.empty(turn.slot));
      if (told.block < 0) break;
    }
    turn.next();
    if (!exists) continue;
    if (lane == 0)
      atomicAdd(reinterpret_cast<unsigned long long*>(p.a.reads) + item.sequence * shape.groups + item.group,
                static_cast<unsigned long long>(count));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int head = lane / 4 + half * 8;
      const float total = quad_sum(row.sum[half]);
      if (head >= heads) continue;
      if (lane % 4 == 0)
        reinterpret_cast<float2*>(p.a.out.ms)[head_at + head] =
            make_float2(total > 0.0f ? row.m[half] * 0.6931471805599453f : -INFINITY, total);
      float* to = p.a.out.o + (head_at + head) * DV + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < DV / 8; ++j)
        *reinterpret_cast<float2*>(to + 8 * j) = make_float2(row.o[j][2 * half], row.o[j][2 * half + 1]);
    }
  }
#endif
}

template <class T, int DK, int DV>
void launch(const AttendArgs& a, Stream* stream) {
  Params p{};
  p.a = a;
  p.box_rows = box_rows_of(a.k.map, block_tokens);
  const std::int64_t planes = std::int64_t{a.tile.batch_begin + a.tile.batches} * a.shape.groups;
  p.k = rows_map(a.k, a.shape.dtype, planes, p.box_rows);
  p.v = rows_map(a.v, a.shape.dtype, planes, p.box_rows);
  p.query_tiles = (a.tile.tokens + warps - 1) / warps;
  p.items = a.tile.batches * a.shape.groups * p.query_tiles;
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

void attend_prefill_sel(const AttendArgs& a, Stream* stream) {
  if (a.tile.rows() == 0) return;
  if (a.shape.dtype == DType::bf16)
    launch_sized<__nv_bfloat16>(a, stream);
  else
    launch_sized<__half>(a, stream);
}

}  // namespace nsa::gpu
