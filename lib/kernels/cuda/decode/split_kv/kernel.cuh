#pragma once
// Split-KV attention of decode: every K and V row read once per query row and 16 query heads (fp32: 4). Query tokens of
// a sequence are rows of their own, next to one another, so that K and V come to them through the L2.
//
// Bytes: those rows; scores, partials and LSE add 4% to 12% at Dk = Dv = 128. Bound: memory bandwidth; at small batch
// the latency of loads, merges and launches. Tiling: a work item is a (row, group, head tile). Its spans (LSE segments,
// selected blocks, runs of 64 window rows) are dealt to the warps of its CTAs. Each warp attends its spans alone, in KV
// tiles of 32 rows (decode/split_kv/warp_tile.cuh) from its own ring (primitives/cp_async_ring.cuh): 192 KB in flight
// an SM and no barrier before the warps of the CTA merge in shared memory. The partials of CTAs go to global memory: a
// later launch merges them, or the last CTA of the work item (DecodeEpilogue::merge_all). Where tiles are dealt by
// length (attention/tile_schedule.cuh), a CTA takes the tiles of its share, one work item after another, and stores a
// partial for each.
//
// LSE: (m, sum) of 32 tokens by one warp in one order; a segment merges its tiles by rising tile, a bucket its segments
// by rising segment. This order depends neither on the split nor on the layout, so every kv layout gets the same bits.
// Scores and maxima are in the exp2 domain inside the kernel: log2(e) is folded into the scale.

#include "kernels/cuda/attention/online_softmax.cuh"
#include "kernels/cuda/decode/split_kv/warp_tile.cuh"

namespace nsa::gpu {

// Tiles first, first + step, ... below `end` of a (row, group), for warp 0 of a CTA; and the number of their partial.
struct TileShare {
  int row_group, first, end, step;
  std::int64_t partial;
};

// The shares of a CTA in a job, `at` of its CTAs: one split of one work item, or what the schedule deals to it. All
// threads.
struct ShareCursor {
  const DecodeParams& p;
  const DecodeJob& job;
  TileShare share;
  int tile, end, row;  // dealt: the next tile, one past the last, the row that may hold it
  bool dealt;

  __device__ __forceinline__ ShareCursor(const DecodeParams& params, const DecodeJob& of, int at)
      : p(params), job(of), tile(0), end(1), row(0), dealt(of.schedule.tiles_before != nullptr) {
    if (dealt)
      start_dealt(at);
    else
      start_split(at);
  }
  __device__ __forceinline__ bool next() {
    if (tile >= end) return false;
    if (dealt)
      next_dealt();
    else
      tile = end;
    return true;
  }

