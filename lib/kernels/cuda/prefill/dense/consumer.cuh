#pragma once
// Prefill's compressed and window branches (prefill/dense/kernel.cu): the side that multiplies.

#include "kernels/cuda/prefill/dense/producer.cuh"

namespace nsa::gpu::dense {

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
  float gate[branches];  // of the warp's query, where win and cmp are added up

  __device__ __forceinline__ void release(int slot) const { arrive_if(shared.empty(slot), threadIdx.x % 32 == 0); }
  // Waits for the next slot.
  __device__ __forceinline__ void take() {
    taken = uniform(turn.slot);
    wait_for(shared.full(taken), turn.phase);
    turn.next();
  }
  template <int N>
  __device__ __forceinline__ void pack_weights(const float (&scores)[N]) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) weights[i] = pack(scores[2 * i], scores[2 * i + 1], T{});
  }
  template <bool Cut, int N>
  __device__ __forceinline__ void cut(float (&scores)[N], std::int64_t begin);
  template <int N>
  __device__ __forceinline__ void weigh(float (&scores)[N]);
  template <bool Cut, int N>
  __device__ __forceinline__ bool soften_first(float (&scores)[N], std::int64_t begin);
  template <bool Cut, int N>
  __device__ __forceinline__ bool soften(float (&scores)[N], std::int64_t begin);
  template <int Tokens>
  __device__ __forceinline__ void queue_values(int slot);
  template <int Tokens>
  __device__ __forceinline__ void clear_behind(int slot, std::int64_t begin, std::int64_t rows);
  template <bool Weigh, int N>
  __device__ __forceinline__ void step(float (&scores)[N], std::int64_t begin, bool is_cut, bool first);
  template <int Tokens, class Beside>
  __device__ __forceinline__ void last_values(std::int64_t begin, std::int64_t rows, Beside beside);
  /// `Last`: the queries are not needed again. `beside`: done while the last weighted sum is under way.
  template <Branch B, bool Weigh, bool Last, class Beside>
  __device__ __forceinline__ void run(const DenseItem& item, int phase, Beside beside);
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
  __device__ __forceinline__ void fetch_gates(const DenseItem& item);
  __device__ __forceinline__ void fetch_win(const DenseItem& item);
  template <Branch B>
  __device__ __forceinline__ void put_gated(const DenseItem& item);
  template <Branch B, bool Weigh>
  __device__ __forceinline__ void alone(const DenseItem& item, int phase) {
    run<B, Weigh, true>(item, phase, [] {});
    count_reads<B>(item);
    put_partials<Weigh>(item);
  }
  __device__ __forceinline__ void gated(const DenseItem& item, int phase) {
    fetch_gates(item);
    run<win, true, false>(item, phase, [] {});
    count_reads<win>(item);
    put_gated<win>(item);
    run<cmp, true, true>(item, phase, [&] { fetch_win(item); });
    count_reads<cmp>(item);
    put_gated<cmp>(item);
  }
};

// Hides what the warp's query does not see of scores [N * 2 tokens] from token `begin`.
template <class T, int DK, int DV>
template <bool Cut, int N>
__device__ __forceinline__ void Rows<T, DK, DV>::cut(float (&scores)[N], std::int64_t begin) {
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
}

// Scores in powers of two above the reference to weights.
template <class T, int DK, int DV>
template <int N>
__device__ __forceinline__ void Rows<T, DK, DV>::weigh(float (&scores)[N]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float added = 0.0f;
#pragma unroll
    for (int j = 0; j < N / 4; ++j) {
      float& a = scores[4 * j + 2 * half];
      float& b = scores[4 * j + 2 * half + 1];
      a = exp2_fast(a);
      b = exp2_fast(b);
      added += a + b;
    }
    sum[half] += added;
  }
}

// Scores of a row's first tokens to weights relative to a reference of any sign; `old` is what o has to be scaled by,
// whether by anything the result.
template <class T, int DK, int DV>
template <bool Cut, int N>
__device__ __forceinline__ bool Rows<T, DK, DV>::soften_first(float (&scores)[N], std::int64_t begin) {
  const float scale = log2_e / sqrtf(static_cast<float>(DK));
  cut<Cut>(scores, begin);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = scores[2 * half];
#pragma unroll
    for (int j = 0; j < N / 4; ++j) top = fmaxf(top, fmaxf(scores[4 * j + 2 * half], scores[4 * j + 2 * half + 1]));
    top = reference(m[half], quad_max(top) * scale);
    old[half] = exp2_fast(m[half] - top);
    m[half] = top;
    sum[half] *= old[half];
#pragma unroll
    for (int j = 0; j < N / 2; ++j) {
      float& x = scores[4 * (j / 2) + 2 * half + j % 2];
      x = fmaf(x, scale, -top);
    }
  }
  weigh(scores);
  return true;
}

