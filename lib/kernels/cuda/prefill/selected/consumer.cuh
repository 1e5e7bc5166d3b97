#pragma once
// Prefill's selected branch (prefill/selected/kernel.cu): the warp of a query.

#include "kernels/cuda/prefill/selected/shared_memory.cuh"

namespace nsa::gpu::selected {

// A warp and its query. g and g + 8 are a lane's two rows, heads of the query; [2] is over them.
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
  std::uint32_t q[q_in_shared ? 1 : DK / 16][4];
  float o[DV / 8][4], s[8][4];
  std::uint32_t probabilities[4][4];  // of 16 tokens each, packed as the A operand of p v
  // Of rows g and g + 8. row_max is the reference of the exponentials, in base 2: update_row_max() lets it lag behind
  // the maximum by a bounded factor, so that o is rescaled less often.
  float row_max[2], row_sum[2];
  int tokens_read;

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
  __device__ __forceinline__ void load_query(const T* from, int heads);
  __device__ __forceinline__ void multiply_qk(unsigned keys);
  __device__ __forceinline__ void online_softmax(int tokens);
  template <bool AllVisible>
  __device__ __forceinline__ void accumulate_pv(unsigned values, int tokens);
  __device__ __forceinline__ void attend_block(Notification block, int t);
  __device__ __forceinline__ void attend_item(const WorkItem& item, int query, int t);
  __device__ __forceinline__ void epilogue(const WorkItem& item, int query) const;
  __device__ __forceinline__ void store_partial(std::int64_t at, int half, float total) const;
  __device__ __forceinline__ void store_gated(const std::int64_t (&at)[2], int heads, float gate,
                                              const float (&total)[2]) const;
  __device__ __forceinline__ void store_gated_columns(const std::int64_t (&at)[2], int heads, float gate,
                                                      const float (&total)[2]) const;
};

