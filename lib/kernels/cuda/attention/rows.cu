// Attention of one branch, 16-bit storage, row by row: the decode step's kernels, and for now prefill's too, where the
// rows of a tile share K and V through the L2 alone.
//
// Bytes: every K and V row the branch reads, once per 16 query heads; scores, partials and LSE are 4% beside them at
// Dk = Dv = 128. Bound: memory bandwidth; at small batch the latency of load, merge and launch.
// Tiling: the (up to 16) heads of a group are the M of m16n8k16. A row's units (LSE leaves, chosen blocks, runs of 64
// window rows) are dealt to the CTAs of the row; of every 64 tokens of a unit (a tile) warp w of 4 takes 16. From
// capability 9.0 on a fifth warp streams the tiles, which lie in one piece, through a ring of shared-memory slots by
// bulk copies, so that the bytes under way do not depend on registers; before that the warps load from global memory.
// Either way a lane reads its operands in 16-byte pieces as they lie (primitives/mma.cuh). The warps of a CTA meet in
// its shared memory, the CTAs of a row through their cluster's (9.0) or in scratch (attention/split_kv.cuh).
//
// Leaves: (m, sum) of 16 tokens by one warp, of a leaf's steps by rising step, of the 4 warps by rising warp, of a
// lane's leaves by rising leaf. None of it depends on the split or on the layout, so every kv layout gets the same
// bits. Scores, and maxima while they are in here, count in powers of two: log2(e) is folded into the scale.

#include "kernels/cuda/attention/kv_tiles.cuh"
#include "kernels/cuda/attention/split_kv.cuh"
#include "kernels/cuda/attention/stages.cuh"
#include "kernels/cuda/primitives/bulk_pipeline.cuh"
#include "kernels/cuda/primitives/mma.cuh"

namespace nsa::gpu {

namespace {

constexpr int warps = 4;  // that multiply
constexpr int step_tokens = 16;
constexpr int tile_tokens = warps * step_tokens;
constexpr int most_cluster = 16;
constexpr int most_registers = 168;  // two CTAs of 5 warps an SM
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool streams = false;
#else
constexpr bool streams = true;
#endif

struct Params {
  AttendArgs a;
  std::int64_t pitch;       // of the raw scores
  std::int64_t most_units;  // of a list, on this rank
  int splits;
  bool cluster;  // the splits of a list are one
  unsigned* arrivals;
  float* parts;    // unless cluster: [list][split][16 * (Dv + 2)]
  float2* leaves;  // cmp: (m, sum) of each warp, [list][unit][warps][16]
};

template <int DK, int DV>
struct Layout {
  static constexpr int slot_bytes = tile_tokens * (DK > DV ? DK : DV) * 2;
  static constexpr int slots = (96 << 10) / slot_bytes;  // two CTAs an SM
  using Ring = BulkPipeline<slots, slot_bytes>;
  // Queries, then the ring's barriers, then its slots; later, in the slots' place, the CTA's part [16 * Dv] and (m,
  // sum) [16], the same of each warp.
  static constexpr int barriers = QueryFragments<DK>::bytes, memory = barriers + 16 * slots,
                       part_bytes = heads_per_tile * (DV + 2) * 4;
  static constexpr int bytes = memory + std::max(slots * slot_bytes, (1 + warps) * part_bytes);
};

template <class T, int DK, int DV, Branch B>
struct Cta {
  using Ring = typename Layout<DK, DV>::Ring;
  const Params& p;
  const LayerShape& s;
  const RowMap& map;
  int split, warp, g, quad;
  int list, row_group;   // list: (row, group, head tile)
  int counter;           // (sequence, group) of the reads
  std::int64_t head_at;  // row * heads + first head of the tile
  const T *k, *v;        // of the plane
  int heads, before;     // of the tile; cmp: halo rows in front of a chunk
  std::int64_t t, n;
  int units;
  QueryFragments<DK> q;
  Ring ring;
  float o[DV / 64][8][4];
  Sum2 total[2], leaf[2];  // of heads g and g + 8
  int count;               // tokens the warp read

