#pragma once
// Prefill's compressed and window branches (prefill/dense/kernel.cu): a consumer warpgroup and its KV mainloop.

#include "kernels/cuda/prefill/dense/producer.cuh"

namespace nsa::gpu::dense {

// A consumer warpgroup's state over one branch of a work item. g and g + 8 are a lane's two rows of its warp's part of
// the product; [2] is over them, [lane_queries] over the queries that they are heads of.
template <class T, int DK, int DV, bool Tuned>
struct Consumer {
  using Rows = LaneRows<Tuned>;
  static constexpr int lane_queries = Rows::queries, tokens_of_tile = tile_tokens<DK>;
  const DenseAttentionParams& p;
  const Shared<DK, DV>& shared;
  int warpgroup;
  PipelineState<slots<DK>> state;
  int current_slot;  // of the latest consumer_wait()
  float o[DV / 2], s[tokens_of_tile / 2];
  std::uint32_t probabilities[tokens_of_tile / 4];  // of a tile, packed as the A operand of p v
  float row_max[2], row_sum[2], rescale[2];         // row_max in base 2; rescale: factor that o needs
  TokenRange visible[lane_queries];
  std::int64_t tokens_read[lane_queries];
  float gate[lane_queries][branches];  // Job::gated

  // Constants of a tuned instance; of others those of the shape (prefill/prefill.cuh).
  __device__ __forceinline__ float score_scale() const {
    return Tuned ? log2_e / sqrtf(static_cast<float>(DK)) : p.work.scale;
  }
  __device__ __forceinline__ int d_v() const { return Tuned ? DV : p.work.shape.d_v; }
  // Whether the part of o has columns [8 j, 8 j + 8).
  __device__ __forceinline__ bool has_columns(int j) const { return Tuned || 8 * j < p.part.columns; }

  __device__ __forceinline__ void consumer_release(int i) const {
    mbarrier_arrive_if(shared.empty(i), threadIdx.x % 32 == 0);
  }
  // Waits until the next slot is full.
  __device__ __forceinline__ void consumer_wait() {
    current_slot = warp_uniform(state.slot);
    mbarrier_wait(shared.full(current_slot), state.phase);
    state.advance();
  }
  template <int N>
  __device__ __forceinline__ void pack_probabilities(const float (&scores)[N]) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) probabilities[i] = pack(scores[2 * i], scores[2 * i + 1], T{});
  }
  template <bool Masked, int N>
  __device__ __forceinline__ void mask(float (&scores)[N], std::int64_t begin);
  template <int N>
  __device__ __forceinline__ void exponentiate(float (&scores)[N]);
  template <bool Masked, int N>
  __device__ __forceinline__ bool first_softmax(float (&scores)[N], std::int64_t begin);
  template <bool Masked, int N>
  __device__ __forceinline__ bool online_softmax(float (&scores)[N], std::int64_t begin);
  template <int Tokens>
  __device__ __forceinline__ void issue_pv(int slot);
  template <int Tokens>
  __device__ __forceinline__ void zero_unwritten_rows(int slot, std::int64_t begin, std::int64_t rows);
  template <bool WithValues, int N>
  __device__ __forceinline__ void mainloop_step(float (&scores)[N], std::int64_t begin, bool masked, bool first);
  template <int Tokens, class Overlapped>
  __device__ __forceinline__ void last_pv(std::int64_t begin, std::int64_t rows, Overlapped overlapped);
  template <Branch B, bool WithValues, bool LastBranch, class Overlapped>
  __device__ __forceinline__ void mainloop(const DenseWorkItem& item, int phase, Overlapped overlapped);
  // Of the work item: its queries, and the query of the lane's row.
  __device__ __forceinline__ int queries() const {
    return Tuned ? consumer_warpgroups * warpgroup_queries : p.work.item_queries;
  }
  __device__ __forceinline__ int query(int half) const { return Rows::query(p.part, warpgroup, half); }

  // Epilogue: prefill/dense/epilogue.cuh.
  template <Branch B>
  __device__ __forceinline__ void add_reads(const DenseWorkItem& item) const;
  __device__ __forceinline__ void store_ms(std::int64_t head, float max, float sum) const;
  template <bool WithValues>
  __device__ __forceinline__ void store_partials(const DenseWorkItem& item) const;
  static constexpr bool preloads_win = DV <= tokens_of_tile;
  __device__ __forceinline__ void load_gates(const DenseWorkItem& item);
  __device__ __forceinline__ void load_win_output(const DenseWorkItem& item);
  template <Branch B>
  __device__ __forceinline__ void store_gated(const DenseWorkItem& item);
};

// Sets scores of tokens that a row's query does not see to -inf; scores [2 N tokens] from token `begin`.
template <class T, int DK, int DV, bool Tuned>
template <bool Masked, int N>
__device__ __forceinline__ void Consumer<T, DK, DV, Tuned>::mask(float (&scores)[N], std::int64_t begin) {
#pragma unroll
  for (int k = 0; k < lane_queries; ++k) {
    if constexpr (Masked) {
      const int from = static_cast<int>(visible[k].begin - begin), to = static_cast<int>(visible[k].end - begin);
      const int quad = threadIdx.x % 4;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int column = i / 4 * 8 + quad * 2 + i % 2;
        if (i / 2 % lane_queries == k && (column < from || column >= to)) scores[i] = -INFINITY;
      }
      tokens_read[k] += max(0, min(to, 2 * N) - max(from, 0));
    } else {
      tokens_read[k] += 2 * N;
    }
  }
}

