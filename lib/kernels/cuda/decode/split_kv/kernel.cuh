#pragma once
// Attention of decode: one query row a sequence, every K and V row read once per 16 query heads (fp32: 4).
//
// Bytes: those rows; scores, parts and LSE are 4% to 12% beside them at Dk = Dv = 128. Bound: memory bandwidth; at
// small batch the latency of loads, meetings and launches. Tiling: a list is a (row, group, head tile); its units (LSE
// leaves, chosen blocks, runs of 64 window rows) are dealt to the warps of its CTAs, and each warp attends its units
// alone, 32 tokens at a time (decode/split_kv/warp_tile.cuh) out of a ring of its own (primitives/cp_async_ring.cuh):
// 192 KB under way an SM, no barrier before the CTA's warps meet in shared memory at the end. The CTAs of a list meet
// in global memory: DecodeEnd says how.
//
// Leaves: (m, sum) of 32 tokens by one warp in one order, a leaf's tiles by rising tile, a lane's leaves by rising
// leaf. None of it depends on the split or on the layout, so every kv layout gets the same bits. Scores, and maxima
// while they are in here, count in powers of two: log2(e) is folded into the scale.

#include "kernels/cuda/decode/split_kv/warp_tile.cuh"

namespace nsa::gpu {

// One CTA's share of one branch.
template <class E, Branch B>
struct Walk {
  using T = typename E::Type;
  using Layout = DecodeLayout<E>;
  const DecodeParams& p;
  const DecodeJob& job;
  const LayerShape& s;
  char* shared;
  Tiles<B> tiles;
  const char *k, *v;  // of the plane
  int warp, split, list, row, group, head0, present, step;
  // Copies run ahead: what comes next is V (`of_values`) or K of tile `ahead`.
  Unit next;
  int ahead, slot, count;
  bool of_values, weighs;
  unsigned ring, fronts;
  bool has_fronts;  // the one row in front of a chunk comes with its first tile
  std::uint64_t policy, scores_policy;

  __device__ __forceinline__ Walk(const DecodeParams& params, const DecodeJob& the_job, char* memory, int row_group,
                                  int the_split)
      : p(params),
        job(the_job),
        s(params.shape),
        shared(memory),
        tiles(s, job.k.map, *params.tile.first_position),
        split(the_split),
        slot(0),
        count(0),
        of_values(false) {
    warp = threadIdx.x / 32;
    row = row_group / s.groups;
    group = row_group % s.groups;
    list = row_group * p.head_tiles + blockIdx.y;
    head0 = row * s.heads() + group * s.heads_per_group + blockIdx.y * E::heads;
    present = min(E::heads, s.heads_per_group - static_cast<int>(blockIdx.y) * E::heads);
    const std::int64_t plane = (p.tile.batch_begin + row) * s.groups + group;
    k = static_cast<const char*>(job.k.data) + plane * job.k.plane_stride * sizeof(T);
    v = static_cast<const char*>(job.v.data) + plane * job.v.plane_stride * sizeof(T);
    policy = cache_policy(p.keeps_scores ? CacheHint::evict_first : CacheHint::evict_normal);
    scores_policy = cache_policy(CacheHint::evict_last);
    ring = shared_address(shared) + warp * Layout::ring_bytes;
    fronts = shared_address(shared) + Layout::fronts + warp * Layout::slots * E::k_bytes;
    has_fronts = B == cmp && shards_of(job.k.map) > 1 && job.k.map.halo == 1;
    weighs = !(B == cmp && p.scores_only);
    step = job.splits * decode_warps;
    ahead = first();
    if constexpr (B == sel) {
      auto* mine = reinterpret_cast<std::int32_t*>(shared + Layout::blocks);
      for (int i = threadIdx.x; i < s.rules.n_sel; i += decode_threads)
        mine[i] = p.selected[std::int64_t{row_group} * s.rules.n_sel + i];
      tiles.selected = mine;
      __syncthreads();
    }
    find_next();
  }

  __device__ __forceinline__ int first() const { return split * decode_warps + warp; }
  // Tile i is its chunk's first, and not the sequence's. A chunk may have that row and no token yet.
  __device__ __forceinline__ bool has_front(int i) const {
    return has_fronts && (tiles.per_unit == 2 ? i % 2 : i % tiles.per_unit) == 0 && (i > 0 || job.k.map.rank > 0);
  }
  __device__ __forceinline__ void find_next() {  // `ahead` or the first tile behind it that has something to read
    for (; ahead < tiles.count; ahead += step) {
      next = tiles(ahead);
      if (next.count > 0 || has_front(ahead)) break;
    }
  }

