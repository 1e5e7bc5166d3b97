#pragma once
// Compressed attention of a decode step of several query tokens in tuned instances of 16-bit storage, and that of the
// window where the fused kernel does the rest: the 16 heads of four query tokens of a sequence are the 64 rows of a
// warpgroup's products (decode/tokens/warpgroup_tile.cuh).
//
// Tiling: a CTA of four warps has a (sequence, four query tokens, group, head tile) and a split of its pairs of KV
// tiles, 2 x 32 rows: first those of the window, runs of 64 positions, then those of cmp. Warp w has query token w,
// with the rows that it does not attend masked. All warps copy K, then V of a pair into a slot of a ring; one barrier a
// slot ends the use of the slot before and begins that of the next. Every warp stores the partials of its own row, as
// decode/split_kv/kernel.cuh does for a CTA, and of cmp the same scores, (m, sum) and block sums by tile, bit for bit:
// the same blocks are chosen.
//
// Bytes: K and V once per four query tokens; block sums 9/8 * heads / (2 * Dk + 2 * Dv) of the bytes of cmp for each
// query token. Bound: memory bandwidth, with the exponentials and sums of four query tokens close behind: 12 warps an
// SM with two independent tiles each hide their latencies. Capability 9.0 (sm_90a).

#include "kernels/cuda/decode/split_kv/kernel.cuh"
#include "kernels/cuda/decode/tokens/warpgroup_tile.cuh"

namespace nsa::gpu {

/// Shared memory of a CTA: the slots, the queries, two halo rows beside every slot.
template <class WarpTile>
struct WarpgroupLayout {
  static constexpr int slot_bytes = pair_rows * std::max(WarpTile::k_bytes, WarpTile::v_bytes),
                       row_bytes = WarpTile::k_bytes;
  static constexpr int all_queries = decode_warps * WarpTile::query_bytes;
  static constexpr int cta_bytes = (WarpTile::ctas_per_sm > 2 ? 74 : 112) << 10;
  static constexpr int fitting = (cta_bytes - all_queries) / (slot_bytes + 2 * row_bytes);
  static constexpr int slots = fitting < 5 ? 3 : 5;  // odd: V follows into the slot of K, and K into that of V
  static constexpr int queries = slots * slot_bytes, halo_rows = queries + all_queries,
                       bytes = halo_rows + slots * 2 * row_bytes;
  static_assert(fitting >= 3);
};

/// Where the pairs of a CTA lie: the runs of the window of its query tokens, 64 positions each, come first.
struct TokenPairs {
  int sequence, group;
  int first_t, last_t;              // positions of the first and the last query token
  int runs, cmp_tiles, cmp_tokens;  // of the window; of the last query token

  __device__ __forceinline__ TokenPairs(const DecodeParams& p, int first_row, int tokens, int group_of_cta)
      : sequence(sequence_of_row(p.tile, first_row)),
        group(group_of_cta),
        first_t(static_cast<int>(position_of_row(p.tile, first_row))),
        last_t(first_t + tokens - 1),
        runs(0) {
    const KvTiles<cmp> tiles(p.shape, p.jobs[0].k.map, last_t);
    cmp_tiles = tiles.count, cmp_tokens = tiles.n;
    if (p.job_count > 1) runs = last_t / window_span - first_run(p) + 1;
  }
  __device__ __forceinline__ int first_run(const DecodeParams& p) const {
    return static_cast<int>(window_begin(p.shape.rules, first_t)) / window_span;
  }
  __device__ __forceinline__ int count() const { return runs + (cmp_tiles + 1) / 2; }

