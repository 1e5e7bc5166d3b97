// Split-KV merge as a launch of its own.
//
// Bytes: the partials, work items * splits * 16 * (Dv + 2) * 4, at most 264 of 8 KB (Dv = 128) or one a work item; for
// long work items the (m, sum) of the tiles, 128 bytes for every 32 compressed tokens, once. Both from L2. Bound: a few
// L2 latencies. Tiling: LSE buckets: a warp a (work item, bucket, four heads), eight segments in parallel; partials: a
// CTA a (work item, head), splits dealt to its warps, a lane four columns, warps merged in shared memory.
//
// A bucket is merged in the same order and with the same roundings as by the last CTA of a work item
// (decode/split_kv/kernel.cuh), so both ways give the same bits.

#include "kernels/cuda/attention/kv_tiles.cuh"
#include "kernels/cuda/attention/online_softmax.cuh"
#include "kernels/cuda/decode/split_kv/merge_splits.cuh"

namespace nsa::gpu {

namespace {

constexpr int threads = 128, warps = threads / 32;
// Up to so many tiles the only CTA of a work item merges the LSE buckets: their (m, sum) fit its shared memory.
constexpr std::int64_t max_tiles_in_cta = 512;

// A head of a work item.
struct WorkItemHead {
  int work_item, head;  // head: in the head tile
  int row_group;
  std::int64_t row_head;  // row * H + head
  bool valid;
};
__device__ __forceinline__ WorkItemHead locate_head(const DecodeParams& p, int heads, int work_item, int head) {
  const LayerShape& s = p.shape;
  const int row_group = work_item / p.head_tiles, in_group = work_item % p.head_tiles * heads + head;
  const std::int64_t row = row_group / s.groups, group = row_group % s.groups;
  return {work_item, head, row_group, row * s.heads() + group * s.heads_per_group + in_group,
          in_group < s.heads_per_group};
}

// The partials of a work item.
struct WorkItemPartials {
  const float* first;
  int count;
  __device__ __forceinline__ WorkItemPartials(const DecodeParams& p, const DecodeJob& job, int heads, int work_item) {
    const PartialRange range = partials_of(job, p.shape, static_cast<int>(p.tile.rows()), p.head_tiles, work_item);
    first = job.partials + std::int64_t{range.first} * decode_partial_floats(heads, p.shape.d_v);
    count = range.count;
  }
};
__device__ __forceinline__ float2 partial_lse(const float* partial, int heads, int d_v, int head) {
  return __ldcg(reinterpret_cast<const float2*>(partial + heads * d_v) + head);
}
__device__ __forceinline__ float4 partial_o(const float* partial, int d_v, int head, int column_quad) {
  return __ldcg(reinterpret_cast<const float4*>(partial + head * d_v) + column_quad);
}

// (m, sum) and o of a head.
struct MergedHead {
  SoftmaxState<Exp2> state;
  float4 o = {};
  __device__ __forceinline__ void merge(float2 ms, float4 x) { merge_partial(state, o, ms, x); }
};

// Merges the LSE bucket and four heads of the item-th (work item, bucket, four heads): segments by rising segment, a
// segment by rising tile. Each of eight groups of lanes merges one segment; their sums enter the bucket one after the
// other. Absent tiles are the neutral element.
__device__ void merge_bucket_quad(const MergeParams& m, const DecodeJob& job, int heads, int item) {
  const DecodeParams& p = m.launch;
  const LayerShape& s = p.shape;
  const int buckets = s.lse.buckets / shards_of(job.k.map), head_quads = heads / 4, lane = threadIdx.x % 32,
            segment_lane = lane / 4;
  const int bucket_index = item / head_quads % buckets;
  const WorkItemHead at = locate_head(p, heads, item / head_quads / buckets, item % head_quads * 4 + lane % 4);
  if (at.row_group >= p.tile.rows() * s.groups) return;
  const KvTiles<cmp> tiles(s, job.k.map, position_of_row(p.tile, at.row_group / s.groups));
  const int per_segment = tiles.per_span, segments = tiles.count / per_segment;
  const float2* sums = p.tile_lse + at.work_item * p.max_tiles * heads + at.head;
  constexpr int rounds = 4;  // loads in flight
  SoftmaxState<Exp2> bucket;
#pragma unroll 1
  for (int first = bucket_index; first < segments; first += rounds * 8 * buckets) {
    SoftmaxState<Exp2> segment[rounds];
#pragma unroll 1
    for (int tile = 0; tile < per_segment; tile += 2) {
      float2 x[rounds][2];
#pragma unroll
      for (int i = 0; i < rounds; ++i) {
        const int from = first + (i * 8 + segment_lane) * buckets;
#pragma unroll
        for (int k = 0; k < 2; ++k)
          x[i][k] = from < segments && tile + k < per_segment ? __ldcg(sums + (from * per_segment + tile + k) * heads)
                                                              : make_float2(neg_inf, 0.0f);
      }
#pragma unroll
      for (int i = 0; i < rounds; ++i)
#pragma unroll
        for (int k = 0; k < 2; ++k) segment[i] = merge_exact(segment[i], {x[i][k].x, x[i][k].y});
    }
#pragma unroll
    for (int i = 0; i < rounds; ++i) {
      if (first + i * 8 * buckets >= segments) break;
#pragma unroll
      for (int j = 0; j < 8; ++j)
        bucket = merge_exact(bucket, {__shfl_sync(0xffffffffu, segment[i].m, j * 4 + lane % 4),
                                      __shfl_sync(0xffffffffu, segment[i].s, j * 4 + lane % 4)});
    }
  }
  if (segment_lane == 0 && at.valid)
    reinterpret_cast<float2*>(p.lse)[bucket_index * (p.tile.rows() * s.heads()) + at.row_head] = to_natural_log(bucket);
}

// Merges the (m, sum) of the partials of the item-th (work item, head) of the job.
__device__ void merge_lse(const MergeParams& m, const DecodeJob& job, int heads, int item) {
  const DecodeParams& p = m.launch;
  const WorkItemHead at = locate_head(p, heads, item / heads, item % heads);
  if (at.row_group >= p.tile.rows() * p.shape.groups || !at.valid) return;
  const WorkItemPartials partials(p, job, heads, at.work_item);
  SoftmaxState<Exp2> sum;
#pragma unroll 8
  for (int i = 0; i < partials.count; ++i) {
    const float2 ms =
        partial_lse(partials.first + i * decode_partial_floats(heads, p.shape.d_v), heads, p.shape.d_v, at.head);
    sum = merge_exact(sum, {ms.x, ms.y});
  }
  reinterpret_cast<float2*>(m.win_lse)[at.row_head] = to_natural_log(sum);
}

// Partials of one head by warp; a lane has four of up to 128 columns.
struct WarpPartials {
  float4 o[warps][32];
  float2 sums[warps];
};

// Calls merge((m, sum), columns of this lane) for every split of this warp. The columns of a CTA are four a lane from
// column 4 * quad0 on.
template <class Merge>
__device__ __forceinline__ void for_each_split(const DecodeParams& p, const DecodeJob& job, int heads,
                                               const WorkItemHead& at, int quad0, Merge merge) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, d_v = p.shape.d_v,
            column_quad = min(quad0 + lane, d_v / 4 - 1);
  const WorkItemPartials partials(p, job, heads, at.work_item);
  for (int i0 = warp; i0 < partials.count; i0 += 4 * warps) {
    float2 ms[4];
    float4 x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i0 + i * warps >= partials.count) break;
      const float* partial = partials.first + (i0 + i * warps) * decode_partial_floats(heads, d_v);
      ms[i] = partial_lse(partial, heads, d_v, at.head);
      x[i] = partial_o(partial, d_v, at.head, column_quad);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i0 + i * warps < partials.count) merge(ms[i], x[i]);
  }
}