// Scores, in base 2 and relative to row_max, to probabilities; adds them to row_sum.
template <class T, int DK, int DV, bool Tuned>
template <int N>
__device__ __forceinline__ void Consumer<T, DK, DV, Tuned>::exponentiate(float (&scores)[N]) {
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
    row_sum[half] += added;
  }
}

// Online softmax of the first tile that a row sees: scores to probabilities. The new row_max may have any sign. Returns
// true: o must be multiplied by `rescale`.
template <class T, int DK, int DV, bool Tuned>
template <bool Masked, int N>
__device__ __forceinline__ bool Consumer<T, DK, DV, Tuned>::first_softmax(float (&scores)[N], std::int64_t begin) {
  const float scale = score_scale();
  mask<Masked>(scores, begin);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float tile_max = scores[2 * half];
#pragma unroll
    for (int j = 0; j < N / 4; ++j)
      tile_max = fmaxf(tile_max, fmaxf(scores[4 * j + 2 * half], scores[4 * j + 2 * half + 1]));
    const float new_max = update_row_max(row_max[half], quad_max(tile_max) * scale);
    rescale[half] = exp2_fast(row_max[half] - new_max);
    row_max[half] = new_max;
    row_sum[half] *= rescale[half];
#pragma unroll
    for (int j = 0; j < N / 2; ++j) {
      float& x = scores[4 * (j / 2) + 2 * half + j % 2];
      x = fmaf(x, scale, -new_max);
    }
  }
  exponentiate(scores);
  return true;
}

// Online softmax of a later tile: row_max changes rarely. Only positive differences from it matter, so floats are
// compared as integers, three at a time. Returns whether o must be multiplied by `rescale`.
template <class T, int DK, int DV, bool Tuned>
template <bool Masked, int N>
__device__ __forceinline__ bool Consumer<T, DK, DV, Tuned>::online_softmax(float (&scores)[N], std::int64_t begin) {
  const float scale = score_scale();
  mask<Masked>(scores, begin);
  int max_rise[2] = {0, 0};  // above row_max
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int j = 0; j < N / 4; ++j) {
      float& a = scores[4 * j + 2 * half];
      float& b = scores[4 * j + 2 * half + 1];
      a = fmaf(a, scale, -row_max[half]);
      b = fmaf(b, scale, -row_max[half]);
      max_rise[half] = __vimax3_s32(max_rise[half], __float_as_int(a), __float_as_int(b));
    }
  const bool rescales = __any_sync(0xffffffffu, max(max_rise[0], max_rise[1]) > __float_as_int(rescale_threshold));
  if (rescales) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float tile_rise = quad_max(__int_as_float(max_rise[half])),
                  rise = tile_rise > rescale_threshold ? tile_rise : 0.0f;
      rescale[half] = exp2_fast(-rise);
      row_max[half] += rise;
      row_sum[half] *= rescale[half];
#pragma unroll
      for (int j = 0; j < N / 2; ++j) scores[4 * (j / 2) + 2 * half + j % 2] -= rise;
    }
  }
  exponentiate(scores);
  return rescales;
}

// o += probabilities v, issued as one group: products of up to 128 columns.
template <class T, int DK, int DV, bool Tuned>
template <int Tokens>
__device__ __forceinline__ void Consumer<T, DK, DV, Tuned>::issue_pv(int slot) {
  const std::uint64_t v = make_desc(shared.slot(slot), Shared<DK, DV>::Storage::tile_box);
#pragma unroll
  for (int step = 0; step < Tokens / 16; ++step) {
    const std::uint64_t rows = advance_desc(v, step * 16 * 128);
    if constexpr (DV <= 128) {
      wgmma_rs(o, probabilities + 4 * step, rows, T{});
    } else {
#pragma unroll
      for (int part = 0; part < DV / 128; ++part)
        wgmma_rs(reinterpret_cast<float(&)[64]>(o[64 * part]), probabilities + 4 * step,
                 advance_desc(rows, part * 2 * Shared<DK, DV>::Storage::tile_box), T{});
    }
  }
  warpgroup_commit_batch();
}

// Sets rows of V that were never written to zero: they may be NaN, and 0 * NaN is NaN.
template <class T, int DK, int DV, bool Tuned>
template <int Tokens>
__device__ __forceinline__ void Consumer<T, DK, DV, Tuned>::zero_unwritten_rows(int slot, std::int64_t begin,
                                                                                std::int64_t rows) {
  if (begin + Tokens <= rows) return;
  const int written = static_cast<int>(rows - begin) * 8;  // 16-byte vectors
  for (int box = 0; box < DV / box_columns; ++box)
    for (int i = written + warpgroup * 128 + threadIdx.x % 128; i < Tokens * 8; i += consumer_warpgroups * 128)
      asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(shared.slot(slot) +
                                                                    box * Shared<DK, DV>::Storage::tile_box + i * 16),
                   "r"(0)
                   : "memory");
  fence_proxy_async();
  named_barrier_sync(1, consumer_warpgroups * 128);
}