  /// Rows [low, high) of the 32 that begin at `row` of their plane, or of a rank's part of a gathered one.
  struct Rows {
    int row, bounds;  // the rank, low, high, a byte each from the lowest
    __device__ __forceinline__ int owner() const { return bounds & 0xff; }
    __device__ __forceinline__ int low() const { return bounds >> 8 & 0xff; }
    __device__ __forceinline__ int high() const { return bounds >> 16; }
  };
  static __device__ __forceinline__ int in_tile(int row) { return min(max(row, 0), tile_rows); }
  /// Those of tile t of a pair of the window, of cmp, or of cmp where tile i begins at token 32 i of this rank.
  __device__ __forceinline__ Rows window_rows_of(const DecodeParams& p, int pair, int t) const {
    static_assert(window_span == pair_rows);
    const int from = (first_run(p) + pair) * window_span + t * tile_rows,
              begin = static_cast<int>(window_begin(p.shape.rules, first_t)),
              ring = static_cast<int>(p.jobs[1].k.map.ring);
    return {ring > 0 ? from % ring : from, in_tile(begin - from) << 8 | in_tile(last_t + 1 - from) << 16};
  }
  __device__ __forceinline__ Rows plain_rows_of(const DecodeParams& p, int pair, int t) const {
    if (pair < runs) return window_rows_of(p, pair, t);
    const int i = 2 * (pair - runs) + t, high = in_tile(cmp_tokens - i * tile_rows);
    int row = i * tile_rows;
    const PageTable& table = p.jobs[0].k.pages;
    if (table.pages && high > 0) {  // a page is an LSE segment
      const int entry = row / table.rows;
      const std::int64_t of_sequence = table.first_sequence + p.tile.batch_begin + sequence;
      row += (table.pages[of_sequence * table.per_sequence + entry] * table.groups - entry) * table.rows;
    }
    return {row, high << 16};
  }
  static __device__ __noinline__ Rows rows_of(const DecodeParams& p, TokenPairs at, int pair, int t) {
    if (pair < at.runs) return at.window_rows_of(p, pair, t);
    const int i = 2 * (pair - at.runs) + t;
    if (i >= at.cmp_tiles) return {0, 0};
    const DecodeJob& job = p.jobs[0];
    KvTiles<cmp> tiles(p.shape, job.k.map, at.last_t);
    if (job.k.pages.pages) {
      tiles.table = &job.k.pages;
      tiles.pages = job.k.pages.pages +
                    (job.k.pages.first_sequence + p.tile.batch_begin + at.sequence) * job.k.pages.per_sequence;
    }
    const KvRows rows = tiles(i);
    return {static_cast<int>(rows.row), rows.owner | in_tile(rows.count) << 16};
  }
};

/// The mainloop of a warp. Plain: P V and block sums are wanted, and tile i of cmp begins at token 32 i, has no halo
/// row and lies on this rank; a kernel of its own, which has registers for nothing else.
template <class WarpTile, bool Plain>
struct WarpgroupMainloop {
  using Layout = WarpgroupLayout<WarpTile>;
  static constexpr int heads = WarpTile::heads, element = sizeof(typename WarpTile::Type);
  const DecodeParams& p;
  const TokenPairs pairs;
  int warp, row, first_head, valid_heads;
  std::int64_t partial_index;
  bool is_token;           // whether this warp has a query token
  int n, tiles, per_span;  // of cmp and the query token of this warp; none without one
  std::int64_t item;       // its row, group and head tile
  int lane;
  // What rank reads of the next pair of cmp: block sums of its first tile, raw scores of the halo token of its second,
  // (m, sum) of the tile and head that this lane stores.
  float *sums, *halo_scores;
  float2* states;
  int pair, begin_pair, end_pair, slot = 0;  // of this CTA
  std::int64_t attended = 0;                 // tokens of a branch
  std::uint64_t kv_policy, scores_policy;
  // The producer side.
  unsigned ring;
  int load_pair, load_slot = 0, found_pair;
  TokenPairs::Rows found;                   // of tile lane % 2 of pair found_pair + lane / 2
  const char *k, *v, *window_k, *window_v;  // planes

  // The CTA has `tokens` query tokens, the first of which has row `first_row`.
  __device__ __forceinline__ WarpgroupMainloop(const DecodeParams& params, char* memory, int first_row, int tokens,
                                               int group, int split)
      : p(params), pairs(params, first_row, tokens, group) {
    const LayerShape& s = p.shape;
    const RowMap& map = p.jobs[0].k.map;
    warp = threadIdx.x / 32;
    is_token = warp < tokens;
    row = first_row + min(warp, tokens - 1);
    const KvTiles<cmp> own(s, map, position());
    n = is_token ? own.n : 0, tiles = is_token ? own.count : 0, per_span = own.per_span;
    item = (row * s.groups + group) * p.head_tiles + blockIdx.y;
    first_head = row * s.heads() + group * s.heads_per_group + blockIdx.y * heads;
    valid_heads = min(heads, s.heads_per_group - static_cast<int>(blockIdx.y) * heads);
    partial_index = item * p.jobs[0].splits + split;
    lane = threadIdx.x % 32;
    asm("" : "+r"(lane));  // else the compiler reads it again and again
    const int count = pairs.count();
    pair = begin_pair = load_pair = count * split / p.jobs[0].splits, end_pair = count * (split + 1) / p.jobs[0].splits;
    found_pair = pair - 16;
    ring = shared_address(memory);
    k = plane_of(p.jobs[0].k), v = plane_of(p.jobs[0].v);
    if (p.job_count > 1) window_k = plane_of(p.jobs[1].k), window_v = plane_of(p.jobs[1].v);
    kv_policy = cache_policy(p.keeps_scores ? CacheHint::evict_first : CacheHint::evict_normal);
    scores_policy = cache_policy(p.keeps_scores ? CacheHint::evict_last : CacheHint::evict_normal);
  }
  __device__ __forceinline__ bool has_pv() const { return Plain || !p.scores_only; }
  __device__ __forceinline__ bool has_sums() const { return Plain || p.block_sums.memory; }
  __device__ __forceinline__ int position() const { return static_cast<int>(position_of_row(p.tile, row)); }
  __device__ __forceinline__ const char* plane_of(const KvView& view) const {
    const std::int64_t plane = (p.tile.batch_begin + pairs.sequence) * p.shape.groups + pairs.group;
    return static_cast<const char*>(view.data) +
           (view.pages.pages ? std::int64_t{pairs.group} * view.pages.rows * view.width : plane * view.plane_stride) *
               element;
  }

