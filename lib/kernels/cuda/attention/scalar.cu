// Attention of one branch for any shape and type: scalar arithmetic in fp32.
//
// Tiling: one CTA takes a (row, group, tile of 16 heads) and a split of the spans of the row. K and V pass through
// shared memory in tiles of up to 32 tokens, widened to fp32, and every head of the tile uses them. Bytes: each K/V row
// once per 16 heads. Bound: shared-memory reads, one per multiply-add; the tuned kernels are bound by bytes.

#include "kernels/cuda/attention/online_softmax.cuh"
#include "kernels/cuda/attention/split_kv.cuh"
#include "kernels/cuda/attention/stages.cuh"

namespace nsa::gpu {

namespace {

constexpr int threads = 256;
constexpr int warps = threads / 32;

struct ScalarParams {
  AttendArgs a;
  std::int64_t pitch;  // of the raw scores
  int splits, shared_tile_tokens;
  unsigned* arrivals;
};

// Shared memory of a CTA, offsets in floats. K rows are padded by one float so that tokens fall into different banks.
struct ScalarLayout {
  int q, k, v, p, o, total;
  __host__ __device__ ScalarLayout(int d_k, int d_v, int shared_tile_tokens) {
    q = 0;
    k = q + heads_per_tile * d_k;
    v = k + shared_tile_tokens * (d_k + 1);
    p = v + shared_tile_tokens * d_v;
    o = p + heads_per_tile * 32;
    total = o + heads_per_tile * d_v;
  }
};

template <class T, Branch B>
struct ScalarCta {
  const ScalarParams& p;
  const LayerShape& s;
  float *q, *k, *v, *prob, *o;  // shared
  int heads;                    // of this tile
  std::int64_t row, group, first_head, plane, t;
  SoftmaxState<Natural> total[heads_per_tile / warps],
      segment_sum[heads_per_tile / warps];  // of heads warp, warp + warps; the same in all lanes
  std::int64_t count = 0;