  __device__ Cta(const Params& params, char* shared);
  __device__ void window_rows(std::int64_t& begin, std::int64_t& end) const;
  __device__ Unit rows_from(std::int64_t begin, std::int64_t end) const;
  __device__ Unit unit_at(int u) const;
  __device__ void stream();
  __device__ void walk();
  __device__ void score(const Unit& unit, int at, const KeyFragments<DK>& keys, float (&c)[2][4]) const;
  __device__ void soften(float (&c)[2][4]);
  __device__ void score_halos() const;
  __device__ void merge_warps(float* warp_o, float* part) const;
  __device__ void merge_lanes(int first, int step) const;
  template <class PartOf, class Load>
  __device__ void merge_splits(int first, int step, PartOf part_of, Load load) const;
};

template <class T, int DK, int DV, Branch B>
__device__ __forceinline__ Cta<T, DK, DV, B>::Cta(const Params& params, char* shared)
    : p(params), s(params.a.shape), map(params.a.k.map), q{reinterpret_cast<uint4*>(shared)}, o{}, count(0) {
  auto* barriers = reinterpret_cast<std::uint64_t*>(shared + Layout<DK, DV>::barriers);
  ring = {shared + Layout<DK, DV>::memory, barriers, barriers + Layout<DK, DV>::slots};
  if (streams && threadIdx.x == 0) ring.init(warps);
  split = blockIdx.x % p.splits;
  row_group = blockIdx.x / p.splits;
  list = row_group * gridDim.y + blockIdx.y;
  const int lane = threadIdx.x % 32, row = row_group / s.groups, group = row_group % s.groups;
  warp = threadIdx.x / 32;
  g = lane / 4;
  quad = lane % 4;
  const int sequence = row / p.a.tile.tokens;
  counter = sequence * s.groups + group;
  const std::int64_t plane = (p.a.tile.batch_begin + sequence) * s.groups + group;
  k = static_cast<const T*>(p.a.k.data) + plane * p.a.k.plane_stride;
  v = static_cast<const T*>(p.a.v.data) + plane * p.a.v.plane_stride;
  head_at = std::int64_t{row} * s.heads() + group * s.heads_per_group + blockIdx.y * heads_per_tile;
  heads = min(heads_per_tile, s.heads_per_group - static_cast<int>(blockIdx.y) * heads_per_tile);
  before = B == cmp && shards_of(map) > 1 ? map.halo : 0;
  griddep_wait();
  t = *p.a.tile.first_position + row % p.a.tile.tokens;
  if (warp < warps) q.fill(static_cast<const T*>(p.a.q) + head_at * DK, heads, threadIdx.x, 32 * warps);
  n = B == cmp ? compressed_tokens(s.rules, t) : 0;
  if constexpr (B == cmp) {
    units = static_cast<int>(shards_of(map) > 1 ? owned_chunks(map, n + before, map.rank)
                                                : (n + s.lse.segment - 1) / s.lse.segment);
  } else if constexpr (B == sel) {
    units = s.rules.n_sel;
  } else {
    std::int64_t begin, end;
    window_rows(begin, end);
    units = end > begin ? static_cast<int>((end - 1) / window_unit - begin / window_unit + 1) : 0;
  }
}

// Rows of the window: positions, or the slots of a full or still filling ring that this rank reads.
template <class T, int DK, int DV, Branch B>
__device__ __forceinline__ void Cta<T, DK, DV, B>::window_rows(std::int64_t& begin, std::int64_t& end) const {
  begin = map.ring > 0 ? map.slot_begin : window_begin(s.rules, t);
  end = t + 1;
  if (map.ring > 0) {
    end = end < map.ring ? end : map.ring;
    end = end < map.slot_end ? end : map.slot_end;
  }
}

// Tokens [begin, end) of one chunk (of a ring: its slots).
template <class T, int DK, int DV, Branch B>
__device__ __forceinline__ Unit Cta<T, DK, DV, B>::rows_from(std::int64_t begin, std::int64_t end) const {
  const int count = at_most(end - begin, INT32_MAX);
  if (map.ring > 0 || map.chunk == INT64_MAX) return {begin, count, 0, begin};
  const std::int64_t c = chunk_of(map, begin), row = row_in_chunk(map, c, begin);
  if (map.rank == all_ranks) return {row, count, owner_of_chunk(map, c), begin};
  return {row, has_chunk(map, c) ? count : 0, 0, score_column(map, c, begin)};
}

template <class T, int DK, int DV, Branch B>
__device__ __forceinline__ Unit Cta<T, DK, DV, B>::unit_at(int u) const {
  if constexpr (B == cmp) {
    const std::int64_t begin = leaf_at(map, u) * s.lse.segment, end = begin + s.lse.segment;
    return rows_from(begin, end < n ? end : n);
  } else if constexpr (B == sel) {
    const std::int64_t j = p.a.selected[std::int64_t{row_group} * s.rules.n_sel + u];
    const std::int64_t begin = j * s.rules.l_sel, end = begin + s.rules.l_sel;
    return j < 0 ? Unit{} : rows_from(begin, end < t + 1 ? end : t + 1);
  } else {
    std::int64_t begin, end;
    window_rows(begin, end);
    const std::int64_t from = (begin / window_unit + u) * window_unit, to = from + window_unit;
    return rows_from(begin > from ? begin : from, end < to ? end : to);
  }
}

// 16 bytes of a tile, from a slot or from global memory.
template <class T>
__device__ __forceinline__ uint4 load_piece(const T* from) {
  if constexpr (streams) {
    return *reinterpret_cast<const uint4*>(from);
  } else {
    return load_no_allocate(from);
  }
}

// The lane's operands of 16 rows, of which the first `rows` exist; the others count as zero.
template <class T, int DK>
__device__ __forceinline__ KeyFragments<DK> load_keys(const T* from, int rows) {
  const int g = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
  KeyFragments<DK> keys;
#pragma unroll
  for (int j = 0; j < DK / 32; ++j) {
    keys.first[j] = g < rows ? load_piece(from + g * DK + j * 32 + quad * 8) : uint4{};
    keys.second[j] = g + 8 < rows ? load_piece(from + (g + 8) * DK + j * 32 + quad * 8) : uint4{};
  }
  return keys;
}

template <class T, int DV>
__device__ __forceinline__ ValueFragments load_values(const T* from, int block, int rows) {
  const int g = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
  ValueFragments values;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int token = 2 * quad + (r & 1) + (r & 2) * 4;
    values.row[r] = token < rows ? load_piece(from + token * DV + block * 64 + g * 8) : uint4{};
  }
  return values;
}

// Scaled scores of 16 tokens, -inf past the end; cmp leaves them behind for rank.
template <class T, int DK, int DV, Branch B>
__device__ __forceinline__ void Cta<T, DK, DV, B>::score(const Unit& unit, int at, const KeyFragments<DK>& keys,
                                                         float (&c)[2][4]) const {
  const float scale = log2_e / sqrtf(static_cast<float>(DK));
  multiply_qk<T>(c, q, keys);
#pragma unroll
  for (int part = 0; part < 2; ++part)  // tokens 0..7, 8..15
#pragma unroll
    for (int i = 0; i < 4; ++i) c[part][i] *= scale;
  const bool full = at + step_tokens <= unit.count;
  if constexpr (B == cmp) {
    float* to = static_cast<float*>(p.a.scores) + (head_at + g) * p.pitch + unit.column + at + quad * 2;
    const bool even = (unit.column + at) % 2 == 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (g + half * 8 >= heads) break;
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        float* pair = to + half * 8 * p.pitch + part * 8;
        const int token = at + part * 8 + quad * 2;
        if (full && even) {
          *reinterpret_cast<float2*>(pair) = make_float2(c[part][half * 2], c[part][half * 2 + 1]);
        } else {
          if (token < unit.count) pair[0] = c[part][half * 2];
          if (token + 1 < unit.count) pair[1] = c[part][half * 2 + 1];
        }
      }
    }
  }
  if (full) return;