  template <int RowBytes>
  __device__ __forceinline__ void copy(unsigned to, const char* plane, const KvView& view) const {
    const char* from = plane + next.owner * view.rank_stride * sizeof(T) + next.row * RowBytes;
    cp_async_tile<RowBytes>(to, from, next.count, policy);
  }
  // Queues what comes next into a slot that is free now.
  __device__ __forceinline__ void feed(int which) {
    const unsigned to = ring + which * Layout::slot_bytes;
    if (ahead < tiles.count) {
      if (!of_values && has_front(ahead))
        cp_async_row<E::k_bytes>(fronts + which * E::k_bytes, k + (next.row - 1) * E::k_bytes);
      if (E::k_bytes == E::v_bytes)
        copy<E::k_bytes>(to, of_values ? v : k, of_values ? job.v : job.k);
      else if (of_values)
        copy<E::v_bytes>(to, v, job.v);
      else
        copy<E::k_bytes>(to, k, job.k);
      of_values = weighs && !of_values;
      if (!of_values) {
        ahead += step;
        find_next();
      }
    }
    cp_async_commit();
  }
  __device__ __forceinline__ void start() {
#pragma unroll 1
    for (int i = 0; i < Layout::slots; ++i) feed(i);
  }
  // The slot filled longest ago, whole; then it goes back.
  template <class Use>
  __device__ __forceinline__ void take(Use use) {
    cp_async_wait<Layout::slots - 1>();
    use(ring + slot * Layout::slot_bytes);
    __syncwarp();
    feed(slot);
    slot = slot + 1 == Layout::slots ? 0 : slot + 1;
  }

  __device__ __forceinline__ ScoreRows scores_at(std::int64_t column) const {
    return {p.scores + head0 * p.pitch + column, p.pitch, p.keeps_scores, scores_policy};
  }

  __device__ __forceinline__ void put_front(const E& e, int i, std::int64_t column) const {
    const unsigned row = fronts + slot * E::k_bytes;
    if (p.sums.memory)
      e.put_front(p.sums.fronts(list, i), row);
    else
      e.put_front(scores_at(column), row, present);
  }
  // With what rank reads of the i-th tile. The last tile of a leaf has no next one here: a chunk brings its own front.
  __device__ __forceinline__ void soften(E& e, int i, const Unit& now) const {
    if (B == cmp && p.sums.memory) {
      const SumRows rows{p.sums.sums(list, i), has_front(i + 1) ? nullptr : p.sums.fronts(list, i + 1), p.keeps_scores,
                         scores_policy};
      e.put_last(rows, now.count);
      e.soften(now.count, rows);
      e.put_maxima(p.sums.maxima(list, i), rows);
    } else {
      if constexpr (B == cmp) e.put_scores(scores_at(now.column), now.count, present);
      e.soften(now.count);
    }
  }

  __device__ __forceinline__ void walk(E& e) {
#pragma unroll 1
    for (int i = first(); i < tiles.count; i += step) {
      const Unit now = tiles(i);
      float2* sums = B == cmp ? p.leaves + (list * p.most_tiles + i) * E::heads : nullptr;
      if (now.count <= 0 && !has_front(i)) {
        if (B == cmp && threadIdx.x % 32 < E::heads) sums[threadIdx.x % 32] = make_float2(neg_inf, 0.0f);
        continue;
      }
      take([&](unsigned from) {
        if (has_front(i)) put_front(e, i, now.column);
        e.scores(from);
      });
      e.scale();
      soften(e, i, now);
      if constexpr (B == cmp) e.put_tile(sums);
      if (weighs) take([&](unsigned from) { e.add(from); });
      count += now.count;
    }
  }

  // Copies in front of a chunk, where they are several: scored for its first block, neither attended nor counted.
  __device__ __forceinline__ void score_halos(E& e) {
    const RowMap& map = job.k.map;
    for (int i = first(); i < tiles.count / tiles.per_unit; i += step) {
      const std::int64_t c = leaf_at(map, i), begin = c * map.chunk - map.halo;
      if (c == 0) continue;
      const std::int64_t from = row_in_chunk(map, c, begin), column = score_column(map, c, begin);
      const int rows = at_most(tiles.n - begin, map.halo);
      for (int at = 0; at < rows; at += tile_rows) {
        const int here = min(tile_rows, rows - at);
        __syncwarp();
        cp_async_tile<E::k_bytes>(ring, k + (from + at) * E::k_bytes, here);
        cp_async_commit();
        cp_async_wait<0>();
        e.scores(ring);
        e.scale();
        e.put_scores(scores_at(column + at), here, present);
      }
    }
  }

