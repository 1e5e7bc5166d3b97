// Attention of one branch, one CTA a query row and split, 16-bit storage, tensor cores. Prefill rows that the tiled
// kernels do not take run here; the rows of a tile share K and V through the L2 alone.
//
// Bytes: every K and V row that the branch reads, once per 16 query heads; scores, partials and LSE add 4% at
// Dk = Dv = 128. Bound: memory bandwidth; at small batch the latency of load, merge and launch.
// Tiling: the (up to 16) heads of a group are the M of m16n8k16. The spans of a row (LSE segments, selected blocks,
// runs of 64 window rows) are dealt to the CTAs of the row; of every 64 tokens of a span (a CTA tile) warp w of 4
// takes 16. From capability 9.0 on a producer warp streams the contiguous tiles through a ring of shared-memory slots
// by bulk copies, so the bytes in flight do not depend on registers; before that the warps load from global memory. In
// both cases a lane reads its operands as 16-byte vectors in memory order (primitives/mma.cuh). The warps of a CTA
// merge in shared memory, the CTAs of a row through the shared memory of their cluster (9.0) or in scratch
// (attention/split_kv.cuh).
//
// LSE: (m, sum) of 16 tokens by one warp; a segment merges its steps by rising step, then its 4 warps by rising warp; a
// bucket merges its segments by rising segment. This order depends neither on the split nor on the layout, so every kv
// layout gets the same bits. Scores and maxima are in the exp2 domain inside the kernel: log2(e) is folded into the
// scale.

#include "kernels/cuda/attention/kv_tiles.cuh"
#include "kernels/cuda/attention/split_kv.cuh"
#include "kernels/cuda/attention/stages.cuh"
#include "kernels/cuda/primitives/bulk_pipeline.cuh"
#include "kernels/cuda/primitives/mma.cuh"

namespace nsa::gpu {

namespace {

constexpr int warps = 4;  // consumer warps
constexpr int warp_tile_tokens = 16;
constexpr int cta_tile_tokens = warps * warp_tile_tokens;
constexpr int rows_max_cluster = 16;
constexpr int max_registers = 168;  // two CTAs of 5 warps an SM
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool bulk_copies = false;
#else
constexpr bool bulk_copies = true;
#endif

struct RowsParams {
  AttendArgs a;
  std::int64_t pitch;      // of the raw scores
  std::int64_t max_spans;  // upper bound of a work item's spans on this rank
  int splits;
  bool cluster;  // the splits of a work item form a cluster
  unsigned* arrivals;
  float* partials;      // unless cluster: [work item][split][16 * (Dv + 2)]
  float2* segment_lse;  // cmp: (m, sum) of each warp, [work item][span][warps][16]
};

template <int DK, int DV>
struct RowsLayout {
  static constexpr int slot_bytes = cta_tile_tokens * (DK > DV ? DK : DV) * 2;
  static constexpr int slots = (96 << 10) / slot_bytes;  // two CTAs an SM
  using Ring = BulkPipeline<slots, slot_bytes>;
  // Queries, the barriers of the ring, its slots. The epilogue reuses the slots for the partial of the CTA, o [16 * Dv]
  // and (m, sum) [16], then for the partial of each warp.
  static constexpr int barriers = QueryFragments<DK>::bytes, memory = barriers + 16 * slots,
                       partial_bytes = heads_per_tile * (DV + 2) * 4;
  static constexpr int bytes = memory + std::max(slots * slot_bytes, (1 + warps) * partial_bytes);
};

template <class T, int DK, int DV, Branch B>
struct RowsCta {
  using Ring = typename RowsLayout<DK, DV>::Ring;
  const RowsParams& p;
  const LayerShape& s;
  const RowMap& map;
  int split, warp, g, quad;
  int work_item, row_group;  // work item: (row, group, head tile)
  int counter;               // (sequence, group) of the read counter
  std::int64_t first_head;   // row * heads + first head of the tile
  const T *k, *v;            // of the K/V plane
  int heads, halo_rows;      // heads of the tile; halo rows before a chunk (cmp)
  std::int64_t t, n;
  int spans;
  QueryFragments<DK> q;
  Ring ring;
  float o[DV / 64][8][4];
  Exp2SoftmaxState total[2], segment[2];  // of heads g and g + 8
  int count;                              // tokens that the warp read