#pragma unroll
  for (int part = 0; part < 2; ++part)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (at + part * 8 + quad * 2 + i >= unit.count) c[part][i] = c[part][i + 2] = -INFINITY;
}

// Scores to weights relative to the running maximum, o along with it.
template <class T, int DK, int DV, Branch B>
__device__ __forceinline__ void Cta<T, DK, DV, B>::soften(float (&c)[2][4]) {
  float old[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float &c0 = c[0][half * 2], &c1 = c[0][half * 2 + 1], &c2 = c[1][half * 2], &c3 = c[1][half * 2 + 1];
    Sum2 step;
    step.m = fmaxf(neg_inf, quad_max(fmaxf(fmaxf(c0, c1), fmaxf(c2, c3))));
    c0 = exp2_fast(c0 - step.m);
    c1 = exp2_fast(c1 - step.m);
    c2 = exp2_fast(c2 - step.m);
    c3 = exp2_fast(c3 - step.m);
    step.s = quad_sum((c0 + c1) + (c2 + c3));
    if constexpr (B == cmp) leaf[half] = merge2(leaf[half], step);
    const float m = fmaxf(total[half].m, step.m), factor = exp2_fast(step.m - m);
    old[half] = exp2_fast(total[half].m - m);
    total[half] = {m, total[half].s * old[half] + step.s * factor};
    c0 *= factor, c1 *= factor, c2 *= factor, c3 *= factor;
  }
  if (!__any_sync(0xffffffffu, old[0] != 1.0f || old[1] != 1.0f)) return;
#pragma unroll
  for (int block = 0; block < DV / 64; ++block)
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      o[block][j][0] *= old[0], o[block][j][1] *= old[0];
      o[block][j][2] *= old[1], o[block][j][3] *= old[1];
    }
}