 private:
  __device__ __forceinline__ void start_split(int at) {
    const bool has_idle_ctas = job.ctas > job.splits;
    const int ctas = has_idle_ctas ? job.ctas : job.splits, split = has_idle_ctas ? ctas - 1 - at % ctas : at % ctas;
    const int row_group = at / ctas, work_item = row_group * p.head_tiles + blockIdx.y;
    share = {row_group, split * decode_warps, INT32_MAX, job.splits * decode_warps,
             std::int64_t{work_item} * job.splits + split};
  }
  // Where cmp and win share a launch, the last CTAs have the first shares of win: in a small batch others than cmp.
  __device__ void start_dealt(int at) {
    __shared__ int first_row;
    const int rows = static_cast<int>(p.tile.rows()), groups = p.shape.groups;
    const std::int32_t* before = job.schedule.tiles_before;
    const int total = before[rows] * groups, tiles = job.schedule.share(total, decode_warps);
    const int cta = job.branch == win ? job.schedule.ctas - 1 - at : at;
    tile = cta * tiles, end = min(tile + tiles, total);
    share = {0, 0, 0, decode_warps, std::int64_t{blockIdx.y} * (job.schedule.ctas + rows * groups) + cta};
    if (tile >= end) return;
    for (int r = threadIdx.x; r < rows; r += decode_threads)
      if (before[r] * groups <= tile && tile < before[r + 1] * groups) first_row = r;
    __syncthreads();
    row = first_row;
  }
  __device__ void next_dealt() {
    const std::int32_t* before = job.schedule.tiles_before;
    const int groups = p.shape.groups;
    while (tile >= before[row + 1] * groups) ++row;
    const int tiles = before[row + 1] - before[row], in_row = tile - before[row] * groups, group = in_row / tiles;
    share.partial += row * groups + group - share.row_group;
    share.row_group = row * groups + group;
    share.first = in_row - group * tiles;
    share.end = min(tiles, share.first + end - tile);
    tile += share.end - share.first;
  }
};

// KV mainloop of one CTA over a share of the tiles of one branch.
template <class WarpTile, Branch B>
struct KvMainloop {
  using T = typename WarpTile::Type;
  using SharedLayout = DecodeSharedLayout<WarpTile>;
  const DecodeParams& p;
  const DecodeJob& job;
  const LayerShape& s;
  char* shared;
  KvTiles<B> tiles;
  const char *k, *v;  // of the K/V plane
  int warp, work_item, row, group, first_head, valid_heads;
  int first, end, step;  // of the tiles of this warp
  std::int64_t partial_index;
  // The producer side: the next copy is V (`load_v`) or K of tile `load_tile`.
  KvRows load_rows;
  int load_tile, load_panel, slot, count;
  bool load_v, has_pv;
  unsigned ring, halo_rows;
  bool has_halo_row;  // the halo row of a chunk is loaded with its first tile
  std::uint64_t kv_policy, scores_policy;

  __device__ __forceinline__ KvMainloop(const DecodeParams& params, const DecodeJob& job_of_cta, char* memory,
                                        const TileShare& share)
      : p(params),
        job(job_of_cta),
        s(params.shape),
        shared(memory),
        tiles(s, job.k.map, last_position(params, share.row_group)),
        step(share.step),
        partial_index(share.partial),
        load_panel(0),
        slot(0),
        count(0),
        load_v(false) {
    warp = threadIdx.x / 32;
    const int row_group = share.row_group;
    first = share.first + warp;
    end = min(share.end, tiles.count);
    row = row_group / s.groups;
    group = row_group % s.groups;
    work_item = row_group * p.head_tiles + blockIdx.y;
    first_head = row * s.heads() + group * s.heads_per_group + blockIdx.y * WarpTile::heads;
    valid_heads = min(WarpTile::heads, s.heads_per_group - static_cast<int>(blockIdx.y) * WarpTile::heads);
    const int sequence = sequence_of_row(p.tile, row);
    const std::int64_t plane = (p.tile.batch_begin + sequence) * s.groups + group;
    k = static_cast<const char*>(job.k.data) + plane_begin(job.k, plane) * sizeof(T);
    v = static_cast<const char*>(job.v.data) + plane_begin(job.v, plane) * sizeof(T);
    if (B != win && job.k.pages.pages) {
      tiles.table = &job.k.pages;
      tiles.pages =
          job.k.pages.pages + (job.k.pages.first_sequence + p.tile.batch_begin + sequence) * job.k.pages.per_sequence;
    }
    kv_policy = cache_policy(p.keeps_scores ? CacheHint::evict_first : CacheHint::evict_normal);
    scores_policy = cache_policy(CacheHint::evict_last);
    ring = shared_address(shared) + warp * SharedLayout::ring_bytes;
    halo_rows = shared_address(shared) + SharedLayout::halo_rows + warp * SharedLayout::slots * SharedLayout::row_bytes;
    has_halo_row = B == cmp && shards_of(job.k.map) > 1 && job.k.map.halo == 1;
    has_pv = !(B == cmp && p.scores_only);
    load_tile = first;
    if constexpr (B == sel) {
      auto* own = reinterpret_cast<std::int32_t*>(shared + SharedLayout::selected);
      for (int i = threadIdx.x; i < s.rules.n_sel; i += decode_threads)
        own[i] = p.selected[std::int64_t{row_group} * s.rules.n_sel + i];
      tiles.selected = own;
      __syncthreads();
    }
    advance_load();
  }