  __device__ RowsCta(const RowsParams& params, char* shared);
  __device__ void window_rows(std::int64_t& begin, std::int64_t& end) const;
  __device__ KvRows rows_of_range(std::int64_t begin, std::int64_t end) const;
  __device__ KvRows span_at(int u) const;
  __device__ void produce();
  __device__ void mainloop();
  __device__ void score(const KvRows& span, int at, const KeyFragments<DK>& keys, float (&c)[2][4]) const;
  __device__ void online_softmax(float (&c)[2][4]);
  __device__ void score_halos() const;
  __device__ void merge_warps(float* warp_o, float* partial) const;
  __device__ void merge_buckets(int first, int step) const;
  template <class PartialOf, class Load>
  __device__ void merge_splits(int first, int step, PartialOf partial_of, Load load) const;
};

template <class T, int DK, int DV, Branch B>
__device__ __forceinline__ RowsCta<T, DK, DV, B>::RowsCta(const RowsParams& params, char* shared)
    : p(params), s(params.a.shape), map(params.a.k.map), q{reinterpret_cast<uint4*>(shared)}, o{}, count(0) {
  auto* barriers = reinterpret_cast<std::uint64_t*>(shared + RowsLayout<DK, DV>::barriers);
  ring = {shared + RowsLayout<DK, DV>::memory, barriers, barriers + RowsLayout<DK, DV>::slots};
  if (bulk_copies && threadIdx.x == 0) ring.init(warps);
  split = blockIdx.x % p.splits;
  row_group = blockIdx.x / p.splits;
  work_item = row_group * gridDim.y + blockIdx.y;
  const int lane = threadIdx.x % 32, row = row_group / s.groups, group = row_group % s.groups;
  warp = threadIdx.x / 32;
  g = lane / 4;
  quad = lane % 4;
  const int sequence = row / p.a.tile.tokens;
  counter = sequence * s.groups + group;
  const std::int64_t plane = (p.a.tile.batch_begin + sequence) * s.groups + group;
  k = static_cast<const T*>(p.a.k.data) + plane * p.a.k.plane_stride;
  v = static_cast<const T*>(p.a.v.data) + plane * p.a.v.plane_stride;
  first_head = std::int64_t{row} * s.heads() + group * s.heads_per_group + blockIdx.y * heads_per_tile;
  heads = min(heads_per_tile, s.heads_per_group - static_cast<int>(blockIdx.y) * heads_per_tile);
  halo_rows = B == cmp && shards_of(map) > 1 ? map.halo : 0;
  griddep_wait();
  t = *p.a.tile.first_position + row % p.a.tile.tokens;
  if (warp < warps) q.fill(static_cast<const T*>(p.a.q) + first_head * DK, heads, threadIdx.x, 32 * warps);
  n = B == cmp ? compressed_tokens(s.rules, t) : 0;
  if constexpr (B == cmp) {
    spans = static_cast<int>(shards_of(map) > 1 ? owned_chunks(map, n + halo_rows, map.rank)
                                                : (n + s.lse.segment - 1) / s.lse.segment);
  } else if constexpr (B == sel) {
    spans = s.rules.n_sel;
  } else {
    std::int64_t begin, end;
    window_rows(begin, end);
    spans = end > begin ? static_cast<int>((end - 1) / window_span - begin / window_span + 1) : 0;
  }
}

// Rows of the window: positions, or the slots of a (perhaps partly filled) ring that this rank reads.
template <class T, int DK, int DV, Branch B>
__device__ __forceinline__ void RowsCta<T, DK, DV, B>::window_rows(std::int64_t& begin, std::int64_t& end) const {
  begin = map.ring > 0 ? map.slot_begin : window_begin(s.rules, t);
  end = t + 1;
  if (map.ring > 0) {
    end = end < map.ring ? end : map.ring;
    end = end < map.slot_end ? end : map.slot_end;
  }
}

// Rows of tokens [begin, end), all of one chunk (for a ring: of slots).
template <class T, int DK, int DV, Branch B>
__device__ __forceinline__ KvRows RowsCta<T, DK, DV, B>::rows_of_range(std::int64_t begin, std::int64_t end) const {
  const int count = clamp_count(end - begin, INT32_MAX);
  if (map.ring > 0 || map.chunk == INT64_MAX) return {begin, count, 0, begin};
  const std::int64_t c = chunk_of(map, begin), row = row_in_chunk(map, c, begin);
  if (map.rank == all_ranks) return {row, count, owner_of_chunk(map, c), begin};
  return {row, has_chunk(map, c) ? count : 0, 0, score_column(map, c, begin)};
}

template <class T, int DK, int DV, Branch B>
__device__ __forceinline__ KvRows RowsCta<T, DK, DV, B>::span_at(int u) const {
  if constexpr (B == cmp) {
    const std::int64_t begin = segment_at(map, u) * s.lse.segment, end = begin + s.lse.segment;
    return rows_of_range(begin, end < n ? end : n);
  } else if constexpr (B == sel) {
    const std::int64_t j = p.a.selected[std::int64_t{row_group} * s.rules.n_sel + u];
    const std::int64_t begin = j * s.rules.l_sel, end = begin + s.rules.l_sel;
    return j < 0 ? KvRows{} : rows_of_range(begin, end < t + 1 ? end : t + 1);
  } else {
    std::int64_t begin, end;
    window_rows(begin, end);
    const std::int64_t from = (begin / window_span + u) * window_span, to = from + window_span;
    return rows_of_range(begin > from ? begin : from, end < to ? end : to);
  }
}

// A 16-byte vector of a tile, from a slot or from global memory.
template <class T>
__device__ __forceinline__ uint4 load_vector(const T* from) {
  if constexpr (bulk_copies) {
    return *reinterpret_cast<const uint4*>(from);
  } else {
    return load_no_allocate(from);
  }
}

// The operands of a lane from 16 rows, of which the first `rows` exist; the others are zero.
template <class T, int DK>
__device__ __forceinline__ KeyFragments<DK> load_keys(const T* from, int rows) {
  const int g = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
  KeyFragments<DK> keys;
#pragma unroll
  for (int j = 0; j < DK / 32; ++j) {
    keys.first[j] = g < rows ? load_vector(from + g * DK + j * 32 + quad * 8) : uint4{};
    keys.second[j] = g + 8 < rows ? load_vector(from + (g + 8) * DK + j * 32 + quad * 8) : uint4{};
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
    values.row[r] = token < rows ? load_vector(from + token * DV + block * 64 + g * 8) : uint4{};
  }
  return values;
}

// Scaled scores of 16 tokens, -inf past the end. cmp stores them for rank.
template <class T, int DK, int DV, Branch B>
__device__ __forceinline__ void RowsCta<T, DK, DV, B>::score(const KvRows& span, int at, const KeyFragments<DK>& keys,
                                                             float (&c)[2][4]) const {
  const float scale = log2_e / sqrtf(static_cast<float>(DK));
  multiply_qk<T>(c, q, keys);
#pragma unroll
  for (int n_tile = 0; n_tile < 2; ++n_tile)  // tokens 0..7, 8..15
#pragma unroll
    for (int i = 0; i < 4; ++i) c[n_tile][i] *= scale;
  const bool full = at + warp_tile_tokens <= span.count;
  if constexpr (B == cmp) {
    float* to = static_cast<float*>(p.a.scores) + (first_head + g) * p.pitch + span.column + at + quad * 2;
    const bool even = (span.column + at) % 2 == 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (g + half * 8 >= heads) break;
#pragma unroll
      for (int n_tile = 0; n_tile < 2; ++n_tile) {
        float* pair = to + half * 8 * p.pitch + n_tile * 8;
        const int token = at + n_tile * 8 + quad * 2;
        if (full && even) {
          *reinterpret_cast<float2*>(pair) = make_float2(c[n_tile][half * 2], c[n_tile][half * 2 + 1]);
        } else {
          if (token < span.count) pair[0] = c[n_tile][half * 2];
          if (token + 1 < span.count) pair[1] = c[n_tile][half * 2 + 1];
        }
      }
    }
  }
  if (full) return;
#pragma unroll
  for (int n_tile = 0; n_tile < 2; ++n_tile)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (at + n_tile * 8 + quad * 2 + i >= span.count) c[n_tile][i] = c[n_tile][i + 2] = -INFINITY;
}

// Online softmax: scores to P relative to the running maximum, and o rescaled to it.
template <class T, int DK, int DV, Branch B>
__device__ __forceinline__ void RowsCta<T, DK, DV, B>::online_softmax(float (&c)[2][4]) {
  float scale_prev[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float &c0 = c[0][half * 2], &c1 = c[0][half * 2 + 1], &c2 = c[1][half * 2], &c3 = c[1][half * 2 + 1];
    Exp2SoftmaxState step;
    step.m = fmaxf(neg_inf, quad_max(fmaxf(fmaxf(c0, c1), fmaxf(c2, c3))));
    c0 = exp2_fast(c0 - step.m);
    c1 = exp2_fast(c1 - step.m);
    c2 = exp2_fast(c2 - step.m);
    c3 = exp2_fast(c3 - step.m);
    step.s = quad_sum((c0 + c1) + (c2 + c3));
    if constexpr (B == cmp) segment[half] = merge_exact(segment[half], step);
    const float m = fmaxf(total[half].m, step.m), scale_new = exp2_fast(step.m - m);
    scale_prev[half] = exp2_fast(total[half].m - m);
    total[half] = {m, total[half].s * scale_prev[half] + step.s * scale_new};
    c0 *= scale_new, c1 *= scale_new, c2 *= scale_new, c3 *= scale_new;
  }
  if (!__any_sync(0xffffffffu, scale_prev[0] != 1.0f || scale_prev[1] != 1.0f)) return;
#pragma unroll
  for (int block = 0; block < DV / 64; ++block)
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      o[block][j][0] *= scale_prev[0], o[block][j][1] *= scale_prev[0];
      o[block][j][2] *= scale_prev[1], o[block][j][3] *= scale_prev[1];
    }
}