// Merges the partials of the item-th (work item, head) of the job. All threads of the CTA.
__device__ void merge_head(const MergeParams& m, const DecodeJob& job, const Partials& out, int heads, int item) {
  __shared__ WarpPartials warp_partials;
  const DecodeParams& p = m.launch;
  const WorkItemHead at = locate_head(p, heads, item / heads, item % heads);
  if (!at.valid) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quads = p.shape.d_v / 4;
#pragma unroll 1
  for (int quad0 = 0; quad0 < quads; quad0 += 32) {
    MergedHead partial;
    for_each_split(p, job, heads, at, quad0, [&](float2 ms, float4 x) { partial.merge(ms, x); });
    if (quad0 > 0) __syncthreads();  // the columns before are merged
    warp_partials.o[warp][lane] = partial.o;
    if (lane == 0) warp_partials.sums[warp] = make_float2(partial.state.m, partial.state.s);
    __syncthreads();
    if (warp != 0) continue;
    MergedHead all;
#pragma unroll
    for (int w = 0; w < warps; ++w) all.merge(warp_partials.sums[w], warp_partials.o[w][lane]);
    if (quad0 + lane < quads) reinterpret_cast<float4*>(out.o + at.row_head * p.shape.d_v)[quad0 + lane] = all.o;
    if (quad0 == 0 && lane == 0) reinterpret_cast<float2*>(out.ms)[at.row_head] = to_natural_log(all.state);
  }
}

