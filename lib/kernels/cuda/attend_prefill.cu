// Prefill's compressed and window branches, 16-bit storage: dense tiles on Hopper's warpgroup products.
//
// Tiling: prefill.cuh. M = 4 queries x 16 heads a warpgroup, N = 128 tokens, all of Dk and Dv at once: 64 x 128 scores
// and 64 x Dv results in registers. The scores of tile j are under way together with tile j-1's weighted sum, and the
// two warpgroups take turns by themselves: one's exponentials run beside the other's products.
// FLOPs: 2 (Dk + Dv) a (head, token). Bytes: a tile's K and V once per 8 queries from L2. Bound: the tensor cores, with
// the exponentials (16 a cycle and SM) at half their time.
//
// cmp's tiles begin at multiples of 128 and go up, and a tile that a row does not see changes nothing, not even by
// rounding: (m, sum) do not depend on how queries are tiled or K is laid out. A window's tiles begin where the item's
// first query sees its first token, where K is not cut: 8 queries see w + 7 tokens, so that 16 are left for a last one.

#include "kernels/cuda/attend_prefill.cuh"
#include "kernels/cuda/stages.cuh"

namespace nsa::gpu {

using namespace dense;

namespace {

// Where a lane's two rows of a product, heads lane / 4 and that plus 8 of the warp's query, lie in memory.
struct DenseRow {
  std::int64_t list;  // (row, group)
  int heads;
  bool is_row;
  __device__ __forceinline__ DenseRow(const DenseParams& p, const DenseItem& item, int query)
      : list((std::int64_t{item.sequence} * p.tile.tokens + item.first + query) * p.shape.groups + item.group),
        heads(p.shape.heads_per_group),
        is_row(item.first + query < p.tile.tokens) {}
  __device__ __forceinline__ int in_group(int half) const { return threadIdx.x % 32 / 4 + half * 8; }
  __device__ __forceinline__ bool exists(int half) const { return is_row && in_group(half) < heads; }
  __device__ __forceinline__ std::int64_t head(int half) const { return list * heads + in_group(half); }
  __device__ __forceinline__ int column() const { return threadIdx.x % 4 * 2; }
};

// One warpgroup's state over an item's tokens of one branch.
template <class T, int DK, int DV>
struct Rows {
  const Params& p;
  const Shared<DK, DV>& shared;
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
  template <int N>
  __device__ __forceinline__ void pack_weights(const float (&scores)[N]) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) weights[i] = pack(scores[2 * i], scores[2 * i + 1], T{});
  }
  template <bool Cut, int N>
  __device__ __forceinline__ void soften(float (&scores)[N], std::int64_t begin);
  template <int Tokens>
  __device__ __forceinline__ void queue_values(int slot);
  template <int Tokens>
  __device__ __forceinline__ void clear_behind(int slot, std::int64_t begin, std::int64_t rows);
  template <bool Weigh, int N>
  __device__ __forceinline__ void step(float (&scores)[N], std::int64_t begin, bool cut);
  template <int Tokens>
  __device__ __forceinline__ void last_values(std::int64_t begin, std::int64_t rows);
  /// `Last`: the queries are not needed again.
  template <Branch B, bool Weigh, bool Last>
  __device__ __forceinline__ void run(const DenseItem& item, int phase);
  __device__ __forceinline__ int query() const { return group * group_queries + threadIdx.x % 128 / 32; }
  template <Branch B>
  __device__ __forceinline__ void count_reads(const DenseItem& item) const;
  __device__ __forceinline__ void put_ms(std::int64_t head, float top, float total) const {
    if (threadIdx.x % 4 == 0)
      reinterpret_cast<float2*>(p.out.ms)[head] =
          make_float2(total > 0.0f ? top * 0.6931471805599453f : -INFINITY, total);
  }
  template <bool Weigh>
  __device__ __forceinline__ void put_partials(const DenseItem& item) const;
  template <Branch B>
  __device__ __forceinline__ void put_gated(const DenseItem& item);
};

