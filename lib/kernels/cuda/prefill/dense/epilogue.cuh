#pragma once
// Prefill's compressed and window branches (prefill/dense/kernel.cu): a consumer warpgroup's epilogue.

#include "kernels/cuda/prefill/dense/consumer.cuh"

namespace nsa::gpu::dense {

// Addresses of a lane's two rows of a product: heads lane / 4 and lane / 4 + 8 of the warp's query.
struct OutputRow {
  std::int64_t row_group;  // (row, group)
  int heads, part_heads;
  bool is_row;  // false past the tile's last query
  __device__ __forceinline__ OutputRow(const DenseWork& w, const DenseWorkItem& item, int query, bool tuned,
                                       const PrefillPart& part)
      : row_group((std::int64_t{item.sequence} * w.tile.tokens + item.first_query + query) * w.shape.groups +
                  item.group),
        heads(w.shape.heads_per_group),
        part_heads(tuned ? heads : part.heads),
        is_row(item.first_query + query < w.tile.tokens) {}
  __device__ __forceinline__ int head_in_part(int half) const { return threadIdx.x % 32 / 4 + half * 8; }
  __device__ __forceinline__ bool exists(int half) const { return is_row && head_in_part(half) < part_heads; }
  __device__ __forceinline__ std::int64_t head(int half) const { return row_group * heads + head_in_part(half); }
  __device__ __forceinline__ int column() const { return threadIdx.x % 4 * 2; }
};

template <class T, int DK, int DV, bool Tuned>
template <Branch B>
__device__ __forceinline__ void Consumer<T, DK, DV, Tuned>::add_reads(const DenseWorkItem& item) const {
  if (!Tuned && !p.reads[B]) return;
  if (threadIdx.x % 32 == 0 && tokens_read > 0 && item.first_query + query() < p.work.tile.tokens)
    atomicAdd(reinterpret_cast<unsigned long long*>(p.reads[B]) + item.sequence * p.work.shape.groups + item.group,
              static_cast<unsigned long long>(tokens_read));
}

template <class T, int DK, int DV, bool Tuned>
__device__ __forceinline__ void Consumer<T, DK, DV, Tuned>::store_ms(std::int64_t head, float max, float sum) const {
  if (threadIdx.x % 4 == 0)
    reinterpret_cast<float2*>(p.out.ms)[head] = make_float2(sum > 0.0f ? max * 0.6931471805599453f : -INFINITY, sum);
}

template <class T, int DK, int DV, bool Tuned>
template <bool WithValues>
__device__ __forceinline__ void Consumer<T, DK, DV, Tuned>::store_partials(const DenseWorkItem& item) const {
  const OutputRow at(p.work, item, query(), Tuned, p.part);
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
  const OutputRow at(p.work, item, query(), Tuned, p.part);
  for (const Branch b : {win, cmp}) gate[b] = at.is_row ? p.gate[at.row_group * branches + b] : 0.0f;
}

// Loads the output of store_gated<win> into s.
template <class T, int DK, int DV, bool Tuned>
__device__ __forceinline__ void Consumer<T, DK, DV, Tuned>::load_win_output(const DenseWorkItem& item) {
  const OutputRow at(p.work, item, query(), Tuned, p.part);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (!at.exists(half)) continue;
    const float* from = p.out.o + at.head(half) * d_v() + at.column();
#pragma unroll
    for (int j = 0; j < DV / 8; ++j) {
      if (!has_columns(j)) break;
      const float2 x = *reinterpret_cast<const float2*>(from + 8 * j);
      s[j + 32 * half] = x.x, s[j + 16 + 32 * half] = x.y;
    }
  }
}

// gate * o / sum. win comes first and stores its product; cmp adds its own to what the same thread stored.
template <class T, int DK, int DV, bool Tuned>
template <Branch B>
__device__ __forceinline__ void Consumer<T, DK, DV, Tuned>::store_gated(const DenseWorkItem& item) {
  const OutputRow at(p.work, item, query(), Tuned, p.part);
  float weight[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = quad_sum(row_sum[half]);
    weight[half] = 0.0f;
    if (!at.exists(half)) continue;
    if (B == cmp) store_ms(at.head(half), row_max[half], total);
    if (total > 0.0f) weight[half] = gate[B] / total;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (!at.exists(half)) continue;
    float* to = p.out.o + at.head(half) * d_v() + at.column();
#pragma unroll
    for (int j = 0; j < DV / 8; ++j) {
      if (!has_columns(j)) break;
      float2 x = make_float2(o[4 * j + 2 * half] * weight[half], o[4 * j + 2 * half + 1] * weight[half]);
      if (B == cmp) x.x += s[j + 32 * half], x.y += s[j + 16 + 32 * half];
      *reinterpret_cast<float2*>(to + 8 * j) = x;
    }
  }
}

}  // namespace nsa::gpu::dense