  // plane_offset() without its division.
  __device__ __forceinline__ std::int64_t plane_begin(const KvView& view, std::int64_t plane) const {
    return view.pages.pages ? std::int64_t{group} * view.pages.rows * view.width : plane * view.plane_stride;
  }
  static __device__ __forceinline__ std::int64_t last_position(const DecodeParams& p, int row_group) {
    if (B == win && p.lengths) return p.lengths[row_group / p.shape.groups] - 1;
    return position_of_row(p.tile, row_group / p.shape.groups);
  }
  // Whether tile i is the first of a chunk other than chunk 0. A chunk may have a halo row and no token yet.
  __device__ __forceinline__ bool has_halo(int i) const {
    return has_halo_row && (tiles.per_span == 2 ? i % 2 : i % tiles.per_span) == 0 && (i > 0 || job.k.map.rank > 0);
  }
  __device__ __forceinline__ void advance_load() {  // to the first tile from `load_tile` on that has rows to load
    for (; load_tile < end; load_tile += step) {
      load_rows = tiles(load_tile);
      if (load_rows.count > 0 || has_halo(load_tile)) break;
    }
  }

  template <int RowBytes>
  __device__ __forceinline__ void copy(unsigned to, const char* plane, const KvView& view) const {
    const char* from = plane + load_rows.owner * view.rank_stride * sizeof(T) + load_rows.row * RowBytes;
    cp_async_tile<RowBytes>(to, from, load_rows.count, kv_policy);
  }
  // Issues the copy of a panel of the rows to load.
  __device__ __forceinline__ void copy_rows(unsigned to) const {
    if constexpr (!WarpTile::tuned) {
      const KvView& view = load_v ? job.v : job.k;
      const int row_bytes = load_v ? v_row_bytes<WarpTile>(s) : k_row_bytes<WarpTile>(s);
      const char* from = (load_v ? v : k) + load_rows.owner * view.rank_stride * sizeof(T) + load_rows.row * row_bytes;
      copy_panel<WarpTile>(to, from, load_v, load_panel, load_rows.count, s, kv_policy);
    } else if (WarpTile::k_bytes == WarpTile::v_bytes) {
      copy<WarpTile::k_bytes>(to, load_v ? v : k, load_v ? job.v : job.k);
    } else if (load_v) {
      copy<WarpTile::v_bytes>(to, v, job.v);
    } else {
      copy<WarpTile::k_bytes>(to, k, job.k);
    }
  }
  // Issues the next copy, into a free slot.
  __device__ __forceinline__ void issue_copy(int to_slot) {
    if (load_tile < end) {
      if (!load_v && load_panel == 0 && has_halo(load_tile))
        cp_async_row(halo_rows + to_slot * SharedLayout::row_bytes, k + (load_rows.row - 1) * k_row_bytes<WarpTile>(s),
                     k_row_bytes<WarpTile>(s));
      copy_rows(ring + to_slot * SharedLayout::slot_bytes);
      advance_copy();
    }
    cp_async_commit();
  }
  // To the next panel, the V of this tile, or the next tile.
  __device__ __forceinline__ void advance_copy() {
    if (WarpTile::k_panels > 1 || WarpTile::v_panels > 1) {
      if (++load_panel < (load_v ? v_panels<WarpTile>(s) : k_panels<WarpTile>(s))) return;
      load_panel = 0;
    }
    load_v = has_pv && !load_v;
    if (load_v) return;
    load_tile += step;
    advance_load();
  }
  __device__ __forceinline__ void start() {
#pragma unroll 1
    for (int i = 0; i < SharedLayout::slots; ++i) issue_copy(i);
  }
  // Waits for the oldest slot, uses it, then refills it.
  template <class Use>
  __device__ __forceinline__ void consume(Use use) {
    cp_async_wait<SharedLayout::slots - 1>();
    use(ring + slot * SharedLayout::slot_bytes);
    __syncwarp();
    issue_copy(slot);
    slot = slot + 1 == SharedLayout::slots ? 0 : slot + 1;
  }

