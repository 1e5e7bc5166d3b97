// Attention of one branch for one query row a sequence, 16-bit storage: the decode step's kernels.
//
// Bytes: every K and V row the branch reads, once per 16 query heads; scores, partials and LSE are 4% beside them at
// Dk = Dv = 128. Bound: memory bandwidth; at small batch the latency of load, merge and launch.
// Tiling: the (up to 16) heads of a group are the M of m16n8k16. A CTA of 4 warps takes a share of the row's units (LSE
// leaves, chosen blocks, runs of 64 window positions); of every 64 tokens warp w takes 16. Operands go from global
// memory straight to registers (mma.cuh); the next step's keys are under way while this one's values are multiplied.
// The warps meet in shared memory, the CTAs of a row in scratch (attend.cuh).
//
// Leaves: (m, sum) of 16 tokens by one warp, of a leaf's steps by rising step, of the 4 warps by rising warp. None of it
// depends on the split or on the layout, so every kv layout gets the same bits.

#include "kernels/cuda/attend.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/stages.cuh"

namespace nsa::gpu {

namespace {

constexpr int warps = 4;
constexpr int threads = 32 * warps;
constexpr int step_tokens = 16;
constexpr int pass_tokens = warps * step_tokens;
constexpr int most_splits = 64;
constexpr int most_leaves = 64;  // of a CTA

struct Params {
  AttendArgs a;
  std::int64_t pitch;        // of the raw scores
  std::int64_t most_units;   // of a list, on this rank
  int splits;
  unsigned* arrivals;
  float* parts;              // [list][split][16 * Dv + 32]
  float2* leaves;            // cmp: [list][unit][16]
};

// A unit's tokens: `count` rows one after the other, or positions in a ring.
struct Unit {
  std::int64_t row;     // of the first token
  std::int64_t column;  // cmp: of its raw score
  int count;
};

template <class T, int DK, int DV, Branch B>
struct Cta {
  const Params& p;
  const LayerShape& s;
  const T *k, *v;  // of the plane
  std::int64_t t, row, group, n, units;
  int first_head, heads, split;

  __device__ int lane() const { return threadIdx.x % 32; }
  __device__ int warp() const { return threadIdx.x / 32; }
  __device__ int g() const { return lane() / 4; }
  __device__ int quad() const { return lane() % 4; }