  template <int RowBytes, bool InWindow>
  __device__ __forceinline__ void copy_pair(const char* plane, const KvView& view) {
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const int lane = (load_pair - found_pair) * 2 + t;
      const TokenPairs::Rows rows{__shfl_sync(0xffffffffu, found.row, lane),
                                  __shfl_sync(0xffffffffu, found.bounds, lane)};
      const char* from = plane + std::int64_t{rows.row} * RowBytes;
      if (!Plain) from += rows.owner() * view.rank_stride * element;
      cp_async_panels<RowBytes>(ring + load_slot * Layout::slot_bytes + t * (slot_rows * 128), from,
                                InWindow ? rows.low() : 0, rows.high(), kv_policy);
    }
    next_slot(load_slot);
  }
  // Issues this warp's copies of K of the next pair, then of V, if there is one. A pair after one of cmp is of cmp.
  template <bool InWindow>
  __device__ __forceinline__ void issue_k() {
    if (load_pair < end_pair) {
      const bool is_window = InWindow && load_pair < pairs.runs;
      if (load_pair == found_pair + 16) {
        found_pair = load_pair;
        const int at = found_pair + threadIdx.x % 32 / 2, t = threadIdx.x % 2;
        if constexpr (Plain)
          found = pairs.plain_rows_of(p, at, t);
        else
          found = TokenPairs::rows_of(p, pairs, at, t);
      }
      if (!Plain && !is_window && warp == 0) copy_halos();
      copy_pair<WarpTile::k_bytes, InWindow>(is_window ? window_k : k, p.jobs[0].k);
      if (!has_pv()) ++load_pair;
    }
    cp_async_commit();
  }
  template <bool InWindow>
  __device__ __forceinline__ void issue_v() {
    if (load_pair < end_pair) {
      copy_pair<WarpTile::v_bytes, InWindow>(InWindow && load_pair < pairs.runs ? window_v : v, p.jobs[0].v);
      ++load_pair;
    }
    cp_async_commit();
  }
  // Whether tile i is the first of a chunk other than chunk 0. A chunk may have a halo row and no token yet.
  __device__ __forceinline__ bool has_halo(int i) const {
    if (Plain) return false;
    const RowMap& map = p.jobs[0].k.map;
    return shards_of(map) > 1 && map.halo == 1 && i % per_span == 0 && (i > 0 || map.rank > 0);
  }
  __device__ __forceinline__ void copy_halos() const {
    const int i = 2 * (load_pair - pairs.runs), lane = (load_pair - found_pair) * 2;
    for (int t = 0; t < 2; ++t) {
      const int at = __shfl_sync(0xffffffffu, found.row, lane + t);
      if (i + t < pairs.cmp_tiles && has_halo(i + t))
        cp_async_row(halo_row(load_slot, t), k + (std::int64_t{at} - 1) * WarpTile::k_bytes, WarpTile::k_bytes);
    }
  }
  __device__ __forceinline__ unsigned halo_row(int of_slot, int t) const {
    return ring + Layout::halo_rows + (of_slot * 2 + t) * Layout::row_bytes;
  }
  static __device__ __forceinline__ void next_slot(int& slot) { slot = slot + 1 == Layout::slots ? 0 : slot + 1; }
  __device__ __forceinline__ void start() {
#pragma unroll 1
    for (int copy = 0; copy < Layout::slots; ++copy) {
      if (has_pv() && copy % 2 == 1)
        issue_v<true>();
      else
        issue_k<true>();
    }
  }
  // Until the next slot is here, where all but the latest `Later` copies have to be, and all warps are through with the
  // slot before.
  template <int Later>
  __device__ __forceinline__ unsigned wait_for_slot() const {
    cp_async_wait<Later>();
    fence_proxy_async();  // the products read what cp.async wrote
    __syncthreads();
    return ring + slot * Layout::slot_bytes;
  }