  // o and (m, sum) of the CTA's warps, brought to the common maximum and added up. All threads.
  __device__ __forceinline__ void put_part(const E& e) const {
    constexpr int pitch = E::d_v + 8;
    float* o = reinterpret_cast<float*>(shared);
    float2* ms = reinterpret_cast<float2*>(o + decode_warps * E::heads * pitch);
    float* part = job.parts + (std::int64_t{list} * job.splits + split) * decode_part_floats(E::heads, E::d_v);
    __syncthreads();  // the rings are empty
    e.put_total(ms + warp * E::heads);
    __syncthreads();
    const auto top = [&](int head) {
      float m = neg_inf;
#pragma unroll
      for (int w = 0; w < decode_warps; ++w) m = fmaxf(m, ms[w * E::heads + head].x);
      return m;
    };
    e.put_values(o + warp * E::heads * pitch, [&](int head, float m) { return exp2_fast(m - top(head)); });
    if (static_cast<int>(threadIdx.x) < E::heads) {
      const int head = threadIdx.x;
      const float m = top(head);
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < decode_warps; ++w) {
        const float2 x = ms[w * E::heads + head];
        sum += x.y * exp2_fast(x.x - m);
      }
      reinterpret_cast<float2*>(part + E::heads * E::d_v)[head] = make_float2(m, sum);
    }
    __syncthreads();
    for (int item = threadIdx.x; item < present * (E::d_v / 4); item += decode_threads) {
      const int head = item / (E::d_v / 4), column = item % (E::d_v / 4) * 4;
      float4 sum = {};
#pragma unroll
      for (int w = 0; w < decode_warps; ++w) {
        const float4 x = *reinterpret_cast<const float4*>(o + (w * E::heads + head) * pitch + column);
        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
      }
      reinterpret_cast<float4*>(part)[item] = sum;
    }
  }

  // The list's lanes, each by rising leaf, a leaf by rising tile. The tiles' sums go through shared memory where they
  // fit, so that the chain of merges waits for memory once.
  __device__ __forceinline__ void merge_lanes() const {
    const float2* sums = p.leaves + list * p.most_tiles * E::heads;
    const int pairs = tiles.count * E::heads / 2;
    if (pairs * static_cast<int>(sizeof(float4)) > Layout::queries)
      return merge_lanes_of([&](int i) { return __ldcg(sums + i); });
    auto* staged = reinterpret_cast<float4*>(shared);
#pragma unroll 8
    for (int i = threadIdx.x; i < pairs; i += decode_threads)
      staged[i] = __ldcg(reinterpret_cast<const float4*>(sums) + i);
    __syncthreads();
    merge_lanes_of([&](int i) { return reinterpret_cast<const float2*>(shared)[i]; });
  }
  template <class Load>
  __device__ __forceinline__ void merge_lanes_of(Load load) const {
    const int slots = s.lse.buckets / shards_of(job.k.map), leaves = tiles.count / tiles.per_unit;
    const std::int64_t row_heads = p.tile.rows() * s.heads();
    for (int item = threadIdx.x; item < slots * E::heads; item += decode_threads) {
      const int lane = item / E::heads, head = item % E::heads;
      if (head >= present) continue;
      Sum2 sum;
      for (int i = lane; i < leaves; i += slots) {
        Sum2 leaf;
        for (int j = i * tiles.per_unit; j < (i + 1) * tiles.per_unit; ++j) {
          const float2 part = load(j * E::heads + head);
          leaf = merge2(leaf, {part.x, part.y});
        }
        sum = merge2(sum, leaf);
      }
      reinterpret_cast<float2*>(p.lse)[lane * row_heads + head0 + head] = to_natural_log(sum);
    }
  }