  __device__ __forceinline__ ScoreOutput scores_at(std::int64_t column) const {
    return {p.scores + first_head * p.pitch + column, p.pitch, p.keeps_scores, scores_policy};
  }

  __device__ __forceinline__ void store_halo(const WarpTile& warp_tile, int i, std::int64_t column) const {
    const unsigned row = halo_rows + slot * SharedLayout::row_bytes;
    if (p.block_sums.memory)
      warp_tile.store_halo_score(p.block_sums.halo_scores(work_item, i), row);
    else
      warp_tile.store_halo_score(scores_at(column), row, valid_heads);
  }
  // Online softmax with the outputs for rank of the i-th tile. The last tile of a segment stores no halo score for the
  // next one where that loads its own halo row.
  __device__ __forceinline__ void softmax_tile(WarpTile& warp_tile, int i, const KvRows& now) const {
    if (B == cmp && p.block_sums.memory) {
      const BlockSumOutput rows{p.block_sums.sums(work_item, i),
                                has_halo(i + 1) ? nullptr : p.block_sums.halo_scores(work_item, i + 1), p.keeps_scores,
                                scores_policy};
      warp_tile.store_last_score(rows, now.count);
      warp_tile.online_softmax(now.count, rows);
      warp_tile.store_tile_max(p.block_sums.tile_max(work_item, i), rows);
    } else {
      if constexpr (B == cmp) warp_tile.store_scores(scores_at(now.column), now.count, valid_heads);
      warp_tile.online_softmax(now.count);
    }
  }

  __device__ __forceinline__ void run(WarpTile& warp_tile) {
#pragma unroll 1
    for (int i = first; i < end; i += step) {
      const KvRows now = tiles(i);
      float2* sums = B == cmp ? p.tile_lse + (work_item * p.max_tiles + i) * WarpTile::heads : nullptr;
      if (now.count <= 0 && !has_halo(i)) {
        if (B == cmp && threadIdx.x % 32 < WarpTile::heads) sums[threadIdx.x % 32] = make_float2(neg_inf, 0.0f);
        continue;
      }
      consume([&](unsigned from) {
        if (has_halo(i)) store_halo(warp_tile, i, now.column);
        warp_tile.multiply_qk(from);
      });
#pragma unroll 1
      for (int panel = 1; panel < k_panels<WarpTile>(s); ++panel)
        consume([&](unsigned from) { warp_tile.multiply_qk(from, panel); });
      warp_tile.scale_scores();
      softmax_tile(warp_tile, i, now);
      if constexpr (B == cmp) warp_tile.store_tile_lse(sums);
      if (has_pv)
        for_each_part<WarpTile>(
            s, [&](auto panel) { consume([&](unsigned from) { warp_tile.template multiply_pv<panel>(from); }); });
      count += now.count;
    }
  }

  // Halo rows of a chunk, where there are several: scored for its first block, neither attended nor counted.
  __device__ __forceinline__ void score_halos(WarpTile& warp_tile) {
    const RowMap& map = job.k.map;
    const bool dealt = job.schedule.tiles_before != nullptr;  // a warp then has the segments whose first tile it has
    for (int at_i = first; at_i < (dealt ? end : tiles.count / tiles.per_span); at_i += step) {
      if (dealt && at_i % tiles.per_span != 0) continue;
      const int i = dealt ? at_i / tiles.per_span : at_i;
      const std::int64_t c = segment_at(map, i), begin = c * map.chunk - map.halo;
      if (c == 0) continue;
      const std::int64_t from = row_in_pages(job.k.pages, tiles.pages, row_in_chunk(map, c, begin)),
                         column = score_column(map, c, begin);
      const int rows = clamp_count(tiles.n - begin, map.halo);
      for (int at = 0; at < rows; at += tile_rows) {
        const int here = min(tile_rows, rows - at);
        for (int panel = 0; panel < k_panels<WarpTile>(s); ++panel) {
          __syncwarp();
          const char* rows_at = k + (from + at) * k_row_bytes<WarpTile>(s);
          if constexpr (WarpTile::tuned)
            cp_async_tile<WarpTile::k_bytes>(ring, rows_at, here);
          else
            copy_panel<WarpTile>(ring, rows_at, false, panel, here, s, kv_policy);
          cp_async_commit();
          cp_async_wait<0>();
          warp_tile.multiply_qk(ring, panel);
        }
        warp_tile.scale_scores();
        warp_tile.store_scores(scores_at(column + at), here, valid_heads);
      }
    }
  }