// Scores [N * 2 tokens] from token `begin` to weights relative to the new maximum; `old` is what o has to be scaled by.
template <class T, int DK, int DV>
template <bool Cut, int N>
__device__ __forceinline__ void Rows<T, DK, DV>::soften(float (&scores)[N], std::int64_t begin) {
  const float scale = log2_e / sqrtf(static_cast<float>(DK));
  if constexpr (Cut) {
    const int from = static_cast<int>(span.begin - begin), to = static_cast<int>(span.end - begin);
    const int quad = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int column = i / 4 * 8 + quad * 2 + i % 2;
      if (column < from || column >= to) scores[i] = -INFINITY;
    }
    count += max(0, min(to, 2 * N) - max(from, 0));
  } else {
    count += 2 * N;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = scores[2 * half];
#pragma unroll
    for (int j = 0; j < N / 4; ++j) top = fmaxf(top, fmaxf(scores[4 * j + 2 * half], scores[4 * j + 2 * half + 1]));
    top = reference(m[half], quad_max(top) * scale);
    old[half] = exp2_fast(m[half] - top);
    m[half] = top;
    float added = 0.0f;
#pragma unroll
    for (int j = 0; j < N / 4; ++j) {
      float& a = scores[4 * j + 2 * half];
      float& b = scores[4 * j + 2 * half + 1];
      a = exp2_fast(fmaf(a, scale, -top));
      b = exp2_fast(fmaf(b, scale, -top));
      added += a + b;
    }
    sum[half] = sum[half] * old[half] + added;
  }
}

// o += weights v, queued.
template <class T, int DK, int DV>
template <int Tokens>
__device__ __forceinline__ void Rows<T, DK, DV>::queue_values(int slot) {
  const std::uint64_t v = operand_at(shared.slot(slot), Layout<DK, DV>::tile_box);
#pragma unroll
  for (int step = 0; step < Tokens / 16; ++step) add_product(o, weights + 4 * step, further(v, step * 16 * 128), T{});
  products_queued();
}

// Rows that were never written may hold NaN, which a weight of zero would not undo: they become zero.
template <class T, int DK, int DV>
template <int Tokens>
__device__ __forceinline__ void Rows<T, DK, DV>::clear_behind(int slot, std::int64_t begin, std::int64_t rows) {
  if (begin + Tokens <= rows) return;
  const int written = static_cast<int>(rows - begin) * 8;  // pieces of 16 bytes
  for (int box = 0; box < DV / box_columns; ++box)
    for (int i = written + group * 128 + threadIdx.x % 128; i < Tokens * 8; i += groups * 128)
      asm volatile(
          "st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(shared.slot(slot) + box * Layout<DK, DV>::tile_box + i * 16),
          "r"(0)
          : "memory");
  before_copies();
  meet(1, groups * 128);
}

// A tile behind the first one: its scores, beside the weighted sum of the one before.
template <class T, int DK, int DV>
template <bool Weigh, int N>
__device__ __forceinline__ void Rows<T, DK, DV>::step(float (&scores)[N], std::int64_t begin, bool cut) {
  take();
  products_begin();
  queue_scores<T>(scores, shared, group, taken);
  const int k_slot = taken;
  if constexpr (Weigh) {
    take();
    products_begin();
    queue_values<dense_tokens>(taken);
    products_wait<1>();
  } else {
    products_wait<0>();
  }
  settled(scores);
  release(k_slot);
  // The same for all warps: a branch that they take apart would make the products wait.
  if (cut)
    soften<true>(scores, begin);
  else
    soften<false>(scores, begin);
  if constexpr (Weigh) {
    computed(sum[0] + sum[1], shared.base);
    products_wait<0>();
    settled(o);
    release(taken);
    if (__any_sync(0xffffffffu, old[0] != 1.0f || old[1] != 1.0f)) {
#pragma unroll
      for (int i = 0; i < DV / 2; ++i) o[i] *= old[i / 2 % 2];
    }
  }
  pack_weights(scores);
}

template <class T, int DK, int DV>
template <int Tokens>
__device__ __forceinline__ void Rows<T, DK, DV>::last_values(std::int64_t begin, std::int64_t rows) {
  take();
  clear_behind<Tokens>(taken, begin, rows);
  products_begin();
  queue_values<Tokens>(taken);
  products_wait<0>();
  settled(o);
  release(taken);
}