// The streaming thread: the tiles in the order the warps take them, K then V.
template <class T, int DK, int DV, Branch B>
__device__ __forceinline__ void Cta<T, DK, DV, B>::stream() {
  const bool weigh = !(B == cmp && p.a.scores_only);
  for (int u = split; u < units; u += p.splits) {
    const Unit unit = unit_at(u);
    const T* keys = k + unit.owner * p.a.k.rank_stride + unit.row * DK;
    const T* values = v + unit.owner * p.a.v.rank_stride + unit.row * DV;
    for (int at = 0; at < unit.count; at += tile_tokens) {
      const int rows = min(tile_tokens, unit.count - at);
      ring.producer_load(keys + at * DK, rows * DK * 2);
      if (weigh) ring.producer_load(values + at * DV, rows * DV * 2);
    }
  }
}

// A multiplying warp: its 16 rows of every tile. Leaving a leaf, its (m, sum) stays behind.
template <class T, int DK, int DV, Branch B>
__device__ __forceinline__ void Cta<T, DK, DV, B>::walk() {
  const bool weigh = !(B == cmp && p.a.scores_only);
  for (int u = split; u < units; u += p.splits) {
    const Unit unit = unit_at(u);
    const T* unit_keys = k + unit.owner * p.a.k.rank_stride + unit.row * DK;
    const T* unit_values = v + unit.owner * p.a.v.rank_stride + unit.row * DV;
    leaf[0] = leaf[1] = {};
    for (int tile = 0; tile < unit.count; tile += tile_tokens) {
      const int at = tile + warp * step_tokens, rows = max(0, min(step_tokens, unit.count - at));
      const T* keys =
          streams ? static_cast<const T*>(ring.consumer_wait()) + warp * step_tokens * DK : unit_keys + at * DK;
      float c[2][4];
      if (rows > 0) score(unit, at, load_keys<T, DK>(keys, rows), c);
      if (streams) ring.consumer_release();
      if (rows > 0) soften(c);
      count += rows;
      if (!weigh) continue;
      const T* values =
          streams ? static_cast<const T*>(ring.consumer_wait()) + warp * step_tokens * DV : unit_values + at * DV;
      if (rows > 0) {
        const ProbabilityFragments<T> weights(c);
#pragma unroll
        for (int block = 0; block < DV / 64; ++block)
          accumulate_pv(o[block], weights, load_values<T, DV>(values, block, rows));
      }
      if (streams) ring.consumer_release();
    }
    if (B == cmp && quad == 0) {
      float2* to = p.leaves + ((list * p.most_units + u) * warps + warp) * heads_per_tile + g;
      to[0] = make_float2(leaf[0].m, leaf[0].s);
      to[8] = make_float2(leaf[1].m, leaf[1].s);
    }
  }
}