  __device__ Unit unit(std::int64_t u) const;
  __device__ std::int64_t row_of_token(const Unit& unit, int token) const;
  __device__ Keys<DK> load_keys(const Unit& unit, int at) const;
  __device__ Values<DV> load_values(const Unit& unit, int at) const;
  __device__ void keep_scores(const Unit& unit, int at, const float (&c)[2][4]) const;
};

// The leaf c that is this rank's u-th.
__device__ __forceinline__ std::int64_t leaf_at(const RowMap& map, std::int64_t u) {
  return map.kv > 1 ? u * map.kv + map.rank : u;
}

template <class T, int DK, int DV, Branch B>
__device__ Unit Cta<T, DK, DV, B>::unit(std::int64_t u) const {
  const RowMap& map = p.a.k.map;
  if constexpr (B == cmp) {
    const std::int64_t c = leaf_at(map, u), begin = c * s.leaf, left = n - begin;
    const std::int64_t at = map.kv > 1 ? row_in_chunk(map, c, begin) : begin;
    return {at, at, static_cast<int>(left < 0 ? 0 : left < s.leaf ? left : s.leaf)};
  }
  if constexpr (B == sel) {
    const std::int64_t j = p.a.selected[(row * s.groups + group) * s.rules.n_sel + u], begin = j * s.rules.l_sel;
    const std::int64_t c = map.kv > 1 ? chunk_of(map, begin) : 0, left = t + 1 - begin;
    if (j < 0 || (map.kv > 1 && !has_chunk(map, c))) return {0, 0, 0};
    const std::int64_t at = map.kv > 1 ? row_in_chunk(map, c, begin) : begin;
    return {at, 0, static_cast<int>(left < s.rules.l_sel ? left : s.rules.l_sel)};
  }
  const std::int64_t begin = window_begin(s.rules, t) + u * window_unit, left = t + 1 - begin;
  return {map.ring > 0 ? begin % map.ring : begin, 0, static_cast<int>(left < window_unit ? left : window_unit)};
}

// Memory row of a unit's token; -1 where another rank reads it.
template <class T, int DK, int DV, Branch B>
__device__ __forceinline__ std::int64_t Cta<T, DK, DV, B>::row_of_token(const Unit& unit, int token) const {
  if (token >= unit.count) return -1;
  std::int64_t at = unit.row + token;
  if constexpr (B == win) {
    const RowMap& map = p.a.k.map;
    if (map.ring > 0) {
      if (at >= map.ring) at -= map.ring;
      if (at < map.slot_begin || at >= map.slot_end) return -1;
    }
  }
  return at;
}

template <class T, int DK, int DV, Branch B>
__device__ __forceinline__ Keys<DK> Cta<T, DK, DV, B>::load_keys(const Unit& unit, int at) const {
  Keys<DK> keys;
  const std::int64_t first = row_of_token(unit, at + g()), second = row_of_token(unit, at + g() + 8);
#pragma unroll
  for (int j = 0; j < DK / 32; ++j) {
    keys.first[j] = first >= 0 ? load_once(k + first * DK + j * 32 + quad() * 8) : uint4{};
    keys.second[j] = second >= 0 ? load_once(k + second * DK + j * 32 + quad() * 8) : uint4{};
  }
  return keys;
}

template <class T, int DK, int DV, Branch B>
__device__ __forceinline__ Values<DV> Cta<T, DK, DV, B>::load_values(const Unit& unit, int at) const {
  Values<DV> values;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const std::int64_t from = row_of_token(unit, at + 2 * quad() + (r & 1) + (r & 2) * 4);
#pragma unroll
    for (int block = 0; block < DV / 64; ++block)
      values.row[block][r] = from >= 0 ? load_once(v + from * DV + block * 64 + g() * 8) : uint4{};
  }
  return values;
}

template <class T, int DK, int DV, Branch B>
__device__ __forceinline__ void Cta<T, DK, DV, B>::keep_scores(const Unit& unit, int at, const float (&c)[2][4]) const {
  float* scores = static_cast<float*>(p.a.scores) + (row * s.heads() + first_head) * p.pitch + unit.column;
#pragma unroll
  for (int part = 0; part < 2; ++part)  // tokens 0..7, 8..15
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // heads g, g + 8
      const int head = g() + half * 8, token = at + part * 8 + quad() * 2;
      float* to = scores + head * p.pitch + token;
      if (head >= heads) continue;
      if (token + 1 < unit.count && reinterpret_cast<std::uintptr_t>(to) % 8 == 0) {
        *reinterpret_cast<float2*>(to) = make_float2(c[part][half * 2], c[part][half * 2 + 1]);
      } else {
        if (token < unit.count) to[0] = c[part][half * 2];
        if (token + 1 < unit.count) to[1] = c[part][half * 2 + 1];
      }
    }
}

// Shared memory, one use after the other: (m, sum) of the warps by leaf; o of the warps; weights of the splits.
constexpr std::size_t shared_bytes(int d_v) {
  const std::size_t leaves = most_leaves * warps * heads_per_tile * sizeof(float2);
  const std::size_t outputs = warps * heads_per_tile * (d_v + 2) * sizeof(float);
  return leaves > outputs ? leaves : outputs;
}