  // A single split with merge_all stores its partial as that of the row.
  __device__ __forceinline__ bool stores_output() const {
    return job.splits == 1 && p.epilogue == DecodeEpilogue::merge_all;
  }

  // Rescales the partials of the warps to their common maximum and stores their sum. All threads.
  __device__ __forceinline__ void store_partial(const WarpTile& warp_tile) const {
    for_each_part<WarpTile>(s, [&](auto part) { store_part<part>(warp_tile); });
  }
  template <int Part>
  __device__ __forceinline__ void store_part(const WarpTile& warp_tile) const {
    constexpr int pitch = WarpTile::v_columns + 8, quads = WarpTile::v_columns / 4;
    const int d_v = typename WarpTile::Size(s).d_v;
    float* o = reinterpret_cast<float*>(shared);
    float2* ms = reinterpret_cast<float2*>(o + decode_warps * WarpTile::heads * pitch);
    float* partial = job.partials + partial_index * decode_partial_floats(WarpTile::heads, d_v);
    float* to = stores_output() ? p.out.o + std::int64_t{first_head} * d_v : partial;
    __syncthreads();  // the rings are empty, the part before is stored
    warp_tile.store_state(ms + warp * WarpTile::heads);
    __syncthreads();
    const auto row_max = [&](int head) {
      float m = neg_inf;
#pragma unroll
      for (int w = 0; w < decode_warps; ++w) m = fmaxf(m, ms[w * WarpTile::heads + head].x);
      return m;
    };
    warp_tile.template store_scaled_o<Part>(o + warp * WarpTile::heads * pitch,
                                            [&](int head, float m) { return exp2_fast(m - row_max(head)); });
    if (Part == 0 && static_cast<int>(threadIdx.x) < WarpTile::heads) {
      const int head = threadIdx.x;
      const float m = row_max(head);
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < decode_warps; ++w) {
        const float2 x = ms[w * WarpTile::heads + head];
        sum += x.y * exp2_fast(x.x - m);
      }
      if (!stores_output())
        reinterpret_cast<float2*>(partial + WarpTile::heads * d_v)[head] = make_float2(m, sum);
      else if (head < valid_heads)
        reinterpret_cast<float2*>(p.out.ms)[first_head + head] = to_natural_log(SoftmaxState<Exp2>{m, sum});
    }
    __syncthreads();
    for (int item = threadIdx.x; item < valid_heads * quads; item += decode_threads) {
      const int head = item / quads, column = item % quads * 4;
      if (!WarpTile::tuned && Part * WarpTile::v_columns + column >= d_v) continue;
      float4 sum = {};
#pragma unroll
      for (int w = 0; w < decode_warps; ++w) {
        const float4 x = *reinterpret_cast<const float4*>(o + (w * WarpTile::heads + head) * pitch + column);
        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
      }
      if (WarpTile::tuned)
        reinterpret_cast<float4*>(to)[item] = sum;
      else
        *reinterpret_cast<float4*>(to + head * d_v + Part * WarpTile::v_columns + column) = sum;
    }
  }

