#pragma once
// Prefill's selected branch (prefill/selected/kernel.cu): the warp of a query, or of several.

#include "kernels/cuda/prefill/selected/shared_memory.cuh"

namespace nsa::gpu::selected {

// A warp and its query, or queries. g and g + 8 are a lane's two rows, heads of a query each; [2] is over them,
// [lane_queries] over their queries. Where a warp has several, a block may not be one of a row's query: that row is not
// `chosen`.
template <class T, int DK, int DV, bool Tuned>
struct QueryConsumer {
  using Storage = SharedStorage<DK, DV>;
  const SelectedParams& p;
  const Shared<DK, DV>& shared;
  int warp;
  float scale_of_shape;         // of scores, in a padded instance
  unsigned k_row, v_row;        // the lane's row within 16 tokens, in bytes
  unsigned k_column, v_column;  // its 16 bytes within the row's first 32, swizzled
  PipelineState<mailbox_slots> mailbox = {};
  static constexpr bool q_in_shared = Storage::keeps_queries;
  static constexpr int lane_queries = Tuned ? 1 : 2;
  std::uint32_t q[q_in_shared ? 1 : DK / 16][4];
  float o[DV / 8][4], s[8][4];
  std::uint32_t probabilities[4][4];  // of 16 tokens each, packed as the A operand of p v
  // Of rows g and g + 8. row_max is the reference of the exponentials, in base 2: update_row_max() lets it lag behind
  // the maximum by a bounded factor, so that o is rescaled less often.
  float row_max[2], row_sum[2];
  int tokens_read[lane_queries];
  int tokens[lane_queries];  // of the block that the row's query sees

  __device__ __forceinline__ QueryConsumer(const SelectedParams& params, const Shared<DK, DV>& at, int warp_index)
      : p(params), shared(at), warp(warp_index), scale_of_shape(log2_e / sqrtf(static_cast<float>(p.a.shape.d_k))) {
    const unsigned lane = threadIdx.x % 32, matrix = lane / 8, r = lane % 8;
    k_row = (matrix / 2 * 8 + r) * 128;
    k_column = (matrix % 2 ^ r) * 16;
    v_row = (matrix % 2 * 8 + r) * 128;
    v_column = (matrix / 2 ^ r) * 16;
  }
  // Constants of a tuned instance; of others those of the shape (prefill/prefill.cuh).
  __device__ __forceinline__ float score_scale() const {
    return Tuned ? log2_e / sqrtf(static_cast<float>(DK)) : scale_of_shape;
  }
  __device__ __forceinline__ int d_k() const { return Tuned ? DK : p.a.shape.d_k; }
  __device__ __forceinline__ int d_v() const { return Tuned ? DV : p.a.shape.d_v; }
  __device__ __forceinline__ int part_heads() const { return Tuned ? p.a.shape.heads_per_group : p.part.heads; }
  // Of the lane's row: the query, among the warp's, and the head in the part.
  __device__ __forceinline__ int row_query(int half) const {
    return Tuned ? 0 : (threadIdx.x % 32 / 4 + half * 8) >> (31 - __clz(p.part.query_rows));
  }
  __device__ __forceinline__ int row_head(int half) const {
    const int row = threadIdx.x % 32 / 4 + half * 8;
    return Tuned ? row : row & (p.part.query_rows - 1);
  }
  __device__ __forceinline__ bool has_row(const WorkItem& item, int query, int half) const {
    return row_head(half) < part_heads() && (Tuned || item.has(p, query + row_query(half)));
  }
  __device__ __forceinline__ std::int64_t row_group(const WorkItem& item, int query, int half) const {
    return item.row(p, query + row_query(half)) * p.a.shape.groups + item.group;
  }
  __device__ __forceinline__ void load_queries(const WorkItem& item, int query);
  __device__ __forceinline__ int selected_blocks(const WorkItem& item, int query, int t) const;
  __device__ __forceinline__ void multiply_qk(unsigned keys);
  __device__ __forceinline__ void online_softmax(bool all_visible);
  template <bool AllVisible>
  __device__ __forceinline__ void accumulate_pv(unsigned values, int tokens);
  __device__ __forceinline__ void attend_block(Notification block, unsigned queries, int t, int last_t);
  __device__ __forceinline__ void attend_item(const WorkItem& item, int query, int t);
  __device__ __forceinline__ void epilogue(const WorkItem& item, int query) const;
  __device__ __forceinline__ void store_partial(std::int64_t at, int half, float total) const;
  __device__ __forceinline__ void store_gated(const std::int64_t (&at)[2], int heads, float gate,
                                              const float (&total)[2]) const;
  __device__ __forceinline__ void store_gated_columns(std::int64_t at, int half, float gate, float total) const;
};

// q of the rows; those without a head, and columns past Dk, are zero.
template <class T, int DK, int DV, bool Tuned>
__device__ __forceinline__ void QueryConsumer<T, DK, DV, Tuned>::load_queries(const WorkItem& item, int query) {
  const int quad = threadIdx.x % 4;
  const auto row = [&](int half) {
    return static_cast<const T*>(p.a.q) +
           (row_group(item, query, half) * p.a.shape.heads_per_group + row_head(half)) * d_k() + quad * 2;
  };
  const T* rows[2] = {row(0), row(1)};
  const bool has_low = has_row(item, query, 0), has_high = has_row(item, query, 1);
#pragma unroll
  for (int step = 0; step < DK / 16; ++step) {
    const auto* low = reinterpret_cast<const std::uint32_t*>(rows[0] + step * 16);
    const auto* high = reinterpret_cast<const std::uint32_t*>(rows[1] + step * 16);
    const bool has_columns = Tuned || step * 16 < d_k();
    const uint4 x = {has_columns && has_low ? low[0] : 0u, has_columns && has_high ? high[0] : 0u,
                     has_columns && has_low ? low[4] : 0u, has_columns && has_high ? high[4] : 0u};
    if constexpr (q_in_shared)
      shared.query(warp, step) = x;  // read back by the same lane
    else
      q[step][0] = x.x, q[step][1] = x.y, q[step][2] = x.z, q[step][3] = x.w;
  }
#pragma unroll
  for (auto& x : o) x[0] = x[1] = x[2] = x[3] = 0.0f;
  row_max[0] = row_max[1] = neg_inf;
  row_sum[0] = row_sum[1] = 0.0f;
#pragma unroll
  for (int& read : tokens_read) read = 0;
}

template <class T, int DK, int DV, bool Tuned>
__device__ __forceinline__ void QueryConsumer<T, DK, DV, Tuned>::multiply_qk(unsigned keys) {
#pragma unroll
  for (auto& x : s) x[0] = x[1] = x[2] = x[3] = 0.0f;
#pragma unroll
  for (int step = 0; step < DK / 16; ++step) {
    uint4 a;
    if constexpr (q_in_shared)
      a = shared.query(warp, step);
    else
      a = {q[step][0], q[step][1], q[step][2], q[step][3]};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      std::uint32_t k[4];
      ldmatrix_x4(k, keys + step / 4 * Storage::box + j * 2048 + k_row + (k_column ^ step % 4 * 32));
      mma(s[2 * j], a.x, a.y, a.z, a.w, k[0], k[1], T{});
      mma(s[2 * j + 1], a.x, a.y, a.z, a.w, k[2], k[3], T{});
    }
  }
}