// Copies in front of a chunk: scored for its first block, neither attended nor counted.
template <class T, int DK, int DV, Branch B>
__device__ void Cta<T, DK, DV, B>::score_halos() const {
  for (int u = split + warp * p.splits; u < units; u += warps * p.splits) {
    const std::int64_t c = leaf_at(map, u), begin = c * map.chunk - before;
    if (c == 0) continue;
    const std::int64_t from = row_in_chunk(map, c, begin);
    const Unit halo{from, at_most(n - begin, before), 0, score_column(map, c, begin)};
    for (int at = 0; at < halo.count; at += step_tokens) {
      float scores[2][4];
      score(halo, at, load_keys<T, DK>(k + (halo.row + at) * DK, halo.count - at), scores);
    }
  }
}

// o and (m, sum) of the CTA: every warp weighs its own with the common maximum, then they are added up. All threads.
template <class T, int DK, int DV, Branch B>
__device__ __forceinline__ void Cta<T, DK, DV, B>::merge_warps(float* warp_o, float* part) const {
  float2* warp_ms = reinterpret_cast<float2*>(warp_o + warps * heads_per_tile * DV);
  if (warp < warps && quad == 0) {
    warp_ms[warp * heads_per_tile + g] = make_float2(total[0].m, total[0].s);
    warp_ms[warp * heads_per_tile + g + 8] = make_float2(total[1].m, total[1].s);
  }
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (warp >= warps) break;
    const int head = g + half * 8;
    float m = neg_inf;
#pragma unroll
    for (int w = 0; w < warps; ++w) m = fmaxf(m, warp_ms[w * heads_per_tile + head].x);
    const float weight = exp2_fast(total[half].m - m);
    float* to = warp_o + (warp * heads_per_tile + head) * DV + quad * 16;
#pragma unroll
    for (int block = 0; block < DV / 64; ++block)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd)
#pragma unroll
        for (int j = 0; j < 8; j += 4) {
          const auto& x = o[block];
          const int i = half * 2 + odd;
          *reinterpret_cast<float4*>(to + block * 64 + odd * 8 + j) =
              make_float4(weight * x[j][i], weight * x[j + 1][i], weight * x[j + 2][i], weight * x[j + 3][i]);
        }
  }
  __syncthreads();
  for (int item = threadIdx.x; item < heads_per_tile * DV / 4; item += blockDim.x) {
    float4 sum = {};
#pragma unroll
    for (int w = 0; w < warps; ++w) {
      const float4 x = reinterpret_cast<const float4*>(warp_o)[w * heads_per_tile * DV / 4 + item];
      sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    reinterpret_cast<float4*>(part)[item] = sum;
  }
  if (threadIdx.x < heads_per_tile) {
    Sum2 sum;
#pragma unroll
    for (int w = 0; w < warps; ++w) {
      const float2 other = warp_ms[w * heads_per_tile + threadIdx.x];
      sum = merge2(sum, {other.x, other.y});
    }
    reinterpret_cast<float2*>(part + heads_per_tile * DV)[threadIdx.x] = make_float2(sum.m, sum.s);
  }
}

// The warps' (m, sum) to leaves, leaves to lanes by rising leaf: this rank's u-th leaf is in its slot u % present.
template <class T, int DK, int DV, Branch B>
__device__ __forceinline__ void Cta<T, DK, DV, B>::merge_lanes(int first, int step) const {
  const int present = s.lse.buckets / shards_of(map);
  const std::int64_t row_heads = p.a.tile.rows() * s.heads();
  const float2* leaves = p.leaves + list * p.most_units * warps * heads_per_tile;
  for (int item = first; item < present * heads_per_tile; item += step) {
    const int slot = item / heads_per_tile, head = item % heads_per_tile;
    if (head >= heads) continue;
    Sum2 sum;
#pragma unroll 4
    for (int u = slot; u < units; u += present) {
      Sum2 leaf_sum;
#pragma unroll
      for (int w = 0; w < warps; ++w) {
        const float2 other = __ldcg(&leaves[(std::int64_t{u} * warps + w) * heads_per_tile + head]);
        leaf_sum = merge2(leaf_sum, {other.x, other.y});
      }
      sum = merge2(sum, leaf_sum);
    }
    reinterpret_cast<float2*>(p.a.lse)[slot * row_heads + head_at + head] = to_natural_log(sum);
  }
}