// The same behind them, where the reference stands for nearly every tile. Only what lies above it matters, so floats
// are compared as integers, three at a time.
template <class T, int DK, int DV>
template <bool Cut, int N>
__device__ __forceinline__ bool Rows<T, DK, DV>::soften(float (&scores)[N], std::int64_t begin) {
  const float scale = log2_e / sqrtf(static_cast<float>(DK));
  cut<Cut>(scores, begin);
  int top[2] = {0, 0};
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int j = 0; j < N / 4; ++j) {
      float& a = scores[4 * j + 2 * half];
      float& b = scores[4 * j + 2 * half + 1];
      a = fmaf(a, scale, -m[half]);
      b = fmaf(b, scale, -m[half]);
      top[half] = __vimax3_s32(top[half], __float_as_int(a), __float_as_int(b));
    }
  const bool grown = __any_sync(0xffffffffu, max(top[0], top[1]) > __float_as_int(most_growth));
  if (grown) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float above = quad_max(__int_as_float(top[half])), rise = above > most_growth ? above : 0.0f;
      old[half] = exp2_fast(-rise);
      m[half] += rise;
      sum[half] *= old[half];
#pragma unroll
      for (int j = 0; j < N / 2; ++j) scores[4 * (j / 2) + 2 * half + j % 2] -= rise;
    }
  }
  weigh(scores);
  return grown;
}

// o += weights v, queued.
template <class T, int DK, int DV>
template <int Tokens>
__device__ __forceinline__ void Rows<T, DK, DV>::queue_values(int slot) {
  const std::uint64_t v = make_desc(shared.slot(slot), Layout<DK, DV>::tile_box);
#pragma unroll
  for (int step = 0; step < Tokens / 16; ++step)
    add_product(o, weights + 4 * step, advance_desc(v, step * 16 * 128), T{});
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
  fence_proxy_async();
  meet(1, groups * 128);
}

// A tile behind the first one: its scores, beside the weighted sum of the one before.
template <class T, int DK, int DV>
template <bool Weigh, int N>
__device__ __forceinline__ void Rows<T, DK, DV>::step(float (&scores)[N], std::int64_t begin, bool is_cut, bool first) {
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
  bool grown;
  if (first)
    grown = soften_first<true>(scores, begin);
  else if (is_cut)
    grown = soften<true>(scores, begin);
  else
    grown = soften<false>(scores, begin);
  if constexpr (Weigh) {
    computed(sum[0] + sum[1], shared.base);
    products_wait<0>();
    settled(o);
    release(taken);
    if (grown) {
#pragma unroll
      for (int i = 0; i < DV / 2; ++i) o[i] *= old[i / 2 % 2];
    }
  }
  pack_weights(scores);
}

template <class T, int DK, int DV>
template <int Tokens, class Beside>
__device__ __forceinline__ void Rows<T, DK, DV>::last_values(std::int64_t begin, std::int64_t rows, Beside beside) {
  take();
  clear_behind<Tokens>(taken, begin, rows);
  products_begin();
  queue_values<Tokens>(taken);
  beside();
  products_wait<0>();
  settled(o);
  release(taken);
}

template <class T, int DK, int DV>
template <Branch B, bool Weigh, bool Last, class Beside>
__device__ __forceinline__ void Rows<T, DK, DV>::run(const DenseItem& item, int phase, Beside beside) {
  span = span_of<B>(p.d.shape.rules, item.t + query());
  m[0] = m[1] = neg_inf;
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
    if (B == win || dense_tokens > all_to)
      soften_first<true>(s, walk.begin);
    else
      soften_first<false>(s, walk.begin);
    pack_weights(s);
  }
  for (int tile = 1; tile < walk.tiles; ++tile) {
    const std::int64_t begin = walk.at(tile);
    step<Weigh>(s, begin, begin < all_from || begin + dense_tokens > all_to,
                p.source[B].map.chunk != INT64_MAX && B == win && tile == 1);
  }
  const std::int64_t last = walk.at(walk.count() - 1), rows = p.source[B].rows;
  float few[narrow_tokens / 2];
  if (B == win && walk.narrow) step<Weigh>(few, last, true, false);
  if (Last && threadIdx.x % 32 == 0) arrive(shared.queries_empty());
  if (!Weigh) return;
  if (walk.tiles == 0) return beside();
  if (B == win && walk.narrow)
    last_values<narrow_tokens>(last, rows, beside);
  else
    last_values<dense_tokens>(last, rows, beside);
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

template <class T, int DK, int DV>
__device__ __forceinline__ void Rows<T, DK, DV>::fetch_gates(const DenseItem& item) {
  const DenseRow at(p.d, item, query());
  for (const Branch b : {win, cmp}) gate[b] = at.is_row ? p.gate[at.list * branches + b] : 0.0f;
}

// What put_gated<win> has left, to s.
template <class T, int DK, int DV>
__device__ __forceinline__ void Rows<T, DK, DV>::fetch_win(const DenseItem& item) {
  const DenseRow at(p.d, item, query());
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (!at.exists(half)) continue;
    const float* from = p.out.o + at.head(half) * DV + at.column();
#pragma unroll
    for (int j = 0; j < DV / 8; ++j) {
      const float2 x = *reinterpret_cast<const float2*>(from + 8 * j);
      s[j + 32 * half] = x.x, s[j + 16 + 32 * half] = x.y;
    }
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
    if (total > 0.0f) weight[half] = gate[B] / total;
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

}  // namespace nsa::gpu::dense