  // Merges the LSE buckets of the work item, each by rising segment, a segment by rising tile. The (m, sum) of the
  // tiles are staged in shared memory where they fit, so that the chain of merges waits for memory once.
  __device__ __forceinline__ void merge_buckets() const {
    const float2* sums = p.tile_lse + work_item * p.max_tiles * WarpTile::heads;
    const int pairs = tiles.count * WarpTile::heads / 2;
    if (pairs * static_cast<int>(sizeof(float4)) > SharedLayout::queries)
      return merge_buckets_from([&](int i) { return __ldcg(sums + i); });
    auto* staged = reinterpret_cast<float4*>(shared);
#pragma unroll 8
    for (int i = threadIdx.x; i < pairs; i += decode_threads)
      staged[i] = __ldcg(reinterpret_cast<const float4*>(sums) + i);
    __syncthreads();
    merge_buckets_from([&](int i) { return reinterpret_cast<const float2*>(shared)[i]; });
  }
  template <class Load>
  __device__ __forceinline__ void merge_buckets_from(Load load) const {
    const int buckets = s.lse.buckets / shards_of(job.k.map), segments = tiles.count / tiles.per_span;
    const std::int64_t row_heads = p.tile.rows() * s.heads();
    for (int item = threadIdx.x; item < buckets * WarpTile::heads; item += decode_threads) {
      const int bucket = item / WarpTile::heads, head = item % WarpTile::heads;
      if (head >= valid_heads) continue;
      SoftmaxState<Exp2> sum;
      for (int i = bucket; i < segments; i += buckets) {
        SoftmaxState<Exp2> segment;
        for (int j = i * tiles.per_span; j < (i + 1) * tiles.per_span; ++j) {
          const float2 tile = load(j * WarpTile::heads + head);
          segment = merge_exact(segment, {tile.x, tile.y});
        }
        sum = merge_exact(sum, segment);
      }
      reinterpret_cast<float2*>(p.lse)[bucket * row_heads + first_head + head] = to_natural_log(sum);
    }
  }

  // Merges the partials of the splits, by rising split, into the partial of the row.
  __device__ __forceinline__ void merge_partials() const {
    const int d_v = typename WarpTile::Size(s).d_v, quads = d_v / 4;
    const std::int64_t stride = decode_partial_floats(WarpTile::heads, d_v);
    const float* first = job.partials + std::int64_t{work_item} * job.splits * stride;
    for (int item = threadIdx.x; item < valid_heads * quads; item += decode_threads) {
      const int head = item / quads;
      SoftmaxState<Exp2> state;
      float4 o = {};
#pragma unroll 8
      for (int i = 0; i < job.splits; ++i) {
        const float* partial = first + i * stride;
        const float2 ms = __ldcg(reinterpret_cast<const float2*>(partial + WarpTile::heads * d_v) + head);
        const float4 x = __ldcg(reinterpret_cast<const float4*>(partial) + item);
        merge_partial(state, o, ms, x);
      }
      reinterpret_cast<float4*>(p.out.o + std::int64_t{first_head} * d_v)[item] = o;
      if (item % quads == 0) reinterpret_cast<float2*>(p.out.ms)[first_head + head] = to_natural_log(state);
    }
  }

  __device__ __forceinline__ void finish() const {
    if (p.epilogue == DecodeEpilogue::store_partials || (p.epilogue == DecodeEpilogue::merge_buckets && B != cmp))
      return;
    if (stores_output() && B != cmp) return;
    if (job.splits > 1 && !arrives_last(&p.arrivals[work_item], job.splits)) return;
    __syncthreads();
    if (p.epilogue == DecodeEpilogue::merge_all && !stores_output()) merge_partials();
    if constexpr (B == cmp) merge_buckets();
  }
};

template <class WarpTile, Branch B>
__device__ __forceinline__ void run_share(const DecodeParams& p, const DecodeJob& job, char* shared,
                                          const TileShare& share, bool loads_queries) {
  using SharedLayout = DecodeSharedLayout<WarpTile>;
  KvMainloop<WarpTile, B> mainloop(p, job, shared, share);
  mainloop.start();
  if (loads_queries)
    WarpTile::load_queries(shared + SharedLayout::queries,
                           static_cast<const typename WarpTile::Type*>(p.q) +
                               std::int64_t{mainloop.first_head} * typename WarpTile::Size(p.shape).d_k,
                           typename WarpTile::Size(p.shape), mainloop.valid_heads, threadIdx.x, decode_threads);
  __syncthreads();
  WarpTile warp_tile(shared + SharedLayout::queries, shared + SharedLayout::prob + mainloop.warp * WarpTile::prob_bytes,
                     p.shape);
  mainloop.run(warp_tile);
  if (B == cmp && shards_of(job.k.map) > 1 && job.k.map.halo > 1) mainloop.score_halos(warp_tile);
  if (threadIdx.x % 32 == 0 && blockIdx.y == 0 && mainloop.count > 0 && job.reads)
    atomicAdd(reinterpret_cast<unsigned long long*>(job.reads) +
                  sequence_of_row(p.tile, mainloop.row) * p.shape.groups + mainloop.group,
              static_cast<unsigned long long>(mainloop.count));
  if (mainloop.has_pv || p.epilogue == DecodeEpilogue::merge_all) mainloop.store_partial(warp_tile);
  mainloop.finish();
  __syncthreads();
}

