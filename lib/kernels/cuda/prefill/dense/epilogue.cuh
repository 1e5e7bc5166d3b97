#pragma once
// Prefill's compressed and window branches (prefill/dense/kernel.cu): a consumer warpgroup's epilogue.

#include "kernels/cuda/prefill/dense/consumer.cuh"

namespace nsa::gpu::dense {

// Addresses of a lane's two rows of a product.
template <class Rows>
struct OutputRows {
  std::int64_t row_group[Rows::queries];  // (row, group)
  bool is_row[Rows::queries];             // false past the tile's last query
  int heads, part_heads;
  const PrefillPart& part;
  __device__ __forceinline__ OutputRows(const DenseWork& w, const DenseWorkItem& item, int warpgroup,
                                        const PrefillPart& of)
      : heads(w.shape.heads_per_group), part_heads(Rows::queries == 1 ? heads : of.heads), part(of) {
#pragma unroll
    for (int k = 0; k < Rows::queries; ++k) {
      const int query = item.first_query + Rows::query(part, warpgroup, k);
      row_group[k] = (std::int64_t{item.sequence} * w.tile.tokens + query) * w.shape.groups + item.group;
      is_row[k] = query < w.tile.tokens;
    }
  }
  __device__ __forceinline__ int head_in_part(int half) const { return Rows::head(part, half); }
  __device__ __forceinline__ bool exists(int half) const {
    return is_row[half % Rows::queries] && head_in_part(half) < part_heads;
  }
  __device__ __forceinline__ std::int64_t head(int half) const {
    return row_group[half % Rows::queries] * heads + head_in_part(half);
  }
  __device__ __forceinline__ int column() const { return threadIdx.x % 4 * 2; }
};

template <class T, int DK, int DV, bool Tuned>
template <Branch B>
__device__ __forceinline__ void Consumer<T, DK, DV, Tuned>::add_reads(const DenseWorkItem& item) const {
  if (!Tuned && !p.reads[B]) return;
  std::int64_t total = tokens_read[0];
  if constexpr (Tuned) {
    if (item.first_query + query(0) >= p.work.tile.tokens) return;
  } else {
    const OutputRows<Rows> at(p.work, item, warpgroup, p.part);
    unsigned mine = 0;  // of the lane's rows that are a query's first head
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (threadIdx.x % 4 == 0 && at.is_row[half] && at.head_in_part(half) == 0)
        mine += static_cast<unsigned>(tokens_read[half]);
    total = __reduce_add_sync(0xffffffffu, mine);
  }
  if (threadIdx.x % 32 == 0 && total > 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(p.reads[B]) + item.sequence * p.work.shape.groups + item.group,
              static_cast<unsigned long long>(total));
}

template <class T, int DK, int DV, bool Tuned>
__device__ __forceinline__ void Consumer<T, DK, DV, Tuned>::store_ms(std::int64_t head, float max, float sum) const {
  if (threadIdx.x % 4 == 0)
    reinterpret_cast<float2*>(p.out.ms)[head] = make_float2(sum > 0.0f ? max * 0.6931471805599453f : -INFINITY, sum);
}

template <class T, int DK, int DV, bool Tuned>
template <bool WithValues>
__device__ __forceinline__ void Consumer<T, DK, DV, Tuned>::store_partials(const DenseWorkItem& item) const {
  const OutputRows<Rows> at(p.work, item, warpgroup, p.part);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = quad_sum(row_sum[half]);
    if (!at.exists(half)) continue;
    store_ms(at.head(half), row_max[half], total);
    if (!WithValues) continue;
    float* to = p.out.o + at.head(half) * d_v() + at.column();
#pragma unroll
    for (int j = 0; j < DV / 8; ++j)
      if (has_columns(j))
        *reinterpret_cast<float2*>(to + 8 * j) = make_float2(o[4 * j + 2 * half], o[4 * j + 2 * half + 1]);
  }
}

template <class T, int DK, int DV, bool Tuned>
__device__ __forceinline__ void Consumer<T, DK, DV, Tuned>::load_gates(const DenseWorkItem& item) {
  const OutputRows<Rows> at(p.work, item, warpgroup, p.part);
#pragma unroll
  for (int k = 0; k < lane_queries; ++k)
    for (const Branch b : {win, cmp}) gate[k][b] = at.is_row[k] ? p.gate[at.row_group[k] * branches + b] : 0.0f;
}

// Loads the output of store_gated<win> into s, where that has the room.
template <class T, int DK, int DV, bool Tuned>
__device__ __forceinline__ void Consumer<T, DK, DV, Tuned>::load_win_output(const DenseWorkItem& item) {
  if constexpr (!preloads_win) return;
  const OutputRows<Rows> at(p.work, item, warpgroup, p.part);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (!at.exists(half)) continue;
    const float* from = p.out.o + at.head(half) * d_v() + at.column();
#pragma unroll
    for (int j = 0; j < DV / 8; ++j) {
      if (!has_columns(j)) break;
      const float2 x = *reinterpret_cast<const float2*>(from + 8 * j);
      if constexpr (preloads_win) s[j + 32 * half] = x.x, s[j + 16 + 32 * half] = x.y;
    }
  }
}

// gate * o / sum. win comes first and stores its product; cmp adds its own to what the same thread stored.
template <class T, int DK, int DV, bool Tuned>
template <Branch B>
__device__ __forceinline__ void Consumer<T, DK, DV, Tuned>::store_gated(const DenseWorkItem& item) {
  const OutputRows<Rows> at(p.work, item, warpgroup, p.part);
  float weight[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = quad_sum(row_sum[half]);
    weight[half] = 0.0f;
    if (!at.exists(half)) continue;
    if (B == cmp) store_ms(at.head(half), row_max[half], total);
    if (total > 0.0f) weight[half] = gate[half % lane_queries][B] / total;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (!at.exists(half)) continue;
    float* to = p.out.o + at.head(half) * d_v() + at.column();
#pragma unroll
    for (int j = 0; j < DV / 8; ++j) {
      if (!has_columns(j)) break;
      float2 x = make_float2(o[4 * j + 2 * half] * weight[half], o[4 * j + 2 * half + 1] * weight[half]);
      if constexpr (B == cmp && preloads_win) {
        x.x += s[j + 32 * half], x.y += s[j + 16 + 32 * half];
      } else if constexpr (B == cmp) {
        const float2 of_win = *reinterpret_cast<const float2*>(to + 8 * j);
        x.x += of_win.x, x.y += of_win.y;
      }
      *reinterpret_cast<float2*>(to + 8 * j) = x;
    }
  }
}

}  // namespace nsa::gpu::dense