// Scores to probabilities; rescales o if row_max changed. A row's query sees the block's first `tokens`; with
// `all_visible` those are all, or none.
template <class T, int DK, int DV, bool Tuned>
__device__ __forceinline__ void QueryConsumer<T, DK, DV, Tuned>::online_softmax(bool all_visible) {
  const float scale = score_scale();
  const int quad = threadIdx.x % 4;
  if (!all_visible) {
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (j * 8 + quad * 2 + i % 2 >= tokens[i / 2 % lane_queries]) s[j][i] = -INFINITY;
  }
  float rescale[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float tile_max = s[0][2 * half];
#pragma unroll
    for (int j = 0; j < 8; ++j) tile_max = fmaxf(tile_max, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
    const bool chosen = Tuned || tokens[half % lane_queries] > 0;
    const float row_tile_max = quad_max(tile_max) * scale;
    const float new_max = update_row_max(row_max[half], chosen ? row_tile_max : neg_inf);
    rescale[half] = exp2_fast(row_max[half] - new_max);
    row_max[half] = new_max;
    const float reference = chosen ? new_max : INFINITY;
    float added = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      s[j][2 * half] = exp2_fast(fmaf(s[j][2 * half], scale, -reference));
      s[j][2 * half + 1] = exp2_fast(fmaf(s[j][2 * half + 1], scale, -reference));
      added += s[j][2 * half] + s[j][2 * half + 1];
    }
    row_sum[half] = row_sum[half] * rescale[half] + added;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = &s[2 * j + i / 2][i % 2 * 2];
      probabilities[j][i] = pack(pair[0], pair[1], T{});
      // Packs here, before the wait for V: a conversion behind the wait keeps twice the registers alive, which spill.
      asm volatile("" : "+r"(probabilities[j][i]));
    }
  if (__any_sync(0xffffffffu, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
    for (auto& x : o) x[0] *= rescale[0], x[1] *= rescale[0], x[2] *= rescale[1], x[3] *= rescale[1];
  }
}

// o += p v. Rows of V that were never written are set to zero: they may be NaN, and 0 * NaN is NaN.
template <class T, int DK, int DV, bool Tuned>
template <bool AllVisible>
__device__ __forceinline__ void QueryConsumer<T, DK, DV, Tuned>::accumulate_pv(unsigned values, int tokens) {
  const int quad = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const auto& a = probabilities[j];
    const auto seen = [&](int token) {
      return (token < tokens ? 0xFFFFu : 0u) | (token + 1 < tokens ? 0xFFFF0000u : 0u);
    };
    const unsigned low = AllVisible ? ~0u : seen(j * 16 + quad * 2),
                   high = AllVisible ? ~0u : seen(j * 16 + quad * 2 + 8);
#pragma unroll
    for (int pair = 0; pair < DV / 16; ++pair) {
      std::uint32_t v[4];
      ldmatrix_x4_trans(v, values + pair / 4 * Storage::box + j * 2048 + v_row + (v_column ^ pair % 4 * 32));
      if constexpr (!AllVisible) v[0] &= low, v[1] &= high, v[2] &= low, v[3] &= high;
      mma(o[2 * pair], a[0], a[1], a[2], a[3], v[0], v[1], T{});
      mma(o[2 * pair + 1], a[0], a[1], a[2], a[3], v[2], v[3], T{});
    }
  }
}