// The producer thread: tiles in the order of the consumers, K then V.
template <class T, int DK, int DV, Branch B>
__device__ __forceinline__ void RowsCta<T, DK, DV, B>::produce() {
  const bool has_pv = !(B == cmp && p.a.scores_only);
  for (int u = split; u < spans; u += p.splits) {
    const KvRows span = span_at(u);
    const T* keys = k + span.owner * p.a.k.rank_stride + span.row * DK;
    const T* values = v + span.owner * p.a.v.rank_stride + span.row * DV;
    for (int at = 0; at < span.count; at += cta_tile_tokens) {
      const int rows = min(cta_tile_tokens, span.count - at);
      ring.producer_load(keys + at * DK, rows * DK * 2);
      if (has_pv) ring.producer_load(values + at * DV, rows * DV * 2);
    }
  }
}

// KV mainloop of a consumer warp: its 16 rows of every tile. After each LSE segment it stores the (m, sum) of it.
template <class T, int DK, int DV, Branch B>
__device__ __forceinline__ void RowsCta<T, DK, DV, B>::mainloop() {
  const bool has_pv = !(B == cmp && p.a.scores_only);
  for (int u = split; u < spans; u += p.splits) {
    const KvRows span = span_at(u);
    const T* span_keys = k + span.owner * p.a.k.rank_stride + span.row * DK;
    const T* span_values = v + span.owner * p.a.v.rank_stride + span.row * DV;
    segment[0] = segment[1] = {};
    for (int tile = 0; tile < span.count; tile += cta_tile_tokens) {
      const int at = tile + warp * warp_tile_tokens, rows = max(0, min(warp_tile_tokens, span.count - at));
      const T* keys = bulk_copies ? static_cast<const T*>(ring.consumer_wait()) + warp * warp_tile_tokens * DK
                                  : span_keys + at * DK;
      float c[2][4];
      if (rows > 0) score(span, at, load_keys<T, DK>(keys, rows), c);
      if (bulk_copies) ring.consumer_release();
      if (rows > 0) online_softmax(c);
      count += rows;
      if (!has_pv) continue;
      const T* values = bulk_copies ? static_cast<const T*>(ring.consumer_wait()) + warp * warp_tile_tokens * DV
                                    : span_values + at * DV;
      if (rows > 0) {
        const ProbabilityFragments<T> p_operand(c);
#pragma unroll
        for (int block = 0; block < DV / 64; ++block)
          accumulate_pv(o[block], p_operand, load_values<T, DV>(values, block, rows));
      }
      if (bulk_copies) ring.consumer_release();
    }
    if (B == cmp && quad == 0) {
      float2* to = p.segment_lse + ((work_item * p.max_spans + u) * warps + warp) * heads_per_tile + g;
      to[0] = make_float2(segment[0].m, segment[0].s);
      to[8] = make_float2(segment[1].m, segment[1].s);
    }
  }
}

