// The kernels of attention by matrix products (attention/sdpa/gemm.cu): packing of K and V, softmax.
//
// Bytes: pack reads and writes each K and V row once, 16 bytes a thread; softmax reads 4 bytes a score twice (the
// second time from the L2) and writes one element of storage type. Bound: memory bandwidth, for few rows the launch.

#include "kernels/cuda/attention/online_softmax.cuh"
#include "kernels/cuda/attention/sdpa/gemm.cuh"

namespace nsa::gpu {

namespace {

constexpr int threads = 256;
constexpr int warps = threads / 32;
constexpr int pack_columns = 32;  // columns of a CTA

struct Column {
  std::int64_t token;  // -1: none
  bool halo;           // scored here, attended by another rank
};

// has_row() without its divisions where the cache is not cut.
__device__ bool holds(const RowMap& map, std::int64_t i) {
  return (map.chunk == INT64_MAX && map.ring == 0) || has_row(map, i);
}

__device__ Column column_at(const SdpaJob& p, const std::int32_t* selected_blocks, std::int64_t t, std::int64_t j) {
  const RowMap& map = p.a.k.map;
  const BlockRules& r = p.a.shape.rules;
  if (p.source == Source::selected_blocks) {
    const unsigned at = static_cast<unsigned>(j), l = static_cast<unsigned>(r.l_sel);
    const std::int64_t block = selected_blocks[at / l], i = block * r.l_sel + at % l;
    return {block < 0 || i > t || !holds(map, i) ? -1 : i, false};
  }
  if (p.source == Source::whole) return {j, false};
  if (p.source == Source::window) {
    const std::int64_t row = p.own_kv ? 0 : p.first;  // the first of the job
    const std::int64_t last = p.a.tile.ragged() ? t : *p.a.tile.first_position + row;
    const std::int64_t i = (p.columns == p.a.tile.max_positions ? 0 : last + 1 - r.w) + j;
    return {i < 0 || i > t || !holds(map, i) ? -1 : i, false};
  }
  if (map.ring > 0) {
    const std::int64_t back = (t % map.ring - (map.slot_begin + j) + 2 * map.ring) % map.ring;
    return {t - back, false};  // negative: not written yet
  }
  if (map.chunk == INT64_MAX) return {j, false};
  const std::int64_t chunk = map.rank == all_ranks ? j / map.stride : j / map.stride * map.kv + map.rank;
  const std::int64_t at = j % map.stride - map.halo;
  return {at >= map.chunk ? -1 : chunk * map.chunk + at, at < 0};
}

// Whether the block is selected; `selected_blocks` is ascending and padded with -1.
__device__ bool is_selected(const std::int32_t* selected_blocks, int n, std::int64_t block) {
  int low = 0, high = n;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (selected_blocks[middle] < 0 || selected_blocks[middle] >= block)
      high = middle;
    else
      low = middle + 1;
  }
  return low < n && selected_blocks[low] == block;
}

template <Branch B>
__device__ bool attends(const SdpaJob& p, const std::int32_t* selected_blocks, std::int64_t t, std::int64_t n,
                        Column c) {
  const BlockRules& r = p.a.shape.rules;
  if (c.token < 0 || c.halo) return false;
  if (B == cmp) return c.token < n;
  if (B == win) return c.token <= t && c.token >= window_begin(r, t);
  return c.token <= t && (!p.masked || is_selected(selected_blocks, r.n_sel, c.token / r.l_sel));
}

__device__ const std::int32_t* selected_of(const SdpaJob& p, std::int64_t work_item) {
  return p.a.selected ? p.a.selected + work_item * p.a.shape.rules.n_sel : nullptr;
}

// Packs rows of K and V, V bytes at a time (16, or one element); zero where there is no token. A CTA takes pack_columns
// columns of a matrix. Selected tokens are counted here, where they are loaded.
template <class V>
__global__ void __launch_bounds__(threads) pack(const __grid_constant__ SdpaJob p, int storage) {
  const LayerShape& s = p.a.shape;
  const std::int64_t matrix = blockIdx.y, work_item = p.first + matrix;
  const TileRow row = tile_row(
      p.a.tile, p.own_kv ? work_item / s.groups : std::int64_t{p.sequence} * p.a.tile.tokens + p.a.tile.tokens - 1);
  const std::int64_t g = p.own_kv ? work_item % s.groups : p.g;
  const std::int64_t plane = (p.a.tile.batch_begin + row.sequence) * s.groups + g;
  const std::int32_t* selected_blocks = selected_of(p, work_item);
  __shared__ std::int64_t from[pack_columns][2];  // of K and V, elements; negative: none
  int counted = 0;
  if (threadIdx.x < pack_columns) {
    const std::int64_t j = std::int64_t{blockIdx.x} * pack_columns + threadIdx.x;
    const std::int64_t i = j < p.columns ? column_at(p, selected_blocks, row.t, j).token : -1;
    from[threadIdx.x][0] = i < 0 ? -1 : offset_of(p.a.k, plane, i);
    from[threadIdx.x][1] = i < 0 ? -1 : offset_of(p.a.v, plane, i);
    counted = i >= 0;
  }
  __syncthreads();
  const int of_k = s.d_k * storage / static_cast<int>(sizeof(V)), of_v = s.d_v * storage / static_cast<int>(sizeof(V));
  const std::int64_t first = std::int64_t{blockIdx.x} * pack_columns;
  const int here = static_cast<int>(min(std::int64_t{pack_columns}, p.columns - first));
  for (int item = threadIdx.x; item < here * (of_k + of_v); item += threads) {
    const int column = item / (of_k + of_v), at = item % (of_k + of_v);
    const bool value = at >= of_k;
    const int width = value ? of_v : of_k, e = value ? at - of_k : at;
    const char* data = static_cast<const char*>(value ? p.a.v.data : p.a.k.data);
    const std::int64_t row_at = from[column][value];
    V* to = static_cast<V*>(value ? p.v : p.k) + (matrix * p.columns + first + column) * width + e;
    *to = row_at < 0 ? V{} : reinterpret_cast<const V*>(data + row_at * storage)[e];
  }
  if (p.source != Source::selected_blocks) return;
  const int sum = __reduce_add_sync(0xffffffffu, counted);
  if (threadIdx.x % 32 == 0 && sum > 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(p.a.reads) + row.sequence * s.groups + g,
              static_cast<unsigned long long>(sum));
}

// Base of the softmax here: the exp2 domain with -inf for an empty row, because a row may attend nothing.
struct MaskedExp2 {
  static constexpr float empty_max = -INFINITY;
  static __device__ __forceinline__ float scale(float m, float m_new) { return exp2_fast(m - m_new); }
};
using State = SoftmaxState<MaskedExp2>;

// (m, sum) of one LSE segment by a warp: strips of 32 tokens by rising index, in every layout.
__device__ State segment_lse(const float* scores, std::int64_t begin, std::int64_t count) {
  State segment;
  for (std::int64_t at = 0; at < count; at += 32) {
    const std::int64_t i = at + threadIdx.x % 32;
    const float score = i < count ? scores[begin + i] : -INFINITY;
    const float m = warp_max(score), sum = warp_sum(score == -INFINITY ? 0.0f : exp2_fast(score - m));
    if (fmaxf(segment.m, m) > -INFINITY) segment = merge(segment, {m, sum});
  }
  return segment;
}

__device__ State merge_masked(State a, State b) {
  if (fmaxf(a.m, b.m) == -INFINITY) return {};
  return merge(a, b);
}

__device__ void write_sum(float* ms, State x) {
  ms[0] = x.s > 0.0f ? x.m / log2_e : -INFINITY;
  ms[1] = x.s;
}

// The LSE buckets of one (row, head), a warp each, and their merge by rising bucket.
__device__ State compressed_buckets(const SdpaJob& p, const float* scores, std::int64_t n, std::int64_t row,
                                    std::int64_t head, State* buckets) {
  const LayerShape& s = p.a.shape;
  const RowMap& map = p.a.k.map;
  const bool sharded = map.rank != all_ranks && map.kv > 1;
  const int kv = sharded ? map.kv : 1, local_buckets = s.lse.buckets / kv;
  for (int bucket_at = threadIdx.x / 32; bucket_at < local_buckets; bucket_at += warps) {
    State bucket;
    for (std::int64_t c = std::int64_t{bucket_at} * kv + (sharded ? map.rank : 0); c * s.lse.segment < n;
         c += s.lse.buckets) {
      const std::int64_t begin = c * s.lse.segment, end = begin + s.lse.segment < n ? begin + s.lse.segment : n;
      const std::int64_t column = sharded ? row_in_chunk(map, c, begin) : begin;
      bucket = merge_masked(bucket, segment_lse(scores, column, end - begin));
    }
    if (threadIdx.x % 32 != 0) continue;
    buckets[bucket_at] = bucket;
    if (!p.a.policy.recompute_scores)
      write_sum(p.a.lse + ((bucket_at * p.a.tile.rows() + row) * s.heads() + head) * 2, bucket);
  }
  __syncthreads();
  State total;
  for (int bucket_at = 0; bucket_at < local_buckets; ++bucket_at) total = merge_masked(total, buckets[bucket_at]);
  return total;
}

// Reduction over the CTA; all threads get the result. `neutral` is the neutral element.
template <class Reduce>
__device__ float over_cta(float x, float neutral, float* shared, Reduce reduce) {
  x = reduce(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  return reduce(threadIdx.x % 32 < warps ? shared[threadIdx.x % 32] : neutral);
}

// A CTA a (row, head): scores in the exp2 domain to P relative to their maximum, zero where masked. Shared memory: the
// LSE buckets of cmp.
template <class T, Branch B>
__global__ void __launch_bounds__(threads) softmax_kernel(const __grid_constant__ SdpaJob p) {
  extern __shared__ State buckets[];
  __shared__ float partial[warps];
  const LayerShape& s = p.a.shape;
  const std::int64_t item = blockIdx.x, j = blockIdx.y, work_item = p.first + item;
  const std::int64_t r = p.own_kv ? work_item / s.groups : std::int64_t{p.sequence} * p.a.tile.tokens + p.first + item;
  const std::int64_t g = p.own_kv ? work_item % s.groups : p.g;
  const std::int64_t head = g * s.heads_per_group + j;
  const TileRow row = tile_row(p.a.tile, r);
  const std::int32_t* selected_blocks = selected_of(p, r * s.groups + g);
  const std::int64_t n = B == cmp ? compressed_tokens(s.rules, row.t) : 0;
  const float* scores = p.scores + item * p.score_row + j * p.score_ld;
  // Masks of the first 64 columns of a thread are kept in a word; later ones are evaluated twice.
  const auto is_attended = [&](std::int64_t i) {
    return attends<B>(p, selected_blocks, row.t, n, column_at(p, selected_blocks, row.t, i));
  };
  std::uint64_t mask = 0;
  State total;
  if constexpr (B == cmp) {
    total = compressed_buckets(p, scores, n, r, head, buckets);
  } else {
    int k = 0;
    for (std::int64_t i = threadIdx.x; i < p.columns; i += threads, ++k) {
      if (!is_attended(i)) continue;
      if (k < 64) mask |= std::uint64_t{1} << k;
      total.m = fmaxf(total.m, scores[i]);
    }
    total.m = over_cta(total.m, -INFINITY, partial, [](float x) { return warp_max(x); });
  }
  T* prob = static_cast<T*>(p.prob) + (item * s.heads_per_group + j) * p.prob_ld;
  float sum = 0.0f, counted = 0.0f;
  int k = 0;
  for (std::int64_t i = threadIdx.x; i < p.columns; i += threads, ++k) {
    const bool here = B != cmp && k < 64 ? mask >> k & 1 : is_attended(i);
    const float p_element = here ? exp2_fast(scores[i] - total.m) : 0.0f;
    if (!p.a.scores_only) store(prob + i, p_element);
    sum += p_element;
    counted += here;
  }
  if constexpr (B != cmp) total.s = over_cta(sum, 0.0f, partial, [](float x) { return warp_sum(x); });
  if (j == 0 && p.source != Source::selected_blocks) {
    counted = over_cta(counted, 0.0f, partial, [](float x) { return warp_sum(x); });  // exact below 2^24 a thread
    if (threadIdx.x == 0 && counted > 0.0f)
      atomicAdd(reinterpret_cast<unsigned long long*>(p.a.reads) + row.sequence * s.groups + g,
                static_cast<unsigned long long>(counted));
  }
  if (threadIdx.x == 0 && (!p.a.scores_only || p.a.policy.recompute_scores))
    write_sum(p.a.out.ms + (r * s.heads() + head) * 2, total);
}

// A CTA a (row, head). In place, from the last row to the first: a column is never before its memory row.
__global__ void __launch_bounds__(threads) spread_kernel(const __grid_constant__ SdpaJob p) {
  float* scores = p.scores + blockIdx.x * p.score_row + blockIdx.y * p.score_ld;
  const RowMap& map = p.a.k.map;
  for (std::int64_t first = (p.columns - 1) / threads * threads; first >= 0; first -= threads) {
    const std::int64_t i = first + threadIdx.x;
    const float score = i < p.columns ? scores[i] : 0.0f;
    __syncthreads();
    if (i < p.columns)
      scores[i / map.stride * score_stride(map) + score_halo_columns(map) - map.halo + i % map.stride] = score;
    __syncthreads();
  }
}

template <Branch B>
void launch_softmax(const SdpaJob& p, Stream* stream) {
  const LayerShape& s = p.a.shape;
  const std::size_t buckets = B == cmp ? s.lse.buckets * sizeof(State) : 0;
  with_type(s.dtype, [&](auto type) {
    auto* kernel = softmax_kernel<decltype(type), B>;
    allow_shared(kernel, buckets);
    kernel<<<dim3(static_cast<unsigned>(p.count), s.heads_per_group), threads, buckets, cuda(stream)>>>(p);
  });
  check_launch("softmax_kernel");
}

}  // namespace

void gather(const SdpaJob& p, std::int64_t matrices, Stream* stream) {
  const LayerShape& s = p.a.shape;
  const int storage = static_cast<int>(size_of(s.dtype));
  const dim3 grid(static_cast<unsigned>((p.columns + pack_columns - 1) / pack_columns),
                  static_cast<unsigned>(matrices));
  if (s.d_k * storage % 16 == 0 && s.d_v * storage % 16 == 0)
    pack<uint4><<<grid, threads, 0, cuda(stream)>>>(p, storage);
  else
    pack<unsigned short><<<grid, threads, 0, cuda(stream)>>>(p, storage);
  check_launch("pack");
}

void spread_scores(const SdpaJob& p, Stream* stream) {
  spread_kernel<<<dim3(static_cast<unsigned>(p.count), p.a.shape.heads_per_group), threads, 0, cuda(stream)>>>(p);
  check_launch("spread_kernel");
}

void softmax(Branch branch, const SdpaJob& p, Stream* stream) {
  if (branch == cmp)
    launch_softmax<cmp>(p, stream);
  else if (branch == sel)
    launch_softmax<sel>(p, stream);
  else
    launch_softmax<win>(p, stream);
}

}  // namespace nsa::gpu