// The splits' parts, by rising split, to where the partial belongs.
template <class T, int DK, int DV, Branch B>
template <class PartOf, class Load>
__device__ __forceinline__ void Cta<T, DK, DV, B>::merge_splits(int first, int step, PartOf part_of, Load load) const {
  for (int item = first; item < heads * DV / 4; item += step) {
    const int head = item / (DV / 4);
    float4 x[8];
    float2 ms[8];
    Sum2 sum;
    float4 value = {};
    for (int i0 = 0; i0 < p.splits; i0 += 8) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i0 + i >= p.splits) break;
        const float* part = part_of(i0 + i);
        ms[i] = load(reinterpret_cast<const float2*>(part + heads_per_tile * DV) + head);
        x[i] = load(reinterpret_cast<const float4*>(part) + item);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i0 + i >= p.splits) break;
        const float m = fmaxf(sum.m, ms[i].x), old = exp2_fast(sum.m - m), fresh = exp2_fast(ms[i].x - m);
        sum = {m, sum.s * old + ms[i].y * fresh};
        value.x = value.x * old + x[i].x * fresh, value.y = value.y * old + x[i].y * fresh;
        value.z = value.z * old + x[i].z * fresh, value.w = value.w * old + x[i].w * fresh;
      }
    }
    reinterpret_cast<float4*>(p.a.out.o + head_at * DV)[item] = value;
    if (item % (DV / 4) == 0) reinterpret_cast<float2*>(p.a.out.ms)[head_at + head] = to_natural_log(sum);
  }
}

template <class T, int DK, int DV, Branch B>
__global__ void __maxnreg__(most_registers) decode_kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) char shared[];
  Cta<T, DK, DV, B> cta(p, shared);
  __syncthreads();
  if (streams && cta.warp == warps) {
    if (threadIdx.x % 32 == 0) cta.stream();
  } else {
    cta.walk();
    if (threadIdx.x % 32 == 0 && blockIdx.y == 0 && cta.count > 0)
      atomicAdd(reinterpret_cast<unsigned long long*>(p.a.reads) + cta.counter,
                static_cast<unsigned long long>(cta.count));
    if (B == cmp && cta.before > 0) cta.score_halos();
  }
  __syncthreads();
  float* part = reinterpret_cast<float*>(shared + Layout<DK, DV>::memory);
  float* to = p.cluster ? part : p.parts + (std::int64_t{cta.list} * p.splits + cta.split) * split_floats(p.a.shape);
  cta.merge_warps(part + Layout<DK, DV>::part_bytes / 4, to);
  if (p.cluster) {
    cluster_barrier();
    const int first = threadIdx.x * p.splits + cta.split, step = blockDim.x * p.splits;
    if constexpr (B == cmp) cta.merge_lanes(first, step);
    cta.merge_splits(
        first, step, [&](int i) { return in_cta(part, i); }, [](const auto* from) { return *from; });
    cluster_barrier();
    return;
  }
  if (!arrives_last(&p.arrivals[cta.list], p.splits)) return;
  if constexpr (B == cmp) cta.merge_lanes(threadIdx.x, blockDim.x);
  const float* parts = p.parts + std::int64_t{cta.list} * p.splits * split_floats(p.a.shape);
  cta.merge_splits(
      threadIdx.x, blockDim.x, [&](int i) { return parts + i * split_floats(p.a.shape); },
      [](const auto* from) { return __ldcg(from); });
}

std::int64_t lists_of(const LayerShape& s, const QueryTile& tile) { return tile.rows() * s.groups * head_tiles(s); }

std::int64_t most_units(Branch branch, const LayerShape& s, const RowMap& map, std::int64_t positions) {
  if (branch == sel) return s.rules.n_sel;
  if (branch == win) return s.rules.w / window_unit + 2;
  const std::int64_t tokens = compressed_tokens(s.rules, positions - 1);
  return std::max<std::int64_t>(1, map.rank != all_ranks && map.kv > 1 ? owned_chunks(map, tokens + map.halo, map.rank)
                                                                       : (tokens + s.lse.segment - 1) / s.lse.segment);
}