  // Tokens of this query token in tile i.
  __device__ __forceinline__ int tokens_of(int i) const {
    if (Plain) return max(0, min(tile_rows, n - i * tile_rows));
    if (i >= tiles) return 0;
    const int segment = static_cast<int>(p.shape.lse.segment), u = i / per_span,
              begin = static_cast<int>(segment_at(p.jobs[0].k.map, u)) * segment;
    return max(0, min(tile_rows, min(segment, n - begin) - (i - u * per_span) * tile_rows));
  }
  // The destination of the raw scores of tile i.
  __device__ __forceinline__ ScoreOutput scores_at(int i) const {
    const std::int64_t column = KvTiles<cmp>(p.shape, p.jobs[0].k.map, position())(i).column;
    return {p.scores + first_head * p.pitch + column, p.pitch, p.keeps_scores, scores_policy};
  }
  __device__ __forceinline__ void set_outputs(int i) {
    sums = p.block_sums.memory + item * p.block_sums.item_floats + i * (heads * tile_blocks);
    halo_scores = p.block_sums.memory + item * p.block_sums.item_floats + p.block_sums.tiles * (heads * tile_blocks) +
                  (i + 1) * heads;
    states = p.tile_lse + (item * p.max_tiles + i + lane % 4 / 2) * heads + head_of_state();
  }
  // A lane stores the (m, sum) of head g + 8 (quad % 2) and tile quad / 2 of a pair.
  __device__ __forceinline__ int head_of_state() const { return lane / 4 + lane % 2 * 8; }
  // The outputs for rank of the tiles i and i + 1, of which this query token has so many tokens.
  __device__ __forceinline__ void softmax_with_outputs(WarpTile& warp_tile, int i, const int (&count)[2]) {
    const auto for_each_tile = [&](auto f) {
      if (i + 1 < tiles)
        f(0), f(1);
      else if (i < tiles)
        f(0);
    };
    if (has_sums()) {
      const auto output_of = [&](int t) {
        return BlockSumOutput{sums + t * (heads * tile_blocks), has_halo(i + t + 1) ? nullptr : halo_scores + t * heads,
                              true, scores_policy};
      };
      for_each_tile([&](int t) { warp_tile.store_last_score_of(t, output_of(t), count[t]); });
      warp_tile.softmax_of_tiles();
      for_each_tile([&](int t) { warp_tile.store_block_sums_of(t, output_of(t)); });
    } else {
#pragma unroll
      for (int t = 0; t < 2; ++t)
        if (count[t] > 0) warp_tile.store_scores_of(t, scores_at(i + t), count[t], valid_heads);
      warp_tile.softmax_of_tiles();
    }
    store_states(warp_tile, i);
    sums += 2 * heads * tile_blocks, halo_scores += 2 * heads, states += 2 * heads;
  }
  __device__ __forceinline__ void store_states(const WarpTile& warp_tile, int i) const {
    const int tile = i + lane % 4 / 2;
    if (tile >= tiles) return;
    const SoftmaxState<Exp2> state = warp_tile.state_of_lane(lane);
    *states = make_float2(state.m, state.s);
    if (has_sums() && !p.fused_follows)
      store_word_with_policy(p.block_sums.tile_max(static_cast<int>(item), tile) + head_of_state(), state.m,
                             scores_policy);
  }
  // Halo scores of the tiles i and i + 1, whose halo rows came with K.
  __device__ __forceinline__ void store_halos(const WarpTile& warp_tile, int i) const {
#pragma unroll 1
    for (int t = 0; t < 2; ++t) {
      if (i + t >= tiles || !has_halo(i + t)) continue;
      if (has_sums())
        warp_tile.store_halo_score(p.block_sums.halo_scores(static_cast<int>(item), i + t), halo_row(slot, t));
      else
        warp_tile.store_halo_score(scores_at(i + t), halo_row(slot, t), valid_heads);
    }
  }
  // P of the pair, whose K is multiplied. Tokens that this query token does not attend have 0.
  __device__ __forceinline__ void softmax_of_window(WarpTile& warp_tile) {
    const int from = (pairs.first_run(p) + pair) * window_span, t = pairs.first_t + warp,
              low = static_cast<int>(window_begin(p.shape.rules, t)) - from, high = is_token ? t + 1 - from : low;
    if (low > 0 || high < window_span)
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) warp_tile.mask(tile, low - tile * tile_rows, high - tile * tile_rows);
    warp_tile.softmax_to_reference();
    attended += max(0, min(window_span, high) - max(0, low));
  }
  __device__ __forceinline__ void softmax_of_cmp(WarpTile& warp_tile) {
    const int i = 2 * (pair - pairs.runs), count[2] = {tokens_of(i), tokens_of(i + 1)};
    warp_tile.scale_scores();
    if (count[0] + count[1] < pair_rows)
#pragma unroll
      for (int t = 0; t < 2; ++t) warp_tile.mask(t, 0, count[t]);
    softmax_with_outputs(warp_tile, i, count);
    warp_tile.merge_tiles();
    attended += count[0] + count[1];
  }
  // The pairs below `until`, all of one branch. A slot is filled again as soon as all warps are through with it: that
  // of K before the softmax, that of V when the next pair begins.
  template <bool IsWindow>
  __device__ __forceinline__ void attend(WarpTile& warp_tile, int until) {
#pragma unroll 1
    for (; pair < until; ++pair) {
      unsigned keys;
      if (pair > begin_pair && has_pv()) {
        keys = wait_for_slot<Layout::slots - 2>();
        issue_k<IsWindow>();
      } else {
        keys = wait_for_slot<Layout::slots - 1>();
      }
      if (!Plain && !IsWindow) store_halos(warp_tile, 2 * (pair - pairs.runs));
      warp_tile.multiply_qk(keys);
      __syncthreads();
      if (has_pv())
        issue_v<IsWindow>();
      else
        issue_k<IsWindow>();
      if constexpr (IsWindow)
        softmax_of_window(warp_tile);
      else
        softmax_of_cmp(warp_tile);
      next_slot(slot);
      if (!has_pv()) continue;
      const unsigned values = wait_for_slot<Layout::slots - 1>();
      warp_tile.multiply_pv(values);
      next_slot(slot);
    }
  }
  // Of a branch that has been attended: the partial and the reads.
  __device__ __forceinline__ void finish(const WarpTile& warp_tile, const DecodeJob& job) {
    if (!is_token) return;
    if (threadIdx.x % 32 == 0 && blockIdx.y == 0 && attended > 0 && job.reads)
      atomicAdd(reinterpret_cast<unsigned long long*>(job.reads) + pairs.sequence * p.shape.groups + pairs.group,
                static_cast<unsigned long long>(attended));
    if (has_pv())
      warp_tile.store_partial(job.partials + partial_index * decode_partial_floats(heads, WarpTile::d_v), valid_heads,
                              attended > 0 || !p.fused_follows);
    attended = 0;
  }
  __device__ __forceinline__ void run(WarpTile& warp_tile) {
    if (p.job_count > 1) {
      attend<true>(warp_tile, min(pairs.runs, end_pair));
      warp_tile.sum_lanes();
      finish(warp_tile, p.jobs[1]);
      warp_tile.clear();
    }
    set_outputs(2 * (pair - pairs.runs));
    attend<false>(warp_tile, end_pair);
    finish(warp_tile, p.jobs[0]);
  }
};