template <class T, int DK, int DV>
template <Branch B, bool Weigh, bool Last>
__device__ __forceinline__ void Rows<T, DK, DV>::run(const DenseItem& item, int phase) {
  span = span_of<B>(p.d.shape.rules, item.t + query());
  m[0] = m[1] = nothing;
  sum[0] = sum[1] = 0.0f;
  count = 0;
#pragma unroll
  for (float& x : o) x = 0.0f;
  const Walk walk = walk_of<B>(p, item);
  const std::int64_t all_from = span_of<B>(p.d.shape.rules, item.t + queries - 1).begin,
                     all_to = span_of<B>(p.d.shape.rules, item.t).end;  // tokens that every query sees
  wait_for(shared.queries_full(), phase);
  if (walk.tiles > 0) {
    take();
    products_begin();
    queue_scores<T>(s, shared, group, taken);
    products_wait<0>();
    settled(s);
    release(taken);
    soften<true>(s, walk.begin);
    pack_weights(s);
  }
  for (int tile = 1; tile < walk.tiles; ++tile) {
    const std::int64_t begin = walk.at(tile);
    step<Weigh>(s, begin, begin < all_from || begin + dense_tokens > all_to);
  }
  const std::int64_t last = walk.at(walk.count() - 1), rows = p.source[B].rows;
  float few[narrow_tokens / 2];
  if (B == win && walk.narrow) step<Weigh>(few, last, true);
  if (Last && threadIdx.x % 32 == 0) arrive(shared.queries_empty());
  if (!Weigh || walk.tiles == 0) return;
  if (B == win && walk.narrow)
    last_values<narrow_tokens>(last, rows);
  else
    last_values<dense_tokens>(last, rows);
}

template <class T, int DK, int DV>
template <Branch B>
__device__ __forceinline__ void Rows<T, DK, DV>::count_reads(const DenseItem& item) const {
  if (threadIdx.x % 32 == 0 && count > 0 && item.first + query() < p.d.tile.tokens)
    atomicAdd(reinterpret_cast<unsigned long long*>(p.reads[B]) + item.sequence * p.d.shape.groups + item.group,
              static_cast<unsigned long long>(count));
}

template <class T, int DK, int DV>
template <bool Weigh>
__device__ __forceinline__ void Rows<T, DK, DV>::put_partials(const DenseItem& item) const {
  const DenseRow at(p.d, item, query());
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = quad_sum(sum[half]);
    if (!at.exists(half)) continue;
    put_ms(at.head(half), m[half], total);
    if (!Weigh) continue;
    float* to = p.out.o + at.head(half) * DV + at.column();
#pragma unroll
    for (int j = 0; j < DV / 8; ++j)
      *reinterpret_cast<float2*>(to + 8 * j) = make_float2(o[4 * j + 2 * half], o[4 * j + 2 * half + 1]);
  }
}

