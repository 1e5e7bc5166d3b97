// The parts of decode lists meet in a launch of their own.
//
// Bytes: the parts, lists * splits * 16 * (Dv + 2) * 4, at most 264 parts of 8 KB (Dv = 128) or one a list; of long
// lists the tiles' (m, sum), 128 bytes for every 32 compressed tokens, once. Both from L2. Bound: a few L2 latencies.
// Tiling: lanes: a warp a (list, lane, four heads), eight leaves side by side; parts: a CTA a (list, head), splits
// dealt to its warps, a lane four columns, warps met in shared memory.
//
// A lane is formed in the same order and with the same roundings as by a list's last CTA (decode/split_kv/kernel.cuh),
// so that it does not matter which of the two a layout takes.

#include "kernels/cuda/attention/kv_tiles.cuh"
#include "kernels/cuda/decode/split_kv/merge_splits.cuh"

namespace nsa::gpu {

namespace {

constexpr int threads = 128, warps = threads / 32;
constexpr std::int64_t most_tiles = 512;  // whose lanes a list's only CTA forms: (m, sum) fit its shared memory

// A head of a list, lists rising, heads of a tile side by side.
struct ListHead {
  int list, head;  // head: of the tile
  int row_group;
  std::int64_t row_head;  // row * H + head
  bool present;
};
__device__ __forceinline__ ListHead head_of(const DecodeParams& p, int heads, int list, int head) {
  const LayerShape& s = p.shape;
  const int row_group = list / p.head_tiles, in_group = list % p.head_tiles * heads + head;
  const std::int64_t row = row_group / s.groups, group = row_group % s.groups;
  return {list, head, row_group, row * s.heads() + group * s.heads_per_group + in_group, in_group < s.heads_per_group};
}

__device__ __forceinline__ const float* parts_of(const DecodeParams& p, const DecodeJob& job, int heads, int list) {
  return job.parts + std::int64_t{list} * job.splits * decode_part_floats(heads, p.shape.d_v);
}
__device__ __forceinline__ float2 part_sum(const float* part, int heads, int d_v, int head) {
  return __ldcg(reinterpret_cast<const float2*>(part + heads * d_v) + head);
}
__device__ __forceinline__ float4 part_values(const float* part, int d_v, int head, int quad) {
  return __ldcg(reinterpret_cast<const float4*>(part + head * d_v) + quad);
}

__device__ __forceinline__ void add(float4& to, float by, float4 x) {
  to.x += by * x.x, to.y += by * x.y, to.z += by * x.z, to.w += by * x.w;
}
__device__ __forceinline__ void scale(float4& x, float by) { x.x *= by, x.y *= by, x.z *= by, x.w *= by; }

// (m, sum) and weighted sum that grow together.
struct Part {
  Sum2 sum;
  float4 value = {};
  __device__ __forceinline__ void take(float2 ms, float4 x) {
    const float m = fmaxf(sum.m, ms.x), old = exp2_fast(sum.m - m), fresh = exp2_fast(ms.x - m);
    sum = {m, sum.s * old + ms.y * fresh};
    scale(value, old);
    add(value, fresh, x);
  }
};

// The item-th (list, lane, quad of heads): its leaves by rising leaf, a leaf's tiles by rising tile. A warp: of eight
// leaves one each, whose sums then go into the lane one after the other. What is not there changes no sum.
__device__ void merge_lane(const DecodeMeeting& m, const DecodeJob& job, int heads, int item) {
  const DecodeParams& p = m.walk;
  const LayerShape& s = p.shape;
  const int slots = s.lse.buckets / shards_of(job.k.map), quads = heads / 4, thread = threadIdx.x % 32,
            mine = thread / 4;
  const int slot = item / quads % slots;
  const ListHead at = head_of(p, heads, item / quads / slots, item % quads * 4 + thread % 4);
  if (at.row_group >= p.tile.rows() * s.groups) return;
  const Tiles<cmp> tiles(s, job.k.map, *p.tile.first_position);
  const int per_leaf = tiles.per_unit, leaves = tiles.count / per_leaf;
  const float2* sums = p.leaves + at.list * p.most_tiles * heads + at.head;
  constexpr int rounds = 4;  // under way
  Sum2 lane;
#pragma unroll 1
  for (int first = slot; first < leaves; first += rounds * 8 * slots) {
    Sum2 leaf[rounds];
#pragma unroll 1
    for (int tile = 0; tile < per_leaf; tile += 2) {
      float2 x[rounds][2];
#pragma unroll
      for (int i = 0; i < rounds; ++i) {
        const int from = first + (i * 8 + mine) * slots;
#pragma unroll
        for (int k = 0; k < 2; ++k)
          x[i][k] = from < leaves && tile + k < per_leaf ? __ldcg(sums + (from * per_leaf + tile + k) * heads)
                                                         : make_float2(neg_inf, 0.0f);
      }
#pragma unroll
      for (int i = 0; i < rounds; ++i)
#pragma unroll
        for (int k = 0; k < 2; ++k) leaf[i] = merge2(leaf[i], {x[i][k].x, x[i][k].y});
    }
#pragma unroll
    for (int i = 0; i < rounds; ++i) {
      if (first + i * 8 * slots >= leaves) break;
#pragma unroll
      for (int j = 0; j < 8; ++j)
        lane = merge2(lane, {__shfl_sync(0xffffffffu, leaf[i].m, j * 4 + thread % 4),
                             __shfl_sync(0xffffffffu, leaf[i].s, j * 4 + thread % 4)});
    }
  }
  if (mine == 0 && at.present)
    reinterpret_cast<float2*>(p.lse)[slot * (p.tile.rows() * s.heads()) + at.row_head] = to_natural_log(lane);
}

// The item-th (list, head) of the job: (m, sum) of its parts.
__device__ void merge_sum(const DecodeMeeting& m, const DecodeJob& job, int heads, int item) {
  const DecodeParams& p = m.walk;
  const ListHead at = head_of(p, heads, item / heads, item % heads);
  if (at.row_group >= p.tile.rows() * p.shape.groups || !at.present) return;
  const float* part = parts_of(p, job, heads, at.list);
  Sum2 sum;
#pragma unroll 8
  for (int i = 0; i < job.splits; ++i) {
    const float2 ms = part_sum(part + i * decode_part_floats(heads, p.shape.d_v), heads, p.shape.d_v, at.head);
    sum = merge2(sum, {ms.x, ms.y});
  }
  reinterpret_cast<float2*>(m.sums)[at.row_head] = to_natural_log(sum);
}

// What the CTA's warps have gathered of one head, quads of columns by lane (Dv is at most 128).
struct Gathered {
  float4 values[warps][32];
  float2 sums[warps];
};

// Calls take(split's (m, sum), this lane's columns) for the splits that are this warp's.
template <class Take>
__device__ __forceinline__ void each_split(const DecodeParams& p, const DecodeJob& job, int heads, const ListHead& at,
                                           Take take) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, d_v = p.shape.d_v, quad = min(lane, d_v / 4 - 1);
  const float* first = parts_of(p, job, heads, at.list);
  for (int i0 = warp; i0 < job.splits; i0 += 4 * warps) {
    float2 ms[4];
    float4 x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i0 + i * warps >= job.splits) break;
      const float* part = first + (i0 + i * warps) * decode_part_floats(heads, d_v);
      ms[i] = part_sum(part, heads, d_v, at.head);
      x[i] = part_values(part, d_v, at.head, quad);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i0 + i * warps < job.splits) take(ms[i], x[i]);
  }
}