// `queries`: those of the warp that selected the block, a bit each. t and last_t: positions of its first and last
// query.
template <class T, int DK, int DV, bool Tuned>
__device__ __forceinline__ void QueryConsumer<T, DK, DV, Tuned>::attend_block(Notification block, unsigned queries,
                                                                              int t, int last_t) {
  const bool first_lane = threadIdx.x % 32 == 0;
  const int begin = block.block() * block_tokens, last_tokens = min(last_t + 1 - begin, block_tokens);
#pragma unroll
  for (int k = 0; k < lane_queries; ++k) {
    tokens[k] = Tuned ? last_tokens : queries >> row_query(k) & 1 ? min(t + row_query(k) + 1 - begin, block_tokens) : 0;
    tokens_read[k] += tokens[k];
  }
  const int slot = block.slot();
  mbarrier_wait(shared.key_full(slot), block.phase());
  multiply_qk(shared.key(slot));
  fence_proxy_async();
  __syncwarp();
  mbarrier_arrive_if(shared.key_empty(slot), first_lane);
  online_softmax(t + 1 - begin >= block_tokens);
  mbarrier_wait(shared.value_full(slot), block.phase());
  if (last_tokens == block_tokens)
    accumulate_pv<true>(shared.value(slot), last_tokens);
  else
    accumulate_pv<false>(shared.value(slot), last_tokens);
  fence_proxy_async();
  __syncwarp();
  mbarrier_arrive_if(shared.value_empty(slot), first_lane);
}

// Blocks of 64 tokens that the query at position t selected.
template <class T, int DK, int DV, bool Tuned>
__device__ __forceinline__ int QueryConsumer<T, DK, DV, Tuned>::selected_blocks(const WorkItem& item, int query,
                                                                                int t) const {
  const int lane = threadIdx.x % 32, n = p.a.shape.rules.n_sel;
  const std::int32_t* selected = p.a.selected + (item.row(p, query) * p.a.shape.groups + item.group) * n;
  if constexpr (Tuned) return __popc(__ballot_sync(0xffffffffu, lane < n && selected[lane] >= 0));
  int count = 0;
  for (int first = 0; first < (p.pairs_blocks ? 2 * n : n); first += 32) {
    const int i = p.pairs_blocks ? (first + lane) / 2 : first + lane;
    const bool selects = i < n && block_of_selection(p, selected[i], first + lane, t) >= 0;
    count += __popc(__ballot_sync(0xffffffffu, selects));
  }
  return count;
}

// `query`: the warp's first, at position t.
template <class T, int DK, int DV, bool Tuned>
__device__ __forceinline__ void QueryConsumer<T, DK, DV, Tuned>::attend_item(const WorkItem& item, int query, int t) {
  if (!item.has(p, query)) return;
  load_queries(item, query);
  int wanted = selected_blocks(item, query, t), last_query = 0;
  if constexpr (!Tuned)
    for (; last_query + 1 < p.warp_queries && item.has(p, query + last_query + 1); ++last_query)
      wanted += selected_blocks(item, query + last_query + 1, t + last_query + 1);
  while (wanted > 0) {
    mbarrier_wait(shared.mailbox_full(warp, mailbox.slot), mailbox.phase);
    unsigned queries = 1;
    if constexpr (!Tuned)
      if (p.merges_selections) queries = shared.read_mailbox_queries(warp, mailbox.slot);
    attend_block(shared.read_mailbox(warp, mailbox.slot), queries, t, t + last_query);
    wanted -= Tuned ? 1 : __popc(queries);
    mailbox.advance();
  }
  epilogue(item, query);
}