// CTA counts by role, in this order: LSE buckets, (m, sum) of the window, the heads of the work items of each job.
struct CtaCounts {
  int buckets, sums, heads[2];
};

__global__ void __launch_bounds__(threads)
    merge_splits_kernel(const __grid_constant__ MergeParams m, const __grid_constant__ CtaCounts ctas, int heads) {
  griddep_wait();
  int at = static_cast<int>(blockIdx.x);
  if (at < ctas.buckets) {
    for (int i = 0; i < m.launch.job_count; ++i)
      if (m.launch.jobs[i].branch == cmp) merge_bucket_quad(m, m.launch.jobs[i], heads, at * warps + threadIdx.x / 32);
    return;
  }
  at -= ctas.buckets;
  if (at < ctas.sums) {
    for (int i = 0; i < m.launch.job_count; ++i)
      if (m.launch.jobs[i].branch == win) merge_lse(m, m.launch.jobs[i], heads, at * threads + threadIdx.x);
    return;
  }
  at -= ctas.sums;
  const int job = at < ctas.heads[0] ? 0 : 1;
  merge_head(m, m.launch.jobs[job], m.out[job], heads, job == 0 ? at : at - ctas.heads[0]);
}

struct NormaliseParams {
  DecodeParams launch;
  const float* lse_all;
  const float* gate;
  float* to;
  int ranks;
  bool leave_out[branches];
};

// (m * log2(e), gate / sum) of a head over all ranks, by a warp; the second is 0 where nothing was attended.
__device__ float2 normaliser_of(const NormaliseParams& p, Branch branch, const WorkItemHead& at) {
  const LayerShape& s = p.launch.shape;
  const int slots = lse_slots(s, p.ranks), count = branch == cmp ? s.lse.buckets : p.ranks;
  const std::int64_t row_heads = p.launch.tile.rows() * s.heads();
  const float2* lse = reinterpret_cast<const float2*>(p.lse_all) + at.row_head;
  SoftmaxState<Natural> total;
  for (int x = threadIdx.x % 32; x < count; x += 32) {
    const int slot = branch == cmp ? x % p.ranks * slots + x / p.ranks : x * slots + slots - 1;
    const float2 ms = lse[slot * row_heads];
    total = merge(total, {ms.x, ms.y});
  }
  const float m = warp_max(total.m), sum = warp_sum(total.s * exp_shifted(total.m, m));
  return make_float2(m * log2_e, sum > 0.0f ? p.gate[at.row_group * branches + branch] / sum : 0.0f);
}