// The item-th (list, head) of the job: all of its parts. A whole CTA.
__device__ void merge_head(const DecodeMeeting& m, const DecodeJob& job, const Partials& out, int heads, int item) {
  __shared__ Gathered gathered;
  const DecodeParams& p = m.walk;
  const ListHead at = head_of(p, heads, item / heads, item % heads);
  if (!at.present) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Part part;
  each_split(p, job, heads, at, [&](float2 ms, float4 x) { part.take(ms, x); });
  gathered.values[warp][lane] = part.value;
  if (lane == 0) gathered.sums[warp] = make_float2(part.sum.m, part.sum.s);
  __syncthreads();
  if (warp != 0) return;
  Part all;
#pragma unroll
  for (int w = 0; w < warps; ++w) all.take(gathered.sums[w], gathered.values[w][lane]);
  if (lane < p.shape.d_v / 4) reinterpret_cast<float4*>(out.o + at.row_head * p.shape.d_v)[lane] = all.value;
  if (lane == 0) reinterpret_cast<float2*>(out.ms)[at.row_head] = to_natural_log(all.sum);
}

// CTAs by what they do: lanes, the window's sums, then job by job the heads of its lists.
struct Ctas {
  int lanes, sums, heads[2];
};

__global__ void __launch_bounds__(threads)
    meet_kernel(const __grid_constant__ DecodeMeeting m, const __grid_constant__ Ctas ctas, int heads) {
  griddep_wait();
  int at = static_cast<int>(blockIdx.x);
  if (at < ctas.lanes) {
    for (int i = 0; i < m.walk.job_count; ++i)
      if (m.walk.jobs[i].branch == cmp) merge_lane(m, m.walk.jobs[i], heads, at * warps + threadIdx.x / 32);
    return;
  }
  at -= ctas.lanes;
  if (at < ctas.sums) {
    for (int i = 0; i < m.walk.job_count; ++i)
      if (m.walk.jobs[i].branch == win) merge_sum(m, m.walk.jobs[i], heads, at * threads + threadIdx.x);
    return;
  }
  at -= ctas.sums;
  const int job = at < ctas.heads[0] ? 0 : 1;
  merge_head(m, m.walk.jobs[job], m.out[job], heads, job == 0 ? at : at - ctas.heads[0]);
}