template <class WarpTile, Branch B>
__device__ __forceinline__ void run_job(const DecodeParams& p, const DecodeJob& job, char* shared, int at, bool first) {
  ShareCursor cursor(p, job, at);
#pragma unroll 1
  while (cursor.next())  // the jobs of a CTA share their queries where tiles are not dealt
    run_share<WarpTile, B>(p, job, shared, cursor.share, first || cursor.dealt);
}

template <class WarpTile>
__global__ void __launch_bounds__(decode_threads, WarpTile::ctas_per_sm)
    split_kv_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(128) char shared[];
  griddep_wait();
  const int row_groups = static_cast<int>(p.tile.rows()) * p.shape.groups;
  bool first = true;
  for (int i = 0; i < p.job_count; ++i) {
    const DecodeJob& job = p.jobs[i];
    const int at = static_cast<int>(blockIdx.x) - job.first_cta;
    if (at < 0 || at >= job_ctas(job, row_groups)) continue;
    if (!job.schedule.tiles_before && job.ctas - 1 - at % max(job.ctas, 1) >= job.splits) continue;
    if (job.branch == cmp)
      run_job<WarpTile, cmp>(p, job, shared, at, first);
    else if (job.branch == sel)
      run_job<WarpTile, sel>(p, job, shared, at, first);
    else
      run_job<WarpTile, win>(p, job, shared, at, first);
    first = false;
  }
}

template <class WarpTile>
void launch_warp_tile(const DecodeParams& p, Stream* stream) {
  int ctas = 0;
  for (int i = 0; i < p.job_count; ++i)
    ctas = std::max(ctas, p.jobs[i].first_cta + job_ctas(p.jobs[i], static_cast<int>(p.tile.rows()) * p.shape.groups));
  launch_pdl(split_kv_kernel<WarpTile>, dim3(ctas, p.head_tiles), decode_threads,
             DecodeSharedLayout<WarpTile>::bytes(p.shape), stream, 1, p);
}

/// Calls f(std::type_identity<WarpTile>{}) with the warp tile of a storage type and shape.
template <DType Storage, bool Tuned, class F>
void with_split_kv_tile(const LayerShape& s, F f) {
  if constexpr (Storage == DType::f32) {
    if (s.d_k == 64) return f(std::type_identity<WarpTileScalar<64, 64>>{});
    return f(std::type_identity<WarpTileScalar<128, 128>>{});
  } else {
    using T = std::conditional_t<Storage == DType::bf16, __nv_bfloat16, __half>;
    if constexpr (Tuned) {
      if (s.d_k == 64) return f(std::type_identity<WarpTileMma<T, 64, 64>>{});
      if (s.d_k == 128) return f(std::type_identity<WarpTileMma<T, 128, 128>>{});
      return f(std::type_identity<WarpTileMma<T, 192, 128>>{});
    } else {
      if (split_kv_instance(s).d_k == 128) return f(std::type_identity<WarpTileMma<T, 128, 128, 1, false>>{});
      return f(std::type_identity<WarpTileMma<T, 256, 256, 1, false>>{});
    }
  }
}

template <DType Storage, bool Tuned>
void launch_split_kv(const DecodeParams& p, Stream* stream) {
  with_split_kv_tile<Storage, Tuned>(p.shape,
                                     [&](auto tile) { launch_warp_tile<typename decltype(tile)::type>(p, stream); });
}

}  // namespace nsa::gpu