// win, the first, leaves its share of o; cmp adds its own to what the same threads left.
template <class T, int DK, int DV>
template <Branch B>
__device__ __forceinline__ void Rows<T, DK, DV>::put_gated(const DenseItem& item) {
  const DenseRow at(p.d, item, query());
  float weight[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = quad_sum(sum[half]);
    weight[half] = 0.0f;
    if (!at.exists(half)) continue;
    if (B == cmp) put_ms(at.head(half), m[half], total);
    if (total > 0.0f) weight[half] = p.gate[at.list * branches + B] / total;
    const float* from = p.out.o + at.head(half) * DV + at.column();
#pragma unroll
    for (int j = 0; B == cmp && j < DV / 8; ++j) {
      const float2 before = *reinterpret_cast<const float2*>(from + 8 * j);
      s[j + 32 * half] = before.x, s[j + 16 + 32 * half] = before.y;
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (!at.exists(half)) continue;
    float* to = p.out.o + at.head(half) * DV + at.column();
#pragma unroll
    for (int j = 0; j < DV / 8; ++j) {
      float2 x = make_float2(o[4 * j + 2 * half] * weight[half], o[4 * j + 2 * half + 1] * weight[half]);
      if (B == cmp) x.x += s[j + 32 * half], x.y += s[j + 16 + 32 * half];
      *reinterpret_cast<float2*>(to + 8 * j) = x;
    }
  }
}

template <class T, int DK, int DV, Job J>
__global__ void __launch_bounds__(threads, 1) dense_kernel(const __grid_constant__ Params p) {
#ifdef NSA_WGMMA
  extern __shared__ char memory[];
  const Shared<DK, DV> shared(memory);
  if (threadIdx.x == 0) shared.open();
  __syncthreads();
  wait_for_previous();
  const std::int64_t first_position = *p.d.tile.first_position;
  const int group = threadIdx.x / 128;
  if (group == groups) {
    give_registers<40>();
    if (threadIdx.x % 128 == 0) stream<DK, DV, J>(p, shared, first_position);
  } else {
    take_registers<232>();
    Rows<T, DK, DV> rows{p, shared, group};
    int phase = 0;
    for (int index = blockIdx.x; index < p.d.items; index += gridDim.x, phase ^= 1) {
      const DenseItem item(p.d, index, first_position);
      if constexpr (J == Job::win || J == Job::gated) {
        rows.template run<win, true, J == Job::win>(item, phase);
        rows.template count_reads<win>(item);
      }
      if constexpr (J == Job::win) rows.template put_partials<true>(item);
      if constexpr (J == Job::gated) rows.template put_gated<win>(item);
      if constexpr (J == Job::win) continue;
      rows.template run<cmp, J != Job::cmp_ms, true>(item, phase);
      rows.template count_reads<cmp>(item);
      if constexpr (J == Job::gated)
        rows.template put_gated<cmp>(item);
      else
        rows.template put_partials<J != Job::cmp_ms>(item);
    }
  }
#endif
}

template <class T, int DK, int DV, Job J>
void launch(const AttendArgs* of[branches], const float* gate, Stream* stream) {
  const AttendArgs& a = *of[J == Job::win ? win : cmp];
  Params p{};
  p.d = dense_params(a.shape, a.tile, a.q, queries);
  p.out = a.out;
  p.gate = gate;
  for (const Branch b : {cmp, win}) {
    if (!of[b]) continue;
    const std::int64_t end = a.tile.max_positions;
    p.source[b] =
        dense_source(a.shape, a.tile, of[b]->k, &of[b]->v, b == cmp ? compressed_tokens(a.shape.rules, end - 1) : end);
    p.reads[b] = of[b]->reads;
  }
  launch_early(dense_kernel<T, DK, DV, J>, dim3(dense_ctas(p.d)), threads, Layout<DK, DV>::bytes, stream, 1, p);
}

template <Job J>
void launch(const AttendArgs* of[branches], const float* gate, Stream* stream) {
  const LayerShape& s = of[J == Job::win ? win : cmp]->shape;
  const auto sized = [&](auto type) {
    using T = decltype(type);
    if (s.d_k == 64)
      launch<T, 64, 64, J>(of, gate, stream);
    else
      launch<T, 128, 128, J>(of, gate, stream);
  };
  if (s.dtype == DType::bf16)
    sized(__nv_bfloat16{});
  else
    sized(__half{});
}

}  // namespace

bool prefill_accepts(Branch branch, const LayerShape& s, const RowMap& map) {
  return branch != sel && tiles_shape(s) && map_is_whole(map) &&
         (branch == cmp || map.chunk == INT64_MAX || map.chunk % 8 == 0);
}

void attend_prefill(Branch branch, const AttendArgs& a, Stream* stream) {
  if (a.tile.rows() == 0) return;
  const AttendArgs* of[branches] = {};
  of[branch] = &a;
  if (branch == win)
    launch<Job::win>(of, nullptr, stream);
  else if (a.scores_only)
    launch<Job::cmp_ms>(of, nullptr, stream);
  else
    launch<Job::cmp>(of, nullptr, stream);
}

void attend_prefill_gated(const AttendArgs& of_cmp, const AttendArgs& of_win, const float* gate, Stream* stream) {
  if (of_cmp.tile.rows() == 0) return;
  const AttendArgs* of[branches] = {};
  of[cmp] = &of_cmp;
  of[win] = &of_win;
  launch<Job::gated>(of, gate, stream);
}

}  // namespace nsa::gpu