  // The list's parts, by rising split, to the row's partial.
  __device__ __forceinline__ void merge_parts() const {
    const std::int64_t part_floats = decode_part_floats(E::heads, E::d_v);
    const float* first = job.parts + std::int64_t{list} * job.splits * part_floats;
    for (int item = threadIdx.x; item < present * (E::d_v / 4); item += decode_threads) {
      const int head = item / (E::d_v / 4);
      Sum2 sum;
      float4 value = {};
#pragma unroll 8
      for (int i = 0; i < job.splits; ++i) {
        const float* part = first + i * part_floats;
        const float2 ms = __ldcg(reinterpret_cast<const float2*>(part + E::heads * E::d_v) + head);
        const float4 x = __ldcg(reinterpret_cast<const float4*>(part) + item);
        const float m = fmaxf(sum.m, ms.x), old = exp2_fast(sum.m - m), fresh = exp2_fast(ms.x - m);
        sum = {m, sum.s * old + ms.y * fresh};
        value.x = value.x * old + x.x * fresh, value.y = value.y * old + x.y * fresh;
        value.z = value.z * old + x.z * fresh, value.w = value.w * old + x.w * fresh;
      }
      reinterpret_cast<float4*>(p.out.o + std::int64_t{head0} * E::d_v)[item] = value;
      if (item % (E::d_v / 4) == 0) reinterpret_cast<float2*>(p.out.ms)[head0 + head] = to_natural_log(sum);
    }
  }

  __device__ __forceinline__ void finish() const {
    if (p.end == DecodeEnd::parts || (p.end == DecodeEnd::lanes && B != cmp)) return;
    if (job.splits > 1 && !arrives_last(&p.arrivals[list], job.splits)) return;
    __syncthreads();
    if (p.end == DecodeEnd::merge) merge_parts();
    if constexpr (B == cmp) merge_lanes();
  }
};

template <class E, Branch B>
__device__ __forceinline__ void run(const DecodeParams& p, const DecodeJob& job, char* shared, int at, bool first) {
  using Layout = DecodeLayout<E>;
  const bool some = job.ctas > job.splits;
  const int ctas = some ? job.ctas : job.splits, split = some ? ctas - 1 - at % ctas : at % ctas;
  Walk<E, B> walk(p, job, shared, at / ctas, split);
  if (first)  // the jobs of a CTA have their queries in common
    E::fill_queries(shared + Layout::queries,
                    static_cast<const typename E::Type*>(p.q) + std::int64_t{walk.head0} * E::d_k, walk.present,
                    threadIdx.x, decode_threads);
  walk.start();
  __syncthreads();
  E engine(shared + Layout::queries, shared + Layout::weights + walk.warp * E::weight_bytes);
  walk.walk(engine);
  if (B == cmp && shards_of(job.k.map) > 1 && job.k.map.halo > 1) walk.score_halos(engine);
  if (threadIdx.x % 32 == 0 && blockIdx.y == 0 && walk.count > 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(job.reads) + walk.row * p.shape.groups + walk.group,
              static_cast<unsigned long long>(walk.count));
  if (walk.weighs || p.end == DecodeEnd::merge) walk.put_part(engine);
  walk.finish();
  __syncthreads();
}

template <class E>
__global__ void __launch_bounds__(decode_threads, E::ctas) decode_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(128) char shared[];
  griddep_wait();
  const int row_groups = static_cast<int>(p.tile.rows()) * p.shape.groups;
  bool first = true;
  for (int i = 0; i < p.job_count; ++i) {
    const DecodeJob& job = p.jobs[i];
    const int at = static_cast<int>(blockIdx.x) - job.first_cta;
    if (at < 0 || at >= row_groups * max(job.ctas, job.splits)) continue;
    if (job.ctas - 1 - at % max(job.ctas, 1) >= job.splits) continue;
    if (job.branch == cmp)
      run<E, cmp>(p, job, shared, at, first);
    else if (job.branch == sel)
      run<E, sel>(p, job, shared, at, first);
    else
      run<E, win>(p, job, shared, at, first);
    first = false;
  }
}

template <class E>
void launch_engine(const DecodeParams& p, Stream* stream) {
  int ctas = 0;
  for (int i = 0; i < p.job_count; ++i)
    ctas = std::max(ctas, p.jobs[i].first_cta + static_cast<int>(p.tile.rows()) * p.shape.groups *
                                                    std::max(p.jobs[i].ctas, p.jobs[i].splits));
  launch_pdl(decode_kernel<E>, dim3(ctas, p.head_tiles), decode_threads, DecodeLayout<E>::bytes(p.shape), stream, 1, p);
}

}  // namespace nsa::gpu