// Merges the leaves of the whole row into lanes, by rising leaf, and the splits' partials, by rising split.
template <int DV, Branch B>
__device__ void merge_splits(const Params& p, std::int64_t list, std::int64_t row, int first_head, int heads,
                             std::int64_t units, float* weights) {
  const LayerShape& s = p.a.shape;
  const RowMap& map = p.a.k.map;
  constexpr int part = heads_per_tile * (DV + 2);
  const float* parts = p.parts + list * p.splits * part;
  if constexpr (B == cmp) {
    const std::int64_t rows = p.a.tile.rows();
    const int present = s.lanes / map.kv;  // this rank's u-th leaf is in its slot u % present
    for (int item = threadIdx.x; item < present * heads; item += threads) {
      const int slot = item / heads, head = item % heads;
      MaxSum lane;
      for (std::int64_t u = slot; u < units; u += present) {
        const float2 leaf = __ldcg(&p.leaves[(list * p.most_units + u) * heads_per_tile + head]);
        lane = merge(lane, {leaf.x, leaf.y});
      }
      *reinterpret_cast<float2*>(p.a.lse + ((slot * rows + row) * s.heads() + first_head + head) * 2) =
          make_float2(lane.m, lane.s);
    }
  }
  for (int head = threadIdx.x; head < heads; head += threads) {
    MaxSum total;
    for (int at = 0; at < p.splits; ++at) {
      const float* ms = parts + at * part + heads_per_tile * DV + head * 2;
      total = merge(total, {__ldcg(ms), __ldcg(ms + 1)});
    }
    for (int at = 0; at < p.splits; ++at)
      weights[at * heads_per_tile + head] = exp_above(__ldcg(parts + at * part + heads_per_tile * DV + head * 2), total.m);
    float* ms = p.a.out.ms + (row * s.heads() + first_head + head) * 2;
    ms[0] = total.m;
    ms[1] = total.s;
  }
  __syncthreads();
  for (int item = threadIdx.x; item < heads * DV / 4; item += threads) {
    const int head = item / (DV / 4);
    float4 sum = {};
#pragma unroll 4
    for (int at = 0; at < p.splits; ++at) {
      const float weight = weights[at * heads_per_tile + head];
      const float4 o = __ldcg(reinterpret_cast<const float4*>(parts + at * part) + item);
      sum.x += weight * o.x, sum.y += weight * o.y, sum.z += weight * o.z, sum.w += weight * o.w;
    }
    reinterpret_cast<float4*>(p.a.out.o + (row * s.heads() + first_head) * DV)[item] = sum;
  }
}