// Halo rows before a chunk: scored for its first block, neither attended nor counted.
template <class T, int DK, int DV, Branch B>
__device__ void RowsCta<T, DK, DV, B>::score_halos() const {
  for (int u = split + warp * p.splits; u < spans; u += warps * p.splits) {
    const std::int64_t c = segment_at(map, u), begin = c * map.chunk - halo_rows;
    if (c == 0) continue;
    const std::int64_t from = row_in_chunk(map, c, begin);
    const KvRows halo{from, clamp_count(n - begin, halo_rows), 0, score_column(map, c, begin)};
    for (int at = 0; at < halo.count; at += warp_tile_tokens) {
      float scores[2][4];
      score(halo, at, load_keys<T, DK>(k + (halo.row + at) * DK, halo.count - at), scores);
    }
  }
}

// Partial of the CTA: every warp rescales its o to the common maximum, then they are summed. All threads.
template <class T, int DK, int DV, Branch B>
__device__ __forceinline__ void RowsCta<T, DK, DV, B>::merge_warps(float* warp_o, float* partial) const {
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
    const float scale = exp2_fast(total[half].m - m);
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
              make_float4(scale * x[j][i], scale * x[j + 1][i], scale * x[j + 2][i], scale * x[j + 3][i]);
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
    reinterpret_cast<float4*>(partial)[item] = sum;
  }
  if (threadIdx.x < heads_per_tile) {
    Exp2SoftmaxState sum;
#pragma unroll
    for (int w = 0; w < warps; ++w) {
      const float2 other = warp_ms[w * heads_per_tile + threadIdx.x];
      sum = merge_exact(sum, {other.x, other.y});
    }
    reinterpret_cast<float2*>(partial + heads_per_tile * DV)[threadIdx.x] = make_float2(sum.m, sum.s);
  }
}