template <class WarpTile, bool Plain>
__global__ void __launch_bounds__(decode_threads, WarpTile::ctas_per_sm)
    warpgroup_token_kernel(const __grid_constant__ DecodeParams p) {
  using Layout = WarpgroupLayout<WarpTile>;
  extern __shared__ __align__(1024) char slots[];
  griddep_wait();
  const int splits = p.jobs[0].splits, fours = token_fours(p.tile), split = blockIdx.x % splits,
            item = blockIdx.x / splits, four = item % fours, group = item / fours % p.shape.groups,
            sequence = item / fours / p.shape.groups, first_token = four * decode_warps,
            tokens = min(decode_warps, p.tile.tokens - first_token);
  WarpgroupMainloop<WarpTile, Plain> mainloop(p, slots, sequence * p.tile.tokens + first_token, tokens, group, split);
  mainloop.start();
  char* queries = slots + Layout::queries + mainloop.warp * WarpTile::warp_queries;
  WarpTile::load_queries(
      queries, static_cast<const typename WarpTile::Type*>(p.q) + std::int64_t{mainloop.first_head} * WarpTile::d_k,
      typename WarpTile::Size(p.shape), mainloop.valid_heads, threadIdx.x % 32, 32);
  WarpTile warp_tile(queries, nullptr, p.shape);
  mainloop.run(warp_tile);
}

}  // namespace nsa::gpu
