// The row-wise attention kernel (attention/rows/cta.cuh has its head) and its launch: splits, cluster or scratch.

#include "kernels/cuda/attention/rows/merge.cuh"
#include "kernels/cuda/attention/stages.cuh"

namespace nsa::gpu {

namespace {

constexpr int rows_max_cluster = 16;

template <class T, int DK, int DV, Branch B>
__global__ void __maxnreg__(rows_max_registers) rows_kernel(const __grid_constant__ RowsParams p) {
  extern __shared__ __align__(128) char shared[];
  RowsCta<T, DK, DV, B> cta(p, shared);
  __syncthreads();
  if (bulk_copies && cta.warp == rows_warps) {
    if (threadIdx.x % 32 == 0) cta.produce();
  } else {
    cta.mainloop();
    if (threadIdx.x % 32 == 0 && blockIdx.y == 0 && cta.count > 0)
      atomicAdd(reinterpret_cast<unsigned long long*>(p.a.reads) + cta.counter,
                static_cast<unsigned long long>(cta.count));
    if (B == cmp && cta.halo_rows > 0) cta.score_halos();
  }
  __syncthreads();
  float* partial = reinterpret_cast<float*>(shared + RowsLayout<DK, DV>::memory);
  float* to = p.cluster
                  ? partial
                  : p.partials + (std::int64_t{cta.work_item} * p.splits + cta.split) * split_partial_floats(p.a.shape);
  cta.merge_warps(partial + RowsLayout<DK, DV>::partial_bytes / 4, to);
  if (p.cluster) {
    cluster_barrier();
    const int first = threadIdx.x * p.splits + cta.split, stride = blockDim.x * p.splits;
    if constexpr (B == cmp) cta.merge_buckets(first, stride);
    cta.merge_splits(
        first, stride, [&](int i) { return map_to_cta(partial, i); }, [](const auto* from) { return *from; });
    cluster_barrier();
    return;
  }
  if (!arrives_last(&p.arrivals[cta.work_item], p.splits)) return;
  if constexpr (B == cmp) cta.merge_buckets(threadIdx.x, blockDim.x);
  const float* partials = p.partials + std::int64_t{cta.work_item} * p.splits * split_partial_floats(p.a.shape);
  cta.merge_splits(
      threadIdx.x, blockDim.x, [&](int i) { return partials + i * split_partial_floats(p.a.shape); },
      [](const auto* from) { return __ldcg(from); });
}

std::int64_t work_items_of(const LayerShape& s, const QueryTile& tile) {
  return tile.rows() * s.groups * head_tiles(s);
}

std::int64_t max_spans(Branch branch, const LayerShape& s, const RowMap& map, std::int64_t positions) {
  if (branch == sel) return s.rules.n_sel;
  if (branch == win) return s.rules.w / window_span + 2;
  const std::int64_t tokens = compressed_tokens(s.rules, positions - 1);
  return std::max<std::int64_t>(1, map.rank != all_ranks && map.kv > 1 ? owned_chunks(map, tokens + map.halo, map.rank)
                                                                       : (tokens + s.lse.segment - 1) / s.lse.segment);
}

// Enough CTAs to give every SM two, at most one a span, at most a cluster.
void choose_splits(RowsParams& p, std::int64_t work_items, std::int64_t spans) {
  const std::int64_t wanted =
      work_items > max_split_rows ? 1 : std::max<std::int64_t>(1, 2 * limits().sms / work_items);
  p.splits = static_cast<int>(std::min({wanted, spans, std::int64_t{rows_max_cluster}}));
  if (p.splits > 8) p.splits = work_items * 16 <= limits().sms ? 16 : 8;
  // Clusters merge faster but leave SMs idle where many of them compete for SMs. A single CTA counts as a cluster.
  p.cluster = p.splits == 1 || (limits().capability >= 90 && work_items * p.splits <= limits().sms);
}

template <class T, int DK, int DV, Branch B>
void launch(const RowsParams& p, Stream* stream) {
  const dim3 grid(static_cast<unsigned>(p.a.tile.rows() * p.a.shape.groups * p.splits), head_tiles(p.a.shape));
  const bool has_producer = limits().capability >= 90;
  launch_pdl(rows_kernel<T, DK, DV, B>, grid, 32 * (rows_warps + has_producer), RowsLayout<DK, DV>::bytes, stream,
             p.cluster ? p.splits : 1, p);
}

template <class T, Branch B>
void launch_sized(const RowsParams& p, Stream* stream) {
  const int d_k = p.a.shape.d_k, d_v = p.a.shape.d_v;
  if (d_k == 64 && d_v == 64) return launch<T, 64, 64, B>(p, stream);
  if (d_k == 128 && d_v == 128) return launch<T, 128, 128, B>(p, stream);
  if (d_k == 192 && d_v == 128) return launch<T, 192, 128, B>(p, stream);
  throw InternalError("decode kernel for head sizes it was not built for");
}

template <Branch B>
void launch_typed(const RowsParams& p, Stream* stream) {
  if (p.a.shape.dtype == DType::bf16)
    launch_sized<__nv_bfloat16, B>(p, stream);
  else
    launch_sized<__half, B>(p, stream);
}

}  // namespace

void attend_rows(Branch branch, const AttendArgs& a, Stream* stream) {
  if (a.tile.rows() == 0) return;
  if (!reads_kv_map(branch, a.shape, a.k.map)) return attend_general(branch, a, stream);
  RowsParams p{a,       0,      max_spans(branch, a.shape, a.k.map, a.tile.max_positions),
               1,       false,  arrival_counters(branch),
               nullptr, nullptr};
  const std::int64_t work_items = work_items_of(a.shape, a.tile);
  choose_splits(p, work_items, p.max_spans);
  p.pitch = branch == cmp ? score_pitch(a.k.map, compressed_tokens(a.shape.rules, a.tile.max_positions - 1)) : 0;
  p.partials = static_cast<float*>(a.scratch);
  p.segment_lse =
      reinterpret_cast<float2*>(p.partials + (p.cluster ? 0 : work_items * p.splits * split_partial_floats(a.shape)));
  if (branch == cmp)
    launch_typed<cmp>(p, stream);
  else if (branch == sel)
    launch_typed<sel>(p, stream);
  else
    launch_typed<win>(p, stream);
}

}  // namespace nsa::gpu