// q of the query: row r of `from` is head r; those past `heads`, and columns past Dk, are zero.
template <class T, int DK, int DV, bool Tuned>
__device__ __forceinline__ void QueryConsumer<T, DK, DV, Tuned>::load_query(const T* from, int heads) {
  const int lane = threadIdx.x % 32, g = lane / 4, quad = lane % 4;
#pragma unroll
  for (int step = 0; step < DK / 16; ++step) {
    const auto* low = reinterpret_cast<const std::uint32_t*>(from + g * d_k() + step * 16 + quad * 2);
    const auto* high = reinterpret_cast<const std::uint32_t*>(from + (g + 8) * d_k() + step * 16 + quad * 2);
    const bool has_columns = Tuned || step * 16 < d_k();
    const uint4 x = {has_columns && g < heads ? low[0] : 0u, has_columns && g + 8 < heads ? high[0] : 0u,
                     has_columns && g < heads ? low[4] : 0u, has_columns && g + 8 < heads ? high[4] : 0u};
    if constexpr (q_in_shared)
      shared.query(warp, step) = x;  // read back by the same lane
    else
      q[step][0] = x.x, q[step][1] = x.y, q[step][2] = x.z, q[step][3] = x.w;
  }
#pragma unroll
  for (auto& x : o) x[0] = x[1] = x[2] = x[3] = 0.0f;
  row_max[0] = row_max[1] = neg_inf;
  row_sum[0] = row_sum[1] = 0.0f;
  tokens_read = 0;
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

// Scores to probabilities; rescales o if row_max changed. The query sees the block's first `tokens`.
template <class T, int DK, int DV, bool Tuned>
__device__ __forceinline__ void QueryConsumer<T, DK, DV, Tuned>::online_softmax(int tokens) {
  const float scale = score_scale();
  const int quad = threadIdx.x % 4;
  if (tokens < block_tokens) {
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (j * 8 + quad * 2 + i % 2 >= tokens) s[j][i] = -INFINITY;
  }
  float rescale[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float tile_max = s[0][2 * half];
#pragma unroll
    for (int j = 0; j < 8; ++j) tile_max = fmaxf(tile_max, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
    const float new_max = update_row_max(row_max[half], quad_max(tile_max) * scale);
    rescale[half] = exp2_fast(row_max[half] - new_max);
    row_max[half] = new_max;
    float added = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      s[j][2 * half] = exp2_fast(fmaf(s[j][2 * half], scale, -new_max));
      s[j][2 * half + 1] = exp2_fast(fmaf(s[j][2 * half + 1], scale, -new_max));
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

template <class T, int DK, int DV, bool Tuned>
__device__ __forceinline__ void QueryConsumer<T, DK, DV, Tuned>::attend_block(Notification block, int t) {
  const bool first_lane = threadIdx.x % 32 == 0;
  const int tokens = min(t + 1 - block.block() * block_tokens, block_tokens);
  const int slot = block.slot();
  mbarrier_wait(shared.key_full(slot), block.phase());
  multiply_qk(shared.key(slot));
  fence_proxy_async();
  __syncwarp();
  mbarrier_arrive_if(shared.key_empty(slot), first_lane);
  online_softmax(tokens);
  mbarrier_wait(shared.value_full(slot), block.phase());
  if (tokens == block_tokens)
    accumulate_pv<true>(shared.value(slot), tokens);
  else
    accumulate_pv<false>(shared.value(slot), tokens);
  fence_proxy_async();
  __syncwarp();
  mbarrier_arrive_if(shared.value_empty(slot), first_lane);
  tokens_read += tokens;
}

template <class T, int DK, int DV, bool Tuned>
__device__ __forceinline__ void QueryConsumer<T, DK, DV, Tuned>::attend_item(const WorkItem& item, int query, int t) {
  const LayerShape& shape = p.a.shape;
  const int lane = threadIdx.x % 32, n = shape.rules.n_sel;
  if (!item.has(p, query)) return;
  const std::int64_t row_group = item.row(p, query) * shape.groups + item.group;
  bool selects = lane < n && p.a.selected[row_group * n + lane] >= 0;
  if constexpr (!Tuned) {
    const int i = p.pairs_blocks ? lane / 2 : lane;
    selects = i < n && block_of_selection(p, p.a.selected[row_group * n + i], lane, t) >= 0;
  }
  load_query(static_cast<const T*>(p.a.q) + row_group * shape.heads_per_group * d_k(), part_heads());
  const int selected = __popc(__ballot_sync(0xffffffffu, selects));
  for (int i = 0; i < selected; ++i, mailbox.advance()) {
    mbarrier_wait(shared.mailbox_full(query, mailbox.slot), mailbox.phase);
    attend_block(shared.read_mailbox(query, mailbox.slot), t);
  }
  epilogue(item, query);
}

template <class T, int DK, int DV, bool Tuned>
__device__ __forceinline__ void QueryConsumer<T, DK, DV, Tuned>::epilogue(const WorkItem& item, int query) const {
  const LayerShape& shape = p.a.shape;
  const int lane = threadIdx.x % 32;
  const std::int64_t row_group = item.row(p, query) * shape.groups + item.group;
  float total[2];
  std::int64_t at[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    total[half] = quad_sum(row_sum[half]);
    at[half] = row_group * shape.heads_per_group + min(lane / 4 + half * 8, part_heads() - 1);
  }
  const int heads = part_heads() - lane / 4;  // above 0 and above 8: the lane's two rows are heads
  if (p.gate && Tuned)
    store_gated(at, heads, p.gate[row_group * branches + sel], total);
  else if (p.gate)
    store_gated_columns(at, heads, p.gate[row_group * branches + sel], total);
  else
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (heads > half * 8) store_partial(at[half], half, total[half]);
  if (lane == 0 && (Tuned || p.a.reads))
    atomicAdd(reinterpret_cast<unsigned long long*>(p.a.reads) + item.sequence * shape.groups + item.group,
              static_cast<unsigned long long>(tokens_read));
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

// The same of a padded instance, with fewer registers.
template <class T, int DK, int DV, bool Tuned>
__device__ __forceinline__ void QueryConsumer<T, DK, DV, Tuned>::store_gated_columns(const std::int64_t (&at)[2],
                                                                                     int heads, float gate,
                                                                                     const float (&total)[2]) const {
  const int column = threadIdx.x % 4 * 2, d_v = p.a.shape.d_v;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (heads <= half * 8) continue;
    const float weight = total[half] > 0.0f ? gate / total[half] : 0.0f;
    const float* from = p.a.out.o + at[half] * d_v + column;
    T* to = static_cast<T*>(p.o) + at[half] * d_v + column;
#pragma unroll
    for (int j = 0; j < DV / 8; ++j) {
      if (8 * j >= p.part.columns) break;
      const float2 x = __ldcs(reinterpret_cast<const float2*>(from + 8 * j));
      __stcs(reinterpret_cast<std::uint32_t*>(to + 8 * j),
             pack(fmaf(o[j][2 * half], weight, x.x), fmaf(o[j][2 * half + 1], weight, x.y), T{}));
    }
  }
}

}  // namespace nsa::gpu::selected