struct Weighing {
  DecodeParams walk;
  const float* lse_all;
  const float* gate;
  float* to;
  int ranks;
  bool leave_out[branches];
};

// (m in powers of two, gate / sum) of a head over all ranks; a warp. 0: nothing to add.
__device__ float2 share_of(const Weighing& p, Branch branch, const ListHead& at) {
  const LayerShape& s = p.walk.shape;
  const int slots = lse_slots(s, p.ranks), count = branch == cmp ? s.lse.buckets : p.ranks;
  const std::int64_t row_heads = p.walk.tile.rows() * s.heads();
  const float2* lse = reinterpret_cast<const float2*>(p.lse_all) + at.row_head;
  SoftmaxState total;
  for (int x = threadIdx.x % 32; x < count; x += 32) {
    const int slot = branch == cmp ? x % p.ranks * slots + x / p.ranks : x * slots + slots - 1;
    const float2 ms = lse[slot * row_heads];
    total = merge(total, {ms.x, ms.y});
  }
  const float m = warp_max(total.m), sum = warp_sum(total.s * exp_shifted(total.m, m));
  return make_float2(m * log2_e, sum > 0.0f ? p.gate[at.row_group * branches + branch] / sum : 0.0f);
}

// A CTA a (list, head): what cmp and win give to it.
__global__ void __launch_bounds__(threads) weigh_kernel(const __grid_constant__ Weighing p, int heads) {
  __shared__ Gathered gathered;
  __shared__ float2 shares[branches];
  griddep_wait();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const ListHead at = head_of(p.walk, heads, blockIdx.x / heads, blockIdx.x % heads);
  if (!at.present) return;
  if (warp != sel && warp < branches) {
    const float2 share = p.leave_out[warp] ? float2{} : share_of(p, static_cast<Branch>(warp), at);
    if (lane == 0) shares[warp] = share;
  }
  __syncthreads();
  float4 value = {};
  for (int i = 0; i < p.walk.job_count; ++i) {
    const DecodeJob& job = p.walk.jobs[i];
    if (p.leave_out[job.branch] || shares[job.branch].y == 0.0f) continue;
    const float2 share = shares[job.branch];
    each_split(p.walk, job, heads, at,
               [&](float2 ms, float4 x) { add(value, exp2_fast(ms.x - share.x) * share.y, x); });
  }
  gathered.values[warp][lane] = value;
  __syncthreads();
  if (warp != 0 || lane >= p.walk.shape.d_v / 4) return;
  for (int w = 1; w < warps; ++w) add(value, 1.0f, gathered.values[w][lane]);
  reinterpret_cast<float4*>(p.to + at.row_head * p.walk.shape.d_v)[lane] = value;
}

int ctas_for(std::int64_t items) { return static_cast<int>((items + threads - 1) / threads); }

}  // namespace

bool meets_apart(Branch branch, int splits, std::int64_t tiles) {
  return splits > 1 || (branch == cmp && tiles > most_tiles);
}

void launch_meeting(const DecodeMeeting& m, Stream* stream) {
  const LayerShape& s = m.walk.shape;
  const int heads = decode_heads(s.dtype);
  const std::int64_t lists = m.walk.tile.rows() * s.groups * m.walk.head_tiles;
  Ctas ctas{};
  for (int i = 0; i < m.walk.job_count; ++i) {
    const DecodeJob& job = m.walk.jobs[i];
    if (job.branch == cmp && m.lanes)
      ctas.lanes = ctas_for(lists * heads * 8 * (s.lse.buckets / (job.k.map.rank == all_ranks ? 1 : job.k.map.kv)));
    if (job.branch == win && m.sums) ctas.sums = ctas_for(lists * heads);
    if (m.out[i].o) ctas.heads[i] = static_cast<int>(lists * heads);
  }
  const int all = ctas.lanes + ctas.sums + ctas.heads[0] + ctas.heads[1];
  if (all > 0) launch_pdl(meet_kernel, dim3(static_cast<unsigned>(all)), threads, 0, stream, 1, m, ctas, heads);
}

void launch_weighing(const DecodeParams& walk, const ShardedAttentionArgs& a, Stream* stream) {
  const int heads = decode_heads(walk.shape.dtype);
  Weighing p{walk, a.lse_all, a.combine.gate, a.gated, a.combine.ranks, {}};
  std::copy_n(a.combine.leave_out, branches, p.leave_out);
  const std::int64_t lists = walk.tile.rows() * walk.shape.groups * walk.head_tiles;
  launch_pdl(weigh_kernel, dim3(static_cast<unsigned>(lists * heads)), threads, 0, stream, 1, p, heads);
}

}  // namespace nsa::gpu