// Merges the (m, sum) of the warps to segments, and those to buckets by rising segment: this rank's u-th segment
// belongs to its bucket u % local buckets.
template <class T, int DK, int DV, Branch B>
__device__ __forceinline__ void RowsCta<T, DK, DV, B>::merge_buckets(int first, int step) const {
  const int local_buckets = s.lse.buckets / shards_of(map);
  const std::int64_t row_heads = p.a.tile.rows() * s.heads();
  const float2* segment_lse = p.segment_lse + work_item * p.max_spans * warps * heads_per_tile;
  for (int item = first; item < local_buckets * heads_per_tile; item += step) {
    const int slot = item / heads_per_tile, head = item % heads_per_tile;
    if (head >= heads) continue;
    Exp2SoftmaxState sum;
#pragma unroll 4
    for (int u = slot; u < spans; u += local_buckets) {
      Exp2SoftmaxState segment_sum;
#pragma unroll
      for (int w = 0; w < warps; ++w) {
        const float2 other = __ldcg(&segment_lse[(std::int64_t{u} * warps + w) * heads_per_tile + head]);
        segment_sum = merge_exact(segment_sum, {other.x, other.y});
      }
      sum = merge_exact(sum, segment_sum);
    }
    reinterpret_cast<float2*>(p.a.lse)[slot * row_heads + first_head + head] = to_natural_log(sum);
  }
}