  // Scores of tokens [begin, begin + count) of chunk c (win: of their own chunks), and P V unless `halo`.
  __device__ void tile(std::int64_t c, std::int64_t begin, int tokens, bool halo);
  __device__ void tokens(std::int64_t c, std::int64_t begin, std::int64_t end, bool halo) {
    for (; begin < end; begin += p.shared_tile_tokens) {
      const std::int64_t rest = end - begin;
      tile(c, begin, static_cast<int>(rest < p.shared_tile_tokens ? rest : p.shared_tile_tokens), halo);
    }
  }
  __device__ void compressed(int split);
  __device__ void chosen(int split);
  __device__ void window(int split);
  __device__ void load(const KvView& view, std::int64_t c, std::int64_t begin, int tokens, float* to, int pitch);
  __device__ void finish(int split);
};

template <class T, Branch B>
__device__ void ScalarCta<T, B>::load(const KvView& view, std::int64_t c, std::int64_t begin, int n, float* to,
                                      int pitch) {
  const int lane = threadIdx.x % 32;
  for (int token = threadIdx.x / 32; token < n; token += warps) {
    const std::int64_t i = begin + token;
    if (B == win && !has_row(view.map, i)) continue;
    const T* from =
        static_cast<const T*>(view.data) + (B == win ? offset_of(view, plane, i) : offset_in_chunk(view, plane, c, i));
    for (int e = lane; e < view.width; e += 32) to[token * pitch + e] = to_float(from[e]);
  }
}

template <class T, Branch B>
__device__ void ScalarCta<T, B>::tile(std::int64_t c, std::int64_t begin, int n, bool halo) {
  const int d_k = s.d_k, d_v = s.d_v, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool has_pv = !halo && !(B == cmp && p.a.scores_only);
  const float scale = 1.0f / sqrtf(static_cast<float>(d_k));
  __syncthreads();
  load(p.a.k, c, begin, n, k, d_k + 1);
  if (has_pv) load(p.a.v, c, begin, n, v, d_v);
  __syncthreads();
  for (int i = 0; i < heads_per_tile / warps; ++i) {
    const int head = warp + i * warps;
    if (head >= heads) break;
    const bool in_cache = lane < n && (B != win || has_row(p.a.k.map, begin + lane));
    float score = -INFINITY;
    if (in_cache) {
      float dot = 0.0f;
      for (int e = 0; e < d_k; ++e) dot += q[head * d_k + e] * k[lane * (d_k + 1) + e];
      score = dot * scale;
      if (B == cmp) {
        const std::int64_t column = score_column(p.a.k.map, c, begin + lane);
        static_cast<float*>(p.a.scores)[(row * s.heads() + first_head + head) * p.pitch + column] = score * log2_e;
      }
    }
    if (head == 0 && !halo) count += __popc(__ballot_sync(0xffffffffu, in_cache));
    if (halo) continue;
    const float row_max = warp_max(score);
    if (B == cmp) segment_sum[i] = merge(segment_sum[i], {row_max, warp_sum(exp_shifted(score, row_max))});
    if (!has_pv) continue;
    const float m = fmaxf(total[i].m, row_max), scale_prev = exp_shifted(total[i].m, m),
                prob_of_lane = exp_shifted(score, m);
    total[i] = {m, total[i].s * scale_prev + warp_sum(prob_of_lane)};
    prob[head * 32 + lane] = prob_of_lane;
    for (int e = lane; e < d_v; e += 32) o[head * d_v + e] *= scale_prev;
  }
  if (!has_pv) return;
  __syncthreads();
  for (int item = threadIdx.x; item < heads * d_v; item += threads) {
    const int head = item / d_v, e = item % d_v;
    float sum = o[item];
    for (int token = 0; token < n; ++token)
      // A token that this rank does not hold has P = 0 and was not loaded.
      if (B != win || prob[head * 32 + token] > 0.0f) sum += prob[head * 32 + token] * v[token * d_v + e];
    o[item] = sum;
  }
}

// A span is an LSE bucket x: its segments one after the other, so one CTA forms the (m, s) of a bucket in one order.
template <class T, Branch B>
__device__ void ScalarCta<T, B>::compressed(int split) {
  const RowMap& map = p.a.k.map;
  const std::int64_t n = compressed_tokens(s.rules, t), rows = p.a.tile.rows();
  const bool sharded = map.rank != all_ranks && map.kv > 1;
  const int kv = sharded ? map.kv : 1, local_buckets = s.lse.buckets / kv;
  const int halo_rows = map.rank != all_ranks && map.chunk != INT64_MAX ? map.halo : 0;
  for (int bucket = split; bucket < local_buckets; bucket += p.splits) {
    SoftmaxState<Natural> bucket_total[heads_per_tile / warps];
    const std::int64_t x = std::int64_t{bucket} * kv + (sharded ? map.rank : 0);
    for (std::int64_t c = x; c * s.lse.segment - halo_rows < n; c += s.lse.buckets) {
      const std::int64_t begin = c * s.lse.segment, end = begin + s.lse.segment < n ? begin + s.lse.segment : n;
      const std::int64_t chunk = chunk_of(map, begin);
      if (halo_rows > 0 && c > 0) tokens(chunk, begin - halo_rows, begin < n ? begin : n, true);
      for (auto& l : segment_sum) l = {};
      tokens(chunk, begin, end, false);
      for (int i = 0; i < heads_per_tile / warps; ++i) bucket_total[i] = merge(bucket_total[i], segment_sum[i]);
    }
    if (threadIdx.x % 32 != 0) continue;
    for (int i = 0; i < heads_per_tile / warps; ++i) {
      const int head = threadIdx.x / 32 + i * warps;
      if (head >= heads) break;
      float* ms = p.a.lse + ((bucket * rows + row) * s.heads() + first_head + head) * 2;
      ms[0] = bucket_total[i].m;
      ms[1] = bucket_total[i].s;
    }
  }
}

template <class T, Branch B>
__device__ void ScalarCta<T, B>::chosen(int split) {
  const std::int32_t* blocks = p.a.selected + (row * s.groups + group) * s.rules.n_sel;
  for (int i = split; i < s.rules.n_sel; i += p.splits) {
    const std::int64_t begin = std::int64_t{blocks[i]} * s.rules.l_sel;
    if (begin < 0) break;
    const std::int64_t c = chunk_of(p.a.k.map, begin), end = begin + s.rules.l_sel;
    if (has_chunk(p.a.k.map, c)) tokens(c, begin, end < t + 1 ? end : t + 1, false);
  }
}

template <class T, Branch B>
__device__ void ScalarCta<T, B>::window(int split) {
  for (std::int64_t begin = window_begin(s.rules, t) + std::int64_t{split} * window_span; begin <= t;
       begin += std::int64_t{p.splits} * window_span)
    tokens(0, begin, begin + window_span < t + 1 ? begin + window_span : t + 1, false);
}

// Stores the partial; the last CTA of the row merges the partials of its splits.
template <class T, Branch B>
__device__ void ScalarCta<T, B>::finish(int split) {
  const int d_v = s.d_v, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int tiles = (s.heads_per_group + heads_per_tile - 1) / heads_per_tile;
  const std::int64_t work_item = (row * s.groups + group) * tiles + blockIdx.y;
  const std::int64_t partial_stride = std::int64_t{heads_per_tile} * (d_v + 2);
  float* partials = static_cast<float*>(p.a.scratch) + work_item * p.splits * partial_stride;
  float* out_o = p.a.out.o + (row * s.heads() + first_head) * d_v;
  float* out_ms = p.a.out.ms + (row * s.heads() + first_head) * 2;
  float* to_o = p.splits == 1 ? out_o : partials + split * partial_stride;
  float* to_ms = p.splits == 1 ? out_ms : to_o + heads_per_tile * d_v;
  __syncthreads();
  for (int item = threadIdx.x; item < heads * d_v; item += threads) to_o[item] = o[item];
  for (int i = 0; i < heads_per_tile / warps; ++i) {
    const int head = warp + i * warps;
    if (lane != 0 || head >= heads) break;
    to_ms[head * 2] = total[i].m;
    to_ms[head * 2 + 1] = total[i].s;
  }
  if (p.splits == 1 || !arrives_last(&p.arrivals[work_item], p.splits)) return;
  for (int item = threadIdx.x; item < heads * d_v; item += threads) {
    const int head = item / d_v;
    SoftmaxState<Natural> sum;
    float value = 0.0f;
    for (int other = 0; other < p.splits; ++other) {
      const float* ms = partials + other * partial_stride + heads_per_tile * d_v + head * 2;
      const SoftmaxState<Natural> next = {__ldcg(ms), __ldcg(ms + 1)}, both = merge(sum, next);
      value = value * Natural::scale(sum.m, both.m) +
              __ldcg(partials + other * partial_stride + item) * Natural::scale(next.m, both.m);
      sum = both;
    }
    out_o[item] = value;
    if (item % d_v == 0) {
      out_ms[head * 2] = sum.m;
      out_ms[head * 2 + 1] = sum.s;
    }
  }
}

template <class T, Branch B>
__global__ void __launch_bounds__(threads) scalar_kernel(const __grid_constant__ ScalarParams p) {
  extern __shared__ float shared[];
  const LayerShape& s = p.a.shape;
  const ScalarLayout offsets(s.d_k, s.d_v, p.shared_tile_tokens);
  const int split = blockIdx.x % p.splits;
  const std::int64_t work_item = blockIdx.x / p.splits;
  ScalarCta<T, B> cta{
      p, s, shared + offsets.q, shared + offsets.k, shared + offsets.v, shared + offsets.p, shared + offsets.o};
  cta.row = work_item / s.groups;
  cta.group = work_item % s.groups;
  cta.heads = min(heads_per_tile, s.heads_per_group - static_cast<int>(blockIdx.y) * heads_per_tile);
  cta.first_head = cta.group * s.heads_per_group + blockIdx.y * heads_per_tile;
  const TileRow tile = tile_row(p.a.tile, cta.row);
  cta.t = tile.t;
  cta.plane = (p.a.tile.batch_begin + tile.sequence) * s.groups + cta.group;
  const T* q = static_cast<const T*>(p.a.q) + (cta.row * s.heads() + cta.first_head) * s.d_k;
  for (int item = threadIdx.x; item < cta.heads * s.d_k; item += threads) cta.q[item] = to_float(q[item]);
  for (int item = threadIdx.x; item < cta.heads * s.d_v; item += threads) cta.o[item] = 0.0f;
  if constexpr (B == cmp) cta.compressed(split);
  if constexpr (B == sel) cta.chosen(split);
  if constexpr (B == win) cta.window(split);
  if (threadIdx.x == 0 && blockIdx.y == 0 && cta.count > 0)  // warp 0 counted, with head 0
    atomicAdd(reinterpret_cast<unsigned long long*>(p.a.reads) + tile.sequence * s.groups + cta.group,
              static_cast<unsigned long long>(cta.count));
  cta.finish(split);
}

template <Branch B>
void launch(const AttendArgs& a, Stream* stream) {
  ScalarParams p{a, 0, 1, 32, arrival_counters(B)};
  if (B == cmp) p.pitch = score_pitch(a.k.map, compressed_tokens(a.shape.rules, a.tile.max_positions - 1));
  p.splits = splits_of(a.shape, a.tile, max_bucket_spans(B, a.shape, a.k.map));
  while (p.shared_tile_tokens > 1 &&
         ScalarLayout(a.shape.d_k, a.shape.d_v, p.shared_tile_tokens).total * sizeof(float) >
             limits().shared_bytes - 1024)
    p.shared_tile_tokens /= 2;
  const std::size_t shared = ScalarLayout(a.shape.d_k, a.shape.d_v, p.shared_tile_tokens).total * sizeof(float);
  const dim3 grid(static_cast<unsigned>(a.tile.rows() * a.shape.groups * p.splits), head_tiles(a.shape));
  with_type(a.shape.dtype, [&](auto type) {
    auto* kernel = scalar_kernel<decltype(type), B>;
    allow_shared(kernel, shared);
    kernel<<<grid, threads, shared, cuda(stream)>>>(p);
  });
  check_launch("attend");
}

}  // namespace

void attend_general(Branch branch, const AttendArgs& a, Stream* stream) {
  if (a.tile.rows() == 0) return;
  if (branch == cmp)
    launch<cmp>(a, stream);
  else if (branch == sel)
    launch<sel>(a, stream);
  else
    launch<win>(a, stream);
}

}  // namespace nsa::gpu