// CTAs enough to fill every SM with two, no more than the row has tiles; up to a cluster's worth.
void divide(Params& p, std::int64_t lists, std::int64_t units) {
  const std::int64_t wanted = lists > max_split_rows ? 1 : std::max<std::int64_t>(1, 2 * limits().sms / lists);
  p.splits = static_cast<int>(std::min({wanted, units, std::int64_t{most_cluster}}));
  if (p.splits > 8) p.splits = lists * 16 <= limits().sms ? 16 : 8;
  // Clusters meet faster but leave SMs idle where many of them compete for places. One CTA alone is a cluster too.
  p.cluster = p.splits == 1 || (limits().capability >= 90 && lists * p.splits <= limits().sms);
}

template <class T, int DK, int DV, Branch B>
void launch(const Params& p, Stream* stream) {
  const dim3 grid(static_cast<unsigned>(p.a.tile.rows() * p.a.shape.groups * p.splits), head_tiles(p.a.shape));
  const bool has_streams = limits().capability >= 90;
  launch_pdl(decode_kernel<T, DK, DV, B>, grid, 32 * (warps + has_streams), Layout<DK, DV>::bytes, stream,
             p.cluster ? p.splits : 1, p);
}

template <class T, Branch B>
void launch_sized(const Params& p, Stream* stream) {
  const int d_k = p.a.shape.d_k, d_v = p.a.shape.d_v;
  if (d_k == 64 && d_v == 64) return launch<T, 64, 64, B>(p, stream);
  if (d_k == 128 && d_v == 128) return launch<T, 128, 128, B>(p, stream);
  if (d_k == 192 && d_v == 128) return launch<T, 192, 128, B>(p, stream);
  throw InternalError("decode kernel for head sizes it was not built for");
}

template <Branch B>
void launch_typed(const Params& p, Stream* stream) {
  if (p.a.shape.dtype == DType::bf16)
    launch_sized<__nv_bfloat16, B>(p, stream);
  else
    launch_sized<__half, B>(p, stream);
}

}  // namespace

bool rows_accept(const LayerShape& s, const QueryTile&) {
  const bool sized = (s.d_k == 64 && s.d_v == 64) || ((s.d_k == 128 || s.d_k == 192) && s.d_v == 128);
  return sized && s.dtype != DType::f32;
}

std::size_t rows_scratch(const LayerShape& s, const QueryTile& tile) {
  if (!rows_accept(s, tile)) return 0;
  const std::int64_t lists = lists_of(s, tile),
                     leaves = compressed_tokens(s.rules, tile.max_positions - 1) / s.lse.segment + 2;
  const std::int64_t parts = std::max<std::int64_t>(4 * limits().sms, 16 * std::min<std::int64_t>(lists, 16));
  return static_cast<std::size_t>(parts * split_floats(s)) * sizeof(float) +
         static_cast<std::size_t>(lists * leaves * warps * heads_per_tile) * sizeof(float2);
}

void attend_rows(Branch branch, const AttendArgs& a, Stream* stream) {
  if (a.tile.rows() == 0) return;
  if (!reads_kv_map(branch, a.shape, a.k.map)) return attend_general(branch, a, stream);
  Params p{a,       0,      most_units(branch, a.shape, a.k.map, a.tile.max_positions),
           1,       false,  arrival_counters(branch),
           nullptr, nullptr};
  const std::int64_t lists = lists_of(a.shape, a.tile);
  divide(p, lists, p.most_units);
  p.pitch = branch == cmp ? score_pitch(a.k.map, compressed_tokens(a.shape.rules, a.tile.max_positions - 1)) : 0;
  p.parts = static_cast<float*>(a.scratch);
  p.leaves = reinterpret_cast<float2*>(p.parts + (p.cluster ? 0 : lists * p.splits * split_floats(a.shape)));
  if (branch == cmp)
    launch_typed<cmp>(p, stream);
  else if (branch == sel)
    launch_typed<sel>(p, stream);
  else
    launch_typed<win>(p, stream);
}

}  // namespace nsa::gpu