// Merges the partials of the splits, by rising split, into the partial of the row.
template <class T, int DK, int DV, Branch B>
template <class PartialOf, class Load>
__device__ __forceinline__ void RowsCta<T, DK, DV, B>::merge_splits(int first, int step, PartialOf partial_of,
                                                                    Load load) const {
  for (int item = first; item < heads * DV / 4; item += step) {
    const int head = item / (DV / 4);
    float4 x[8];
    float2 ms[8];
    Exp2SoftmaxState sum;
    float4 value = {};
    for (int i0 = 0; i0 < p.splits; i0 += 8) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i0 + i >= p.splits) break;
        const float* partial = partial_of(i0 + i);
        ms[i] = load(reinterpret_cast<const float2*>(partial + heads_per_tile * DV) + head);
        x[i] = load(reinterpret_cast<const float4*>(partial) + item);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i0 + i >= p.splits) break;
        const float m = fmaxf(sum.m, ms[i].x), scale_prev = exp2_fast(sum.m - m), scale_new = exp2_fast(ms[i].x - m);
        sum = {m, sum.s * scale_prev + ms[i].y * scale_new};
        value.x = value.x * scale_prev + x[i].x * scale_new, value.y = value.y * scale_prev + x[i].y * scale_new;
        value.z = value.z * scale_prev + x[i].z * scale_new, value.w = value.w * scale_prev + x[i].w * scale_new;
      }
    }
    reinterpret_cast<float4*>(p.a.out.o + first_head * DV)[item] = value;
    if (item % (DV / 4) == 0) reinterpret_cast<float2*>(p.a.out.ms)[first_head + head] = to_natural_log(sum);
  }
}

template <class T, int DK, int DV, Branch B>
__global__ void __maxnreg__(max_registers) rows_kernel(const __grid_constant__ RowsParams p) {
  extern __shared__ __align__(128) char shared[];
  RowsCta<T, DK, DV, B> cta(p, shared);
  __syncthreads();
  if (bulk_copies && cta.warp == warps) {
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
    const int first = threadIdx.x * p.splits + cta.split, step = blockDim.x * p.splits;
    if constexpr (B == cmp) cta.merge_buckets(first, step);
    cta.merge_splits(
        first, step, [&](int i) { return map_to_cta(partial, i); }, [](const auto* from) { return *from; });
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
  launch_pdl(rows_kernel<T, DK, DV, B>, grid, 32 * (warps + has_producer), RowsLayout<DK, DV>::bytes, stream,
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

bool rows_accept(const LayerShape& s, const QueryTile&) {
  const bool sized = (s.d_k == 64 && s.d_v == 64) || ((s.d_k == 128 || s.d_k == 192) && s.d_v == 128);
  return sized && s.dtype != DType::f32;
}

std::size_t rows_scratch(const LayerShape& s, const QueryTile& tile) {
  if (!rows_accept(s, tile)) return 0;
  const std::int64_t work_items = work_items_of(s, tile),
                     segment_lse = compressed_tokens(s.rules, tile.max_positions - 1) / s.lse.segment + 2;
  const std::int64_t partials = std::max<std::int64_t>(4 * limits().sms, 16 * std::min<std::int64_t>(work_items, 16));
  return static_cast<std::size_t>(partials * split_partial_floats(s)) * sizeof(float) +
         static_cast<std::size_t>(work_items * segment_lse * warps * heads_per_tile) * sizeof(float2);
}

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