template <class T, int DK, int DV, Branch B>
__global__ void __launch_bounds__(threads, 3) decode_kernel(const __grid_constant__ Params p) {
  extern __shared__ float shared[];
  wait_for_previous();
  const LayerShape& s = p.a.shape;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, quad = lane % 4;
  const std::int64_t lists = blockIdx.x / p.splits, tiles = gridDim.y, list = lists * tiles + blockIdx.y;
  const std::int64_t row = lists / s.groups, group = lists % s.groups;
  const std::int64_t plane = (p.a.tile.batch_begin + row) * s.groups + group, t = *p.a.tile.first_position;
  const int first_head = static_cast<int>(group) * s.heads_per_group + blockIdx.y * heads_per_tile;
  const int heads = min(heads_per_tile, s.heads_per_group - static_cast<int>(blockIdx.y) * heads_per_tile);
  const RowMap& map = p.a.k.map;
  const std::int64_t n = compressed_tokens(s.rules, t);
  const int before = B == cmp && map.kv > 1 ? map.before : 0;
  std::int64_t units;
  if (B == cmp)
    units = map.kv > 1 ? owned_chunks(map, n + before, map.rank) : (n + s.leaf - 1) / s.leaf;
  else if (B == sel)
    units = s.rules.n_sel;
  else
    units = ((t + 1 < s.rules.w ? t + 1 : s.rules.w) + window_unit - 1) / window_unit;
  const Cta<T, DK, DV, B> cta{p, s, static_cast<const T*>(p.a.k.data) + plane * p.a.k.plane_stride,
                              static_cast<const T*>(p.a.v.data) + plane * p.a.v.plane_stride,
                              t, row, group, n, units, first_head, heads, static_cast<int>(blockIdx.x % p.splits)};
  Queries<DK> q;
  const T* queries = static_cast<const T*>(p.a.q) + (row * s.heads() + first_head) * DK + quad * 8;
#pragma unroll
  for (int j = 0; j < DK / 32; ++j) {
    q.low[j] = g < heads ? *reinterpret_cast<const uint4*>(queries + g * DK + j * 32) : uint4{};
    q.high[j] = g + 8 < heads ? *reinterpret_cast<const uint4*>(queries + (g + 8) * DK + j * 32) : uint4{};
  }
  const float scale = 1.0f / sqrtf(static_cast<float>(DK));
  const bool weigh = !(B == cmp && p.a.scores_only);
  float o[DV / 64][8][4] = {};
  MaxSum total[2], leaf[2];  // of rows g and g + 8
  float2* warp_leaves = reinterpret_cast<float2*>(shared);
  int count = 0;

  std::int64_t u = cta.split;
  int at = warp * step_tokens, index = 0;  // index: of the leaf among this CTA's
  Unit unit{};
  const auto settle = [&] {  // on to the warp's next step, which may be some units on
    while (u < units && at >= unit.count) {
      if constexpr (B == cmp) {
        if (quad == 0) {
          warp_leaves[(index * warps + warp) * heads_per_tile + g] = make_float2(leaf[0].m, leaf[0].s);
          warp_leaves[(index * warps + warp) * heads_per_tile + g + 8] = make_float2(leaf[1].m, leaf[1].s);
        }
        leaf[0] = leaf[1] = {};
      }
      u += p.splits;
      ++index;
      at = warp * step_tokens;
      if (u < units) unit = cta.unit(u);
    }
    return u < units;
  };
  if (u < units) unit = cta.unit(u);
  bool more = settle();
  Keys<DK> keys;
  if (more) keys = cta.load_keys(unit, at);
  while (more) {
    const Values<DV> values = weigh ? cta.load_values(unit, at) : Values<DV>{};
    float c[2][4];
    scores_of<T>(c, q, keys);
#pragma unroll
    for (int part = 0; part < 2; ++part)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[part][i] *= scale;
    if constexpr (B == cmp) cta.keep_scores(unit, at, c);
    bool held[2][2];
#pragma unroll
    for (int part = 0; part < 2; ++part)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        held[part][i] = cta.row_of_token(unit, at + part * 8 + quad * 2 + i) >= 0;
        if (!held[part][i]) c[part][i] = c[part][i + 2] = -INFINITY;
        count += held[part][i];
      }
    MaxSum step[2];
    float factor[2], old[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float &c0 = c[0][half * 2], &c1 = c[0][half * 2 + 1], &c2 = c[1][half * 2], &c3 = c[1][half * 2 + 1];
      step[half].m = quad_max(fmaxf(fmaxf(c0, c1), fmaxf(c2, c3)));
      c0 = exp_above(c0, step[half].m);
      c1 = exp_above(c1, step[half].m);
      c2 = exp_above(c2, step[half].m);
      c3 = exp_above(c3, step[half].m);
      step[half].s = quad_sum((c0 + c1) + (c2 + c3));
      if constexpr (B == cmp) leaf[half] = merge(leaf[half], step[half]);
      const float m = fmaxf(total[half].m, step[half].m);
      factor[half] = exp_above(step[half].m, m);
      old[half] = exp_above(total[half].m, m);
      total[half] = {m, total[half].s * old[half] + step[half].s * factor[half]};
      c0 *= factor[half], c1 *= factor[half], c2 *= factor[half], c3 *= factor[half];
    }
    at += pass_tokens;
    more = settle();
    if (more) keys = cta.load_keys(unit, at);
    if (!weigh) continue;
    if (__any_sync(0xffffffffu, old[0] != 1.0f || old[1] != 1.0f))
#pragma unroll
      for (int block = 0; block < DV / 64; ++block)
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          o[block][j][0] *= old[0], o[block][j][1] *= old[0];
          o[block][j][2] *= old[1], o[block][j][3] *= old[1];
        }
    add_values<T, DV>(o, c, values);
  }

  if constexpr (B == cmp) {
    // Copies in front of a chunk: scored for its first block, neither attended nor counted.
    if (before > 0)
      for (std::int64_t at_unit = cta.split + std::int64_t{warp} * p.splits; at_unit < units;
           at_unit += std::int64_t{warps} * p.splits) {
        const std::int64_t chunk = leaf_at(map, at_unit), begin = chunk * map.chunk - before, left = n - begin;
        if (chunk == 0) continue;
        const std::int64_t at_row = row_in_chunk(map, chunk, begin);
        const Unit halo{at_row, at_row, static_cast<int>(left < before ? left : before)};
        for (int token = 0; token < halo.count; token += step_tokens) {
          float c[2][4];
          scores_of<T>(c, q, cta.load_keys(halo, token));
          for (int part = 0; part < 2; ++part)
            for (int i = 0; i < 4; ++i) c[part][i] *= scale;
          cta.keep_scores(halo, token, c);
        }
      }
    __syncthreads();
    const int held_leaves = units > cta.split ? static_cast<int>((units - 1 - cta.split) / p.splits + 1) : 0;
    for (int item = threadIdx.x; item < held_leaves * heads_per_tile; item += threads) {
      const int of = item / heads_per_tile, head = item % heads_per_tile;
      MaxSum sum;
      for (int w = 0; w < warps; ++w) {
        const float2 other = warp_leaves[(of * warps + w) * heads_per_tile + head];
        sum = merge(sum, {other.x, other.y});
      }
      p.leaves[(list * p.most_units + cta.split + std::int64_t{of} * p.splits) * heads_per_tile + head] =
          make_float2(sum.m, sum.s);
    }
    __syncthreads();
  }
  // Heads of the padding would count the same tokens again: row g = 0's four lanes hold all 16 of a step.
  if (g == 0 && blockIdx.y == 0) {
    count += __shfl_xor_sync(0xfu, count, 1);
    count += __shfl_xor_sync(0xfu, count, 2);
    if (quad == 0 && count > 0)
      atomicAdd(reinterpret_cast<unsigned long long*>(p.a.reads) + row * s.groups + group,
                static_cast<unsigned long long>(count));
  }

  // The warps' o side by side, weighed with their maxima.
  float* warp_o = shared;                                            // [warps][16][Dv]
  float* warp_ms = shared + warps * heads_per_tile * DV;             // [warps][16][2]
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int head = g + half * 8;
    float* to = warp_o + (warp * heads_per_tile + head) * DV + quad * 16;