template <class T, int DK, int DV, bool Tuned>
__device__ __forceinline__ void QueryConsumer<T, DK, DV, Tuned>::epilogue(const WorkItem& item, int query) const {
  const LayerShape& shape = p.a.shape;
  float total[2];
  std::int64_t at[2];
  int read = 0;  // by rows that are a query's first head
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    total[half] = quad_sum(row_sum[half]);
    at[half] = row_group(item, query, half) * shape.heads_per_group + min(row_head(half), part_heads() - 1);
    if (row_head(half) == 0 && has_row(item, query, half) && threadIdx.x % 4 == 0)
      read += tokens_read[half % lane_queries];
  }
  if (p.gate && Tuned) {
    store_gated(at, part_heads() - row_head(0), p.gate[row_group(item, query, 0) * branches + sel], total);
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!has_row(item, query, half)) continue;
      if (p.gate)
        store_gated_columns(at[half], half, p.gate[row_group(item, query, half) * branches + sel], total[half]);
      else
        store_partial(at[half], half, total[half]);
    }
  }
  if constexpr (!Tuned) read = static_cast<int>(__reduce_add_sync(0xffffffffu, static_cast<unsigned>(read)));
  if (threadIdx.x % 32 == 0 && (Tuned || p.a.reads))
    atomicAdd(reinterpret_cast<unsigned long long*>(p.a.reads) + item.sequence * shape.groups + item.group,
              static_cast<unsigned long long>(read));
}

template <class T, int DK, int DV, bool Tuned>
__device__ __forceinline__ void QueryConsumer<T, DK, DV, Tuned>::store_partial(std::int64_t at, int half,
                                                                               float total) const {
  if (threadIdx.x % 4 == 0)
    reinterpret_cast<float2*>(p.a.out.ms)[at] =
        make_float2(total > 0.0f ? row_max[half] * 0.6931471805599453f : -INFINITY, total);
  float* to = p.a.out.o + at * d_v() + threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < DV / 8; ++j)
    if (Tuned || 8 * j < p.part.columns)
      *reinterpret_cast<float2*>(to + 8 * j) = make_float2(o[j][2 * half], o[j][2 * half + 1]);
}

// Both heads' loads are issued before the first is used.
template <class T, int DK, int DV, bool Tuned>
__device__ __forceinline__ void QueryConsumer<T, DK, DV, Tuned>::store_gated(const std::int64_t (&at)[2], int heads,
                                                                             float gate,
                                                                             const float (&total)[2]) const {
  const int column = threadIdx.x % 4 * 2;
  float2 other_branches[2][DV / 8];
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int j = 0; j < DV / 8; ++j)
      other_branches[half][j] = __ldcs(reinterpret_cast<const float2*>(p.a.out.o + at[half] * DV + column + 8 * j));
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (heads <= half * 8) continue;
    const float weight = total[half] > 0.0f ? gate / total[half] : 0.0f;
    T* to = static_cast<T*>(p.o) + at[half] * DV + column;
#pragma unroll
    for (int j = 0; j < DV / 8; ++j)
      __stcs(reinterpret_cast<std::uint32_t*>(to + 8 * j),
             pack(fmaf(o[j][2 * half], weight, other_branches[half][j].x),
                  fmaf(o[j][2 * half + 1], weight, other_branches[half][j].y), T{}));
  }
}

// The same of one head of a padded instance, with fewer registers.
template <class T, int DK, int DV, bool Tuned>
__device__ __forceinline__ void QueryConsumer<T, DK, DV, Tuned>::store_gated_columns(std::int64_t at, int half,
                                                                                     float gate, float total) const {
  const int column = threadIdx.x % 4 * 2, d_v = p.a.shape.d_v;
  const float weight = total > 0.0f ? gate / total : 0.0f;
  const float* from = p.a.out.o + at * d_v + column;
  T* to = static_cast<T*>(p.o) + at * d_v + column;
#pragma unroll
  for (int j = 0; j < DV / 8; ++j) {
    if (8 * j >= p.part.columns) break;
    const float2 x = __ldcs(reinterpret_cast<const float2*>(from + 8 * j));
    __stcs(reinterpret_cast<std::uint32_t*>(to + 8 * j),
           pack(fmaf(o[j][2 * half], weight, x.x), fmaf(o[j][2 * half + 1], weight, x.y), T{}));
  }
}

}  // namespace nsa::gpu::selected
