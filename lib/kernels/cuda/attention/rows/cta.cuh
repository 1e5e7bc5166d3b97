#pragma once
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
// LSE: (m, s) of a tile of 16 tokens by one warp; a segment merges a warp's tiles in rising order, then its 4 warps by
// rising warp; a bucket merges its segments by rising segment. This order depends neither on the split nor on the
// layout, so every kv layout gets the same bits. Scores and maxima are in the exp2 domain inside the kernel: log2(e) is
// folded into the scale.

#include "kernels/cuda/attention/kv_tiles.cuh"
#include "kernels/cuda/attention/online_softmax.cuh"
#include "kernels/cuda/attention/split_kv.cuh"
#include "kernels/cuda/primitives/bulk_pipeline.cuh"
#include "kernels/cuda/primitives/mma.cuh"

namespace nsa::gpu {

constexpr int rows_warp_tokens = 16;
constexpr int rows_tile_tokens = rows_warps * rows_warp_tokens;
constexpr int rows_max_registers = 168;  // two CTAs of 5 warps an SM
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
  static constexpr int slot_bytes = rows_tile_tokens * (DK > DV ? DK : DV) * 2;
  static constexpr int slots = (96 << 10) / slot_bytes;  // two CTAs an SM
  using Ring = BulkPipeline<slots, slot_bytes>;
  // Queries, the barriers of the ring, its slots. The epilogue reuses the slots for the partial of the CTA, o
  // [16 * Dv] and (m, sum) [16], then for the partial of each warp.
  static constexpr int barriers = QueryFragments<DK>::bytes, memory = barriers + 16 * slots,
                       partial_bytes = heads_per_tile * (DV + 2) * 4;
  static constexpr int bytes = memory + std::max(slots * slot_bytes, (1 + rows_warps) * partial_bytes);
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
  SoftmaxState<Exp2> total[2], segment[2];  // of heads g and g + 8
  int count;                                // tokens that the warp read

  __device__ RowsCta(const RowsParams& params, char* shared);
  __device__ void window_rows(std::int64_t& begin, std::int64_t& end) const;
  __device__ KvRows span_at(int u) const;
  __device__ void produce();
  __device__ void mainloop();
  __device__ void score(const KvRows& span, int at, const KeyFragments<DK>& keys, float (&c)[2][4]) const;
  __device__ void online_softmax(float (&c)[2][4]);
  __device__ void score_halos() const;
  __device__ void merge_warps(float* warp_o, float* partial) const;
  __device__ void merge_buckets(int first, int stride) const;
  template <class PartialOf, class Load>
  __device__ void merge_splits(int first, int stride, PartialOf partial_of, Load load) const;
};