#pragma unroll
    for (int block = 0; block < DV / 64; ++block)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd)
#pragma unroll
        for (int j = 0; j < 8; j += 4)
          *reinterpret_cast<float4*>(to + block * 64 + odd * 8 + j) =
              make_float4(o[block][j][half * 2 + odd], o[block][j + 1][half * 2 + odd], o[block][j + 2][half * 2 + odd],
                          o[block][j + 3][half * 2 + odd]);
    if (quad == 0) {
      warp_ms[(warp * heads_per_tile + head) * 2] = total[half].m;
      warp_ms[(warp * heads_per_tile + head) * 2 + 1] = total[half].s;
    }
  }
  __syncthreads();
  constexpr int part = heads_per_tile * (DV + 2);
  float* to_o = p.parts + (list * p.splits + cta.split) * part;
  float* to_ms = to_o + heads_per_tile * DV;
  if (p.splits == 1) {
    to_o = p.a.out.o + (row * s.heads() + first_head) * DV;
    to_ms = p.a.out.ms + (row * s.heads() + first_head) * 2;
  }
  for (int item = threadIdx.x; item < heads * DV / 4; item += threads) {
    const int head = item / (DV / 4);
    float m = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int w = 0; w < warps; ++w) m = fmaxf(m, warp_ms[(w * heads_per_tile + head) * 2]);
    float4 value = {};
#pragma unroll
    for (int w = 0; w < warps; ++w) {
      const float* ms = warp_ms + (w * heads_per_tile + head) * 2;
      const float weight = exp_above(ms[0], m);
      const float4 x = reinterpret_cast<const float4*>(warp_o + w * heads_per_tile * DV)[item];
      value.x += weight * x.x, value.y += weight * x.y, value.z += weight * x.z, value.w += weight * x.w;
      sum += weight * ms[1];
    }
    reinterpret_cast<float4*>(to_o)[item] = value;
    if (item % (DV / 4) == 0) {
      to_ms[head * 2] = m;
      to_ms[head * 2 + 1] = sum;
    }
  }
  if (p.splits == 1 && B != cmp) return;
  if (p.splits > 1) {
    if (!arrives_last(&p.arrivals[list], p.splits)) return;
    merge_splits<DV, B>(p, list, row, first_head, heads, units, shared);
    return;
  }
  __threadfence_block();
  __syncthreads();
  merge_lanes_only(p, list, row, first_head, heads, units);
}

}  // namespace

}  // namespace nsa::gpu