// A CTA a (work item, head): the sum of its cmp and win partials, each times 2^(m - M) gate / Z.
__global__ void __launch_bounds__(threads) normalise_kernel(const __grid_constant__ NormaliseParams p, int heads) {
  __shared__ WarpPartials warp_partials;
  __shared__ float2 normalisers[branches];
  griddep_wait();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const WorkItemHead at = locate_head(p.launch, heads, blockIdx.x / heads, blockIdx.x % heads);
  if (!at.valid) return;
  if (warp != sel && warp < branches) {
    const float2 normaliser = p.leave_out[warp] ? float2{} : normaliser_of(p, static_cast<Branch>(warp), at);
    if (lane == 0) normalisers[warp] = normaliser;
  }
  __syncthreads();
  const int quads = p.launch.shape.d_v / 4;
#pragma unroll 1
  for (int quad0 = 0; quad0 < quads; quad0 += 32) {
    float4 value = {};
    for (int i = 0; i < p.launch.job_count; ++i) {
      const DecodeJob& job = p.launch.jobs[i];
      if (p.leave_out[job.branch] || normalisers[job.branch].y == 0.0f) continue;
      const float2 normaliser = normalisers[job.branch];
      for_each_split(p.launch, job, heads, at, quad0,
                     [&](float2 ms, float4 x) { add_scaled(value, exp2_fast(ms.x - normaliser.x) * normaliser.y, x); });
    }
    if (quad0 > 0) __syncthreads();  // the columns before are merged
    warp_partials.o[warp][lane] = value;
    __syncthreads();
    if (warp != 0 || quad0 + lane >= quads) continue;
    for (int w = 1; w < warps; ++w) add_scaled(value, 1.0f, warp_partials.o[w][lane]);
    reinterpret_cast<float4*>(p.to + at.row_head * p.launch.shape.d_v)[quad0 + lane] = value;
  }
}

int ctas_for(std::int64_t items) { return static_cast<int>((items + threads - 1) / threads); }

}  // namespace

bool merges_separately(Branch branch, int splits, std::int64_t tiles) {
  return splits > 1 || (branch == cmp && tiles > max_tiles_in_cta);
}

void launch_merge_splits(const MergeParams& m, Stream* stream) {
  const LayerShape& s = m.launch.shape;
  const int heads = decode_heads(s.dtype);
  const std::int64_t work_items = m.launch.tile.rows() * s.groups * m.launch.head_tiles;
  CtaCounts ctas{};
  for (int i = 0; i < m.launch.job_count; ++i) {
    const DecodeJob& job = m.launch.jobs[i];
    if (job.branch == cmp && m.buckets)
      ctas.buckets =
          ctas_for(work_items * heads * 8 * (s.lse.buckets / (job.k.map.rank == all_ranks ? 1 : job.k.map.kv)));
    if (job.branch == win && m.win_lse) ctas.sums = ctas_for(work_items * heads);
    if (m.out[i].o) ctas.heads[i] = static_cast<int>(work_items * heads);
  }
  const int all = ctas.buckets + ctas.sums + ctas.heads[0] + ctas.heads[1];
  if (all > 0) launch_pdl(merge_splits_kernel, dim3(static_cast<unsigned>(all)), threads, 0, stream, 1, m, ctas, heads);
}

void launch_normalise_partials(const DecodeParams& launch, const ShardedAttentionArgs& a, Stream* stream) {
  const int heads = decode_heads(launch.shape.dtype);
  NormaliseParams p{launch, a.lse_all, a.combine.gate, a.gated, a.combine.ranks, {}};
  std::copy_n(a.combine.leave_out, branches, p.leave_out);
  const std::int64_t work_items = launch.tile.rows() * launch.shape.groups * launch.head_tiles;
  launch_pdl(normalise_kernel, dim3(static_cast<unsigned>(work_items * heads)), threads, 0, stream, 1, p, heads);
}

}  // namespace nsa::gpu