// A later tile: q k^T of this tile and p v of the previous one are in flight together.
template <class T, int DK, int DV, bool Tuned>
template <bool WithValues, int N>
__device__ __forceinline__ void Consumer<T, DK, DV, Tuned>::mainloop_step(float (&scores)[N], std::int64_t begin,
                                                                          bool masked, bool first) {
  consumer_wait();
  warpgroup_arrive();
  issue_qk<T>(scores, shared, warpgroup, current_slot);
  const int k_slot = current_slot;
  if constexpr (WithValues) {
    consumer_wait();
    warpgroup_arrive();
    issue_pv<tokens_of_tile>(current_slot);
    warpgroup_wait<1>();
  } else {
    warpgroup_wait<0>();
  }
  warpgroup_fence_operand(scores);
  consumer_release(k_slot);
  // `first` and `masked` are equal in all warps: divergence would make the products wait.
  bool rescales;
  if (first)
    rescales = first_softmax<true>(scores, begin);
  else if (masked)
    rescales = online_softmax<true>(scores, begin);
  else
    rescales = online_softmax<false>(scores, begin);
  if constexpr (WithValues) {
    schedule_barrier(row_sum[0] + row_sum[1], shared.base);
    warpgroup_wait<0>();
    warpgroup_fence_operand(o);
    consumer_release(current_slot);
    if (rescales) {
#pragma unroll
      for (int i = 0; i < DV / 2; ++i) o[i] *= rescale[i / 2 % 2];
    }
  }
  pack_probabilities(scores);
}

// p v of the last tile; overlapped() runs while it is in flight.
template <class T, int DK, int DV, bool Tuned>
template <int Tokens, class Overlapped>
__device__ __forceinline__ void Consumer<T, DK, DV, Tuned>::last_pv(std::int64_t begin, std::int64_t rows,
                                                                    Overlapped overlapped) {
  consumer_wait();
  zero_unwritten_rows<Tokens>(current_slot, begin, rows);
  warpgroup_arrive();
  issue_pv<Tokens>(current_slot);
  overlapped();
  warpgroup_wait<0>();
  warpgroup_fence_operand(o);
  consumer_release(current_slot);
}

// All KV tiles of one branch. `WithValues`: p v, too. `LastBranch`: the queries are not read after it.
template <class T, int DK, int DV, bool Tuned>
template <Branch B, bool WithValues, bool LastBranch, class Overlapped>
__device__ __forceinline__ void Consumer<T, DK, DV, Tuned>::mainloop(const DenseWorkItem& item, int phase,
                                                                     Overlapped overlapped) {
#pragma unroll
  for (int k = 0; k < lane_queries; ++k) {
    visible[k] = visible_tokens<B>(p.work.shape.rules, item.t + query(k));
    tokens_read[k] = 0;
  }
  row_max[0] = row_max[1] = neg_inf;
  row_sum[0] = row_sum[1] = 0.0f;
#pragma unroll
  for (float& x : o) x = 0.0f;
  const auto range = kv_tiles<B, tokens_of_tile>(p, item);
  const std::int64_t all_from = visible_tokens<B>(p.work.shape.rules, item.t + queries() - 1).begin,
                     all_to = visible_tokens<B>(p.work.shape.rules, item.t).end;  // tokens that every query sees
  mbarrier_wait(shared.queries_full(), phase);
  if (range.tiles > 0) {
    consumer_wait();
    warpgroup_arrive();
    issue_qk<T>(s, shared, warpgroup, current_slot);
    warpgroup_wait<0>();
    warpgroup_fence_operand(s);
    consumer_release(current_slot);
    if (B == win || tokens_of_tile > all_to)
      first_softmax<true>(s, range.begin);
    else
      first_softmax<false>(s, range.begin);
    pack_probabilities(s);
  }
  for (int tile = 1; tile < range.tiles; ++tile) {
    const std::int64_t begin = range.tile_begin(tile);
    // first: a query's window may begin in the tile.
    mainloop_step<WithValues>(s, begin, begin < all_from || begin + tokens_of_tile > all_to,
                              B == win && begin <= all_from);
  }
  const std::int64_t last = range.tile_begin(range.count() - 1), rows = p.kv[B].rows;
  float narrow_scores[narrow_tile_tokens / 2];
  if (B == win && range.narrow) mainloop_step<WithValues>(narrow_scores, last, true, !Tuned && last <= all_from);
  if (LastBranch && threadIdx.x % 32 == 0) mbarrier_arrive(shared.queries_empty());
  if (!WithValues) return;
  if (range.tiles == 0) return overlapped();
  if (B == win && range.narrow)
    last_pv<narrow_tile_tokens>(last, rows, overlapped);
  else
    last_pv<tokens_of_tile>(last, rows, overlapped);
}

}  // namespace nsa::gpu::dense