template <class T, int DK, int DV, Branch B>
__device__ __forceinline__ RowsCta<T, DK, DV, B>::RowsCta(const RowsParams& params, char* shared)
    : p(params), s(params.a.shape), map(params.a.k.map), q{reinterpret_cast<uint4*>(shared)}, o{}, count(0) {
  auto* barriers = reinterpret_cast<std::uint64_t*>(shared + RowsLayout<DK, DV>::barriers);
  ring = {shared + RowsLayout<DK, DV>::memory, barriers, barriers + RowsLayout<DK, DV>::slots};
  if (bulk_copies && threadIdx.x == 0) ring.init(rows_warps);
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
  t = first_position(p.a.tile, sequence) + row % p.a.tile.tokens;
  if (warp < rows_warps) q.fill(static_cast<const T*>(p.a.q) + first_head * DK, heads, threadIdx.x, 32 * rows_warps);
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

template <class T, int DK, int DV, Branch B>
__device__ __forceinline__ KvRows RowsCta<T, DK, DV, B>::span_at(int u) const {
  if constexpr (B == cmp) {
    const std::int64_t begin = segment_at(map, u) * s.lse.segment, end = begin + s.lse.segment;
    return rows_of_range(map, begin, end < n ? end : n);
  } else if constexpr (B == sel) {
    const std::int64_t j = p.a.selected[std::int64_t{row_group} * s.rules.n_sel + u];
    const std::int64_t begin = j * s.rules.l_sel, end = begin + s.rules.l_sel;
    return j < 0 ? KvRows{} : rows_of_range(map, begin, end < t + 1 ? end : t + 1);
  } else {
    std::int64_t begin, end;
    window_rows(begin, end);
    const std::int64_t from = (begin / window_span + u) * window_span, to = from + window_span;
    return rows_of_range(map, begin > from ? begin : from, end < to ? end : to);
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
__device__ __forceinline__ ValueFragments load_values(const T* from, int column_block, int rows) {
  const int g = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
  ValueFragments values;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int token = 2 * quad + (r & 1) + (r & 2) * 4;
    values.row[r] = token < rows ? load_vector(from + token * DV + column_block * 64 + g * 8) : uint4{};
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
  const bool full = at + rows_warp_tokens <= span.count;
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
    SoftmaxState<Exp2> tile;
    tile.m = fmaxf(neg_inf, quad_max(fmaxf(fmaxf(c0, c1), fmaxf(c2, c3))));
    c0 = exp2_fast(c0 - tile.m);
    c1 = exp2_fast(c1 - tile.m);
    c2 = exp2_fast(c2 - tile.m);
    c3 = exp2_fast(c3 - tile.m);
    tile.s = quad_sum((c0 + c1) + (c2 + c3));
    if constexpr (B == cmp) segment[half] = merge_exact(segment[half], tile);
    const TileScale scale = merge_tile(total[half], tile);
    scale_prev[half] = scale.o;
    c0 *= scale.p, c1 *= scale.p, c2 *= scale.p, c3 *= scale.p;
  }
  if (!__any_sync(0xffffffffu, scale_prev[0] != 1.0f || scale_prev[1] != 1.0f)) return;
#pragma unroll
  for (int column_block = 0; column_block < DV / 64; ++column_block)
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      o[column_block][j][0] *= scale_prev[0], o[column_block][j][1] *= scale_prev[0];
      o[column_block][j][2] *= scale_prev[1], o[column_block][j][3] *= scale_prev[1];
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
    for (int at = 0; at < span.count; at += rows_tile_tokens) {
      const int rows = min(rows_tile_tokens, span.count - at);
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
    for (int tile = 0; tile < span.count; tile += rows_tile_tokens) {
      const int at = tile + warp * rows_warp_tokens, rows = max(0, min(rows_warp_tokens, span.count - at));
      const T* keys = bulk_copies ? static_cast<const T*>(ring.consumer_wait()) + warp * rows_warp_tokens * DK
                                  : span_keys + at * DK;
      float c[2][4];
      if (rows > 0) score(span, at, load_keys<T, DK>(keys, rows), c);
      if (bulk_copies) ring.consumer_release();
      if (rows > 0) online_softmax(c);
      count += rows;
      if (!has_pv) continue;
      const T* values = bulk_copies ? static_cast<const T*>(ring.consumer_wait()) + warp * rows_warp_tokens * DV
                                    : span_values + at * DV;
      if (rows > 0) {
        const ProbabilityFragments<T> p_operand(c);
#pragma unroll
        for (int column_block = 0; column_block < DV / 64; ++column_block)
          accumulate_pv(o[column_block], p_operand, load_values<T, DV>(values, column_block, rows));
      }
      if (bulk_copies) ring.consumer_release();
    }
    if (B == cmp && quad == 0) {
      float2* to = p.segment_lse + ((work_item * p.max_spans + u) * rows_warps + warp) * heads_per_tile + g;
      to[0] = make_float2(segment[0].m, segment[0].s);
      to[8] = make_float2(segment[1].m, segment[1].s);
    }
  }
}

// Halo rows before a chunk: scored for its first block, neither attended nor counted.
template <class T, int DK, int DV, Branch B>
__device__ void RowsCta<T, DK, DV, B>::score_halos() const {
  for (int u = split + warp * p.splits; u < spans; u += rows_warps * p.splits) {
    const std::int64_t c = segment_at(map, u), begin = c * map.chunk - halo_rows;
    if (c == 0) continue;
    const std::int64_t from = row_in_chunk(map, c, begin);
    const KvRows halo{from, clamp_count(n - begin, halo_rows), 0, score_column(map, c, begin)};
    for (int at = 0; at < halo.count; at += rows_warp_tokens) {
      float scores[2][4];
      score(halo, at, load_keys<T, DK>(k + (halo.row + at) * DK, halo.count - at), scores);
    }
  }
}

}  // namespace nsa::gpu
