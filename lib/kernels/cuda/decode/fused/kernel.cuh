#pragma once
// Fused decode attention: cmp, block selection, sel, win and the merge in one launch; a cluster of 1 to 16 CTAs a (row,
// group), one CTA of 8 warps an SM.
//
// Tiling: the KV tiles of cmp, 32 tokens each, are dealt to all warps of the cluster (pass 0); then some warps attend
// the window and the rest the selected blocks (pass 1, decode/fused/tile_pipeline.cuh). In between, the (m, sum) and
// block sums of the tiles go through the L2, and the warps that attend the selected blocks score and select them
// (decode/fused/select_blocks.cuh), while the warps of the window go on. At the end a CTA sums the o of its warps by
// branch and sends every CTA of the cluster the columns which that one merges, normalises and gates. Block scores come
// from sums by tile (attention/block_sums.cuh), or from raw scores where the shape has none.
//
// As a whole layer (DecodeLayerArgs) every CTA of a work item first forms q, k, v and gate from project's product, and
// appends: every CTA of a work item writes the new rows of K and V, so that
// its own warps may read them, and the CTA that attends the compressed token which completes forms it. Counters and
// blocks go to the logs, and the last CTA to read the position moves it on.
//
// Bytes: K and V once; block sums add 9/8 * heads / (2 * Dk + 2 * Dv) of the bytes of cmp, written and read (raw
// scores: 4 * heads / (2 * Dk + 2 * Dv)). Bound: memory bandwidth from some 16 work items of 64K tokens on; with few
// work items the latency of the chain launch, cmp, selection, sel, merge with three cluster barriers, which is the
// instructions on that path at 4 to 5 cycles each.

#include "kernels/cuda/decode/fused/append.cuh"
#include "kernels/cuda/decode/fused/merge.cuh"
#include "kernels/cuda/decode/fused/second_pass.cuh"
#include "kernels/cuda/layer/rope_gate.cuh"

namespace nsa::gpu {

template <class WarpTile, int W, bool Sums, class Params = FusedDecodeParams>
struct FusedDecode {
  using T = typename WarpTile::Type;
  using SharedLayout = FusedSharedLayout<WarpTile, W>;
  using Select = FusedSelect<WarpTile, W, Sums, Params>;
  static constexpr bool is_shard = Params::is_shard;
  static constexpr int threads = 32 * W;
  const Params& p;
  char* shared;
  typename Params::Coord at;
  std::conditional_t<Params::after_cmp, SecondPassPipeline<WarpTile, W, Params::has_pages>,
                     TilePipeline<WarpTile, W, is_shard, Params::has_pages>>
      pipeline;
  int win_tiles, sel_tiles;
  bool cluster_arrived = false;  // at the cluster barrier of block selection, whose wait is still due
  std::uint64_t scores_policy;

  // Sets up what depends on the launch alone. start() sets up what depends on the position, after the predecessor.
  __device__ __forceinline__ FusedDecode(const Params& params, char* memory) : p(params), shared(memory) {
    const LayerShape& s = p.shape;
    at.work_item = p.by_cluster(static_cast<int>(blockIdx.x));
    at.cta = static_cast<int>(blockIdx.x) - at.work_item * p.cluster;
    if constexpr (!is_shard)
      if (p.longest_first) at.work_item = longest_first(at.work_item);
    at.tile_cta = WarpTile::tuned ? at.cta : p.by_head_tiles(at.cta);
    at.head_tile = WarpTile::tuned ? 0 : at.cta - at.tile_cta * p.head_tiles;
    at.valid_heads =
        WarpTile::tuned ? s.heads_per_group : min(WarpTile::heads, s.heads_per_group - at.head_tile * WarpTile::heads);
    set_work_item(at.work_item);
    at.warp = threadIdx.x / 32;
    at.warp_in_cluster = at.warp * p.cluster + at.cta;
    at.cluster_warps = W * p.cluster;
    at.scoring_warps = at.cluster_warps - p.win_warps;
    at.cta_scoring_warps = min(W, p.by_cluster(max(0, at.scoring_warps - at.cta + p.cluster - 1)));
    Select{p, at, shared}.prepare();
    pipeline.shape = &p.shape;
    pipeline.scores_only = p.scores_only;
    pipeline.pages = &p.pages;
    pipeline.sequence = sequence();
    pipeline.ring = shared_address(shared) + at.warp * SharedLayout::ring_bytes;
    pipeline.scale_ring = shared_address(shared) + SharedLayout::scales + at.warp * SharedLayout::slots * slot_rows;
    pipeline.policy = cache_policy(p.keeps_scores ? CacheHint::evict_first : CacheHint::evict_normal);
    scores_policy =
        cache_policy(p.keeps_scores || !is_quantised_tile<WarpTile> ? CacheHint::evict_last : CacheHint::evict_normal);
    if constexpr (Params::after_cmp) pipeline.window_ring = static_cast<int>(p.k[win].map.ring);
    if constexpr (is_shard) {
      at.p = &p;
      pipeline.chunk_gap = p.k[cmp].map.halo;
      pipeline.first_has_halo = p.rank > 0;
      pipeline.halo_rows = shared_address(shared) + SharedLayout::halo_rows + at.warp * SharedLayout::halo_bytes;
    }
    assign_tiles();
  }
  __device__ __forceinline__ void set_work_item(int work_item) {
    const LayerShape& s = p.shape;
    at.work_item = work_item;
    at.row = p.groups(at.work_item), at.group = at.work_item - at.row * s.groups;
    at.group_head = at.row * s.heads() + at.group * s.heads_per_group;
    at.first_head = at.group_head + at.head_tile * WarpTile::heads;
    at.tile_item = WarpTile::tuned ? at.work_item : at.work_item * p.head_tiles + at.head_tile;
  }
  // The k-th work item by falling length: clusters start in this order, so the longest sequence starts first. The
  // positions were written before the predecessor began. All threads.
  __device__ int longest_first(int k) const {
    int* found = reinterpret_cast<int*>(shared + SharedLayout::queries);
    const int rows = static_cast<int>(p.tile.rows()), rank = p.groups(k);
    for (int row = threadIdx.x; row < rows; row += threads) {
      const std::int64_t own = first_position(p.tile, row);
      int longer = 0;
      for (int other = 0; other < rows; ++other) {
        const std::int64_t t = first_position(p.tile, other);
        longer += t > own || (t == own && other < row);
      }
      if (longer == rank) *found = row;
    }
    __syncthreads();
    const int row = *found;
    __syncthreads();  // the queries overwrite it
    return row * p.shape.groups + k - rank * p.shape.groups;
  }
  // Of the row, in the tile.
  __device__ __forceinline__ int sequence() const {
    if constexpr (Params::after_cmp)
      return at.row / p.tile.tokens;
    else
      return at.row;
  }
  // Waits for the predecessor; after a launch of cmp only attend() does, because all but the outputs of cmp was there
  // before that launch began. Where the predecessor is project's product every CTA of a work item forms its q, k, v and
  // gate.
  __device__ __forceinline__ void wait_for_inputs() const {
    if constexpr (Params::projects) {
      rope_and_gate<T, threads>(p.project, p.product, p.columns, at.work_item, reinterpret_cast<float2*>(shared));
      __syncthreads();
    } else if constexpr (!Params::after_cmp) {
      griddep_wait();
    }
  }
  __device__ __forceinline__ void start() {
    [[maybe_unused]] FusedAppend<WarpTile, W, Params> append{p, at};
    if constexpr (Params::is_layer) append.load();
    const std::int64_t t = Params::after_cmp ? position_of_row(p.tile, at.row) : first_position(p.tile, at.row);
    copy_queries();
    if (threadIdx.x < branches)
      cp_async_word(shared_address(shared) + SharedLayout::gates + threadIdx.x * 4,
                    p.gate + at.work_item * branches + threadIdx.x, true);
    cp_async_commit();
    set_position(static_cast<int>(t));
    if constexpr (is_shard) at.start();
    if constexpr (Params::is_layer) append.store();
    plan_tiles();
    cp_async_wait<SharedLayout::slots>();  // the queries, the gates
    __syncthreads();
    if constexpr (is_quantised_tile<WarpTile>) {
      WarpTile::convert_queries(shared + SharedLayout::queries, threadIdx.x);
      __syncthreads();
    }
    if constexpr (Params::is_layer)
      if (p.log.position && threadIdx.x == 0) end_step();
  }
  __device__ __forceinline__ void copy_queries() const {
    WarpTile::copy_queries_async(shared_address(shared) + SharedLayout::queries,
                                 static_cast<const T*>(p.q) + std::int64_t{at.first_head} * size().d_k, size(),
                                 at.valid_heads, threadIdx.x, threads);
  }
  __device__ __forceinline__ void set_position(int t) {
    const BlockRules& r = p.shape.rules;
    at.t = t;
    at.n = t + 1 < r.l ? 0 : p.stride(t + 1 - r.l) + 1;
    at.eligible = p.block(t) + 1;
  }
  // Where rows lend tiles: begins the next tiles that this cluster borrows; after these its own ones, and returns true.
  __device__ __forceinline__ bool begin_cmp() {
    __syncthreads();  // the loans are there, the one before is done
    const bool is_own = !at.borrows();
    const int own_item = p.by_cluster(static_cast<int>(blockIdx.x));
    set_work_item(is_own ? own_item : at.lender_row() * p.shape.groups + at.group);
    pipeline.sequence = sequence();
    pipeline.load_pass = pipeline.load_panel = 0, pipeline.load_v = false;
    if (threadIdx.x % 32 == 0) store_ranges(at.cluster_warps - 1 - at.warp_in_cluster, tiles_per_span(cmp, p.shape));
    __syncwarp();
    if (is_own)
      start();
    else
      start_loan();
    return is_own;
  }
  __device__ __forceinline__ void start_loan() {
    copy_queries();
    cp_async_commit();
    set_position(static_cast<int>(first_position(p.tile, at.row)));
    if (threadIdx.x % 32 == 0) {
      ranges()[0].first += at.first_lent_tile(), ranges()[0].count = at.lent_tiles_end(), ranges()[0].high = at.n;
    }
    __syncwarp();
    pipeline.selected = -1;
    pipeline.cmp_tokens = at.n;
    pipeline.start(0);
    cp_async_wait<SharedLayout::slots>();  // the queries
    __syncthreads();
  }
  __device__ __forceinline__ void store_loan(const WarpTile& warp_tile) const {
    const FusedMerge<WarpTile, W, Params> merge{p, at, shared, at.lent_tiles_end() - at.first_lent_tile(), 0, 0};
    merge.store_lent(warp_tile, at.partial_of_loan());
    at.end_loan();
  }
  // Moves the position on once every CTA has read it. The next launch waits for this one.
  __device__ __forceinline__ void end_step() const {
    if (atomicInc(p.log.arrivals, gridDim.x - 1) != gridDim.x - 1) return;
    if constexpr (Params::lends) {
      at.store_loans();
      for (int i = 0; i < static_cast<int>(p.tile.rows()); ++i)
        atomicAdd(reinterpret_cast<unsigned long long*>(p.log.position) + i, 1ull);
      *p.log.step = log_row() + 1;
      return;
    }
    *p.log.position = at.t + 1;
    *p.log.step = at.t + 1 - p.log.first_position;
  }
  // Row of the logs; those from p.log.rows on do not exist.
  __device__ __forceinline__ int log_row() const {
    if constexpr (Params::lends)
      return at.loans->step;
    else
      return at.t - p.log.first_position;
  }

  __device__ __forceinline__ WarpTile make_tile() const {
    return WarpTile(shared + SharedLayout::queries, shared + SharedLayout::prob + at.warp * WarpTile::prob_bytes,
                    p.shape);
  }
  __device__ __forceinline__ typename WarpTile::Size size() const { return typename WarpTile::Size(p.shape); }
  // Index and number of warps, of the cluster, of the scoring ones or of the others, within those of this head tile.
  __device__ __forceinline__ int in_head_tile(int warps) const {
    return WarpTile::tuned ? warps : p.by_head_tiles(warps);
  }
  __device__ __forceinline__ TileRange* ranges() const {
    return reinterpret_cast<TileRange*>(shared + SharedLayout::ranges) + at.warp * 2;
  }
  __device__ __forceinline__ ScaleRange* scale_ranges() const {
    return reinterpret_cast<ScaleRange*>(shared + SharedLayout::scale_ranges) + at.warp * 2;
  }
  // Assigns tiles to this warp; how many there are depends on the position. The last warps take the window.
  __device__ __forceinline__ void assign_tiles() {
    const int from_last = at.cluster_warps - 1 - at.warp_in_cluster, per_segment = tiles_per_span(cmp, p.shape);
    pipeline.attends_sel = from_last >= p.win_warps;
    pipeline.ranges = ranges();
    pipeline.scale_ranges = scale_ranges();
    pipeline.cmp_tokens = p.max_tokens;
    if (threadIdx.x % 32 == 0) store_ranges(from_last, per_segment);
    __syncwarp();
    if constexpr (Params::after_cmp) return;
    // Prefetch the first tile to the L2 while the predecessor runs.
    const TileRows first = pipeline.memory_rows_of(0, in_head_tile(at.warp_in_cluster));
    __syncwarp();  // plan_tiles() overwrites the ranges read here
    if (threadIdx.x % 32 != 0 || first.count <= 0 || first.row < 0) return;  // < 0: a shorter sequence has no such page
    const int k_bytes = k_row_bytes<WarpTile>(p.shape), v_bytes = v_row_bytes<WarpTile>(p.shape);
    prefetch_l2(ranges()[0].k + std::int64_t{first.row} * k_bytes, first.count * k_bytes);
    if (!p.scores_only) prefetch_l2(ranges()[0].v + std::int64_t{first.row} * v_bytes, first.count * v_bytes);
  }
  __device__ __forceinline__ void store_ranges(int from_last, int per_segment) const {
    const LayerShape& s = p.shape;
    const std::int64_t plane = (p.tile.batch_begin + sequence()) * s.groups + at.group;
    const auto plane_rows = [&](const KvView& view) {
      const std::int64_t begin = Params::has_pages && view.pages.pages
                                     ? std::int64_t{at.group} * view.pages.rows * view.width
                                     : plane * view.plane_stride;
      return static_cast<const char*>(view.data) + begin * element_bytes<WarpTile>;
    };
    const Branch second = pipeline.attends_sel ? sel : win;
    const int span = pipeline.attends_sel ? s.rules.l_sel : window_span;
    if constexpr (is_quantised_tile<WarpTile>) {
      const auto scales_of = [&](const KvView& view) { return first_scale(view, plane, at.group); };
      scale_ranges()[0] = {scales_of(p.k[cmp]), scales_of(p.v[cmp])};
      scale_ranges()[1] = {scales_of(p.k[second]), scales_of(p.v[second])};
    }
    const int halo = is_shard ? p.k[cmp].map.halo : 0;  // in front of the first chunk
    ranges()[0] = {plane_rows(p.k[cmp]) + halo * WarpTile::k_bytes,
                   plane_rows(p.v[cmp]) + halo * WarpTile::v_bytes,
                   in_head_tile(at.warp_in_cluster),
                   in_head_tile(at.cluster_warps),
                   0,
                   static_cast<int>(s.lse.segment),
                   per_segment,
                   0,
                   0,
                   p.max_tokens};
    ranges()[1] = {plane_rows(p.k[second]),
                   plane_rows(p.v[second]),
                   in_head_tile(pipeline.attends_sel ? from_last - p.win_warps : from_last),
                   in_head_tile(pipeline.attends_sel ? at.scoring_warps : p.win_warps),
                   0,
                   span,
                   (span + tile_rows - 1) / tile_rows,
                   0,
                   0,
                   0};
  }

  // Blocks that begin at or before the position, of all ranks.
  __device__ __forceinline__ int all_eligible() const {
    if constexpr (is_shard)
      return at.all_eligible;
    else
      return at.eligible;
  }

  // Counts the tiles, and those of sel that are known before selection.
  __device__ __forceinline__ void plan_tiles() {
    const LayerShape& s = p.shape;
    const BlockRules& r = s.rules;
    const WindowRows rows = window_rows(r, p.k[win].map, at.t);
    const int begin = static_cast<int>(rows.begin), end = static_cast<int>(rows.end), first_span = begin / window_span;
    win_tiles =
        p.leave_out[win] || end <= begin ? 0 : ((end - 1) / window_span - first_span + 1) * tiles_per_span(win, s);
    sel_tiles = p.leave_out[sel] ? 0 : r.n_sel * tiles_per_span(sel, s);
    if (threadIdx.x % 32 == 0) {
      const int segment = static_cast<int>(s.lse.segment);
      TileRange &first = ranges()[0], &second = ranges()[1];
      if constexpr (is_shard)
        first.count = at.chunks * tiles_per_span(cmp, s);
      else
        first.count = Params::after_cmp ? 0 : p.segment(at.n + segment - 1) * tiles_per_span(cmp, s);
      if constexpr (Params::lends) first.first += at.loans->lent;
      first.first_span = first.low = 0, first.high = at.n;
      second.count = pipeline.attends_sel ? sel_tiles : win_tiles;
      second.first_span = pipeline.attends_sel ? 0 : first_span;
      second.low = pipeline.attends_sel ? 0 : begin, second.high = pipeline.attends_sel ? at.t + 1 : end;
      if constexpr (is_shard)
        if (pipeline.attends_sel) second.high = at.held_positions();
    }
    __syncwarp();
    const int lane = threadIdx.x % 32, eligible = all_eligible();
    const bool selects_all = eligible <= r.n_sel;
    int known_blocks = selects_all ? r.n_sel : r.n_init + r.n_local;
    int block = lane < r.n_init ? lane : eligible - r.n_local + (lane - r.n_init);
    if (selects_all) block = lane < eligible ? lane : -1;
    pipeline.selected = lane < known_blocks ? block : -1;
    if constexpr (is_shard) {
      at.selected = pipeline.selected;
      pipeline.selected = at.held_of_selected(known_blocks);
    }
    pipeline.cmp_tokens = at.n;
    pipeline.start(!pipeline.attends_sel ? win_tiles : sel_tiles == 0 ? 0 : known_blocks * tiles_per_span(sel, s));
  }

  // Whether blocks are scored by sums of tiles: a padded kernel decides it at run time.
  __device__ __forceinline__ bool has_block_sums() const {
    return WarpTile::tuned ? Sums : p.block_sums.memory != nullptr;
  }
  __device__ __forceinline__ int select_best(int tiles, int per_segment) const {
    if constexpr (!WarpTile::tuned)
      if (!has_block_sums()) return FusedSelect<WarpTile, W, false>{p, at, shared}.select(tiles, per_segment);
    return Select{p, at, shared}.select(tiles, per_segment);
  }
  __device__ __forceinline__ void mainloop(WarpTile& warp_tile, int pass) {
    const std::conditional_t<is_quantised_tile<WarpTile>, TileRange, const TileRange&> c = pipeline.ranges[pass];
    const bool has_pv = pass == 1 || !p.scores_only;
    float2* sums = p.tile_lse + at.tile_item * p.max_tiles * WarpTile::heads;
    int tokens = 0;
#pragma unroll 1
    for (int i = c.first; i < c.count; i += c.step) {
      const TileRows rows = pipeline.rows_of(pass, i);
      const bool has_halo = pipeline.has_halo(pass, i);
      if (rows.count <= 0 && !has_halo) {
        if (pass == 0 && threadIdx.x % 32 < WarpTile::heads)
          sums[i * WarpTile::heads + threadIdx.x % 32] = make_float2(neg_inf, 0.0f);
        continue;
      }
      if constexpr (is_quantised_tile<WarpTile>)
        pipeline.consume_keys([&](unsigned from, unsigned scales) {
          warp_tile.load_scales(scales, has_pv ? rows.count : 0);
          warp_tile.multiply_qk(from);
        });
      else
        pipeline.consume([&](unsigned from) {
          if constexpr (is_shard)
            if (has_halo) warp_tile.store_halo_score(p.block_sums.halo_scores(at.work_item, i), pipeline.halo_row());
          warp_tile.multiply_qk(from);
        });
#pragma unroll 1
      for (int panel = 1; panel < k_panels<WarpTile>(p.shape); ++panel)
        if constexpr (WarpTile::k_panels > 1)
          pipeline.consume([&](unsigned from) { warp_tile.multiply_qk(from, panel); });
      warp_tile.scale_scores();
      if constexpr (is_quantised_tile<WarpTile>) {
        if (pass == 0)
          warp_tile.store_last_score(p.block_sums.halo_scores(at.tile_item, 0), i + 1, rows.count, scores_policy);
        warp_tile.online_softmax(rows.count, [&] {
          if (pass == 0) warp_tile.store_block_sums(p.block_sums.sums(at.tile_item, 0), i, scores_policy);
        });
        if (pass == 0) warp_tile.store_tile_lse(sums, i);
      } else {
        BlockSumOutput block_output;
        if (has_block_sums()) {
          if (pass == 0)
            block_output = {p.block_sums.sums(at.tile_item, i),
                            pipeline.has_halo(0, i + 1) ? nullptr : p.block_sums.halo_scores(at.tile_item, i + 1),
                            p.keeps_scores, scores_policy};
          if (pass == 0) warp_tile.store_last_score(block_output, rows.count);
        } else if (pass == 0) {
          warp_tile.store_scores(
              {p.scores + at.first_head * p.pitch + rows.row, p.pitch, p.keeps_scores, scores_policy}, rows.count,
              at.valid_heads);
        }
        warp_tile.online_softmax(rows.count, block_output);
        if (pass == 0) warp_tile.store_tile_lse(sums + i * WarpTile::heads);
      }
      if constexpr (is_quantised_tile<WarpTile>) {
        pipeline.consume_values([&](unsigned from) {
          if (has_pv) warp_tile.multiply_pv(from);
        });
      } else if (has_pv) {
        for_each_part<WarpTile>(p.shape, [&](auto part) {
          if constexpr (part < WarpTile::v_panels)
            pipeline.consume([&](unsigned from) { warp_tile.template multiply_pv<part>(from); });
        });
      }
      tokens += rows.count;
    }
    count_reads(pass, tokens);
  }
  __device__ __forceinline__ void count_reads(int pass, int tokens) const {
    if (threadIdx.x % 32 == 0 && tokens > 0 && at.head_tile == 0) {
      std::int64_t* reads = pass == 0 ? p.reads[cmp] : pipeline.attends_sel ? p.reads[sel] : p.reads[win];
      if constexpr (Params::is_layer) {
        if (log_row() >= p.log.rows) return;
        reads += std::int64_t{log_row()} * p.log.counters;
      }
      const int list = Params::after_cmp ? sequence() * p.shape.groups + at.group : at.work_item;
      atomicAdd(reinterpret_cast<unsigned long long*>(reads) + list, static_cast<unsigned long long>(tokens));
    }
  }
  // The second pass where cmp has had a launch of its own: no tile decides which blocks are chosen.
  __device__ __forceinline__ void attend_second(WarpTile& warp_tile) {
    constexpr bool to_reference = requires { warp_tile.softmax_to_reference(0); };
    constexpr bool ahead = [] {
      if constexpr (requires { WarpTile::loads_ahead; }) return WarpTile::loads_ahead;
      return false;
    }();
    int tokens = 0;
    pipeline.for_each_tile([&](int count) {
      pipeline.consume([&](unsigned from) {
        if constexpr (ahead)
          warp_tile.multiply_qk_ahead(from);
        else
          warp_tile.multiply_qk(from);
      });
#pragma unroll 1
      for (int panel = 1; panel < k_panels<WarpTile>(p.shape); ++panel)
        pipeline.consume([&](unsigned from) { warp_tile.multiply_qk(from, panel); });
      if constexpr (to_reference) {
        warp_tile.softmax_to_reference(count);
      } else {
        warp_tile.scale_scores();
        warp_tile.online_softmax(count);
      }
      for_each_part<WarpTile>(p.shape, [&](auto part) {
        if constexpr (part < WarpTile::v_panels)
          pipeline.consume([&](unsigned from) {
            if constexpr (ahead)
              warp_tile.multiply_pv_ahead(from);
            else
              warp_tile.template multiply_pv<part>(from);
          });
      });
      tokens += count;
    });
    if constexpr (to_reference) warp_tile.sum_lanes();
    count_reads(1, tokens);
  }

  // Between the two passes. Warps of the window do not wait for selection: they arrive at its cluster barrier
  // beforehand and wait on it after their window.
  __device__ __forceinline__ void select_blocks() {
    const BlockRules& r = p.shape.rules;
    if constexpr (is_shard) at.end_phase(StepPhase::attend_cmp);
    if (p.cluster > 1)  // tile outputs are visible, and every CTA has started: remote writes are safe
      cluster_barrier();
    else
      __syncthreads();
    if constexpr (is_shard) at.end_phase(StepPhase::cluster_cmp);
    if constexpr (Params::lends)
      if (pipeline.attends_sel || p.leave_out[sel]) at.wait_for_lent();
    if (p.leave_out[sel]) return;
    const bool selects_all = all_eligible() <= r.n_sel, scores = !selects_all || p.p_slc;
    if (!pipeline.attends_sel) {
      cluster_arrived = scores && p.cluster > 1;
      if (cluster_arrived) cluster_arrive_relaxed();
      return;
    }
    if (scores) {
      const int best = select_best(cmp_tiles(), pipeline.ranges[0].tiles_per_span);
      if constexpr (is_shard) {
        if (!selects_all) at.selected = best;
        int held;
        pipeline.selected = at.held_of_selected(held);
      } else {
        if (!selects_all && threadIdx.x % 32 >= r.n_init + r.n_local) pipeline.selected = best;
      }
    }
    pipeline.release_all_tiles();
    if (!is_shard && at.warp_in_cluster == 0) store_selected();
  }
  // Tiles of cmp that were attended, here or before.
  __device__ __forceinline__ int cmp_tiles() const {
    if constexpr (Params::after_cmp)
      return p.segment(at.n + static_cast<int>(p.shape.lse.segment) - 1) * pipeline.ranges[0].tiles_per_span;
    else
      return pipeline.ranges[0].count;
  }
  __device__ __forceinline__ FusedMerge<WarpTile, W, Params> merge() const {
    int own_tiles = pipeline.ranges[0].count;
    if constexpr (Params::lends) own_tiles -= at.loans->lent;
    return {p, at, shared, own_tiles, sel_tiles, win_tiles};
  }
  // The selected blocks, one a lane; those that this rank holds are in the pipeline.
  __device__ __forceinline__ int selected() const {
    if constexpr (is_shard)
      return at.selected;
    else
      return pipeline.selected;
  }
  // Stores the selected blocks in rising order.
  __device__ __forceinline__ void store_selected() const {
    const int lane = threadIdx.x % 32, n = p.shape.rules.n_sel, own = selected();
    int index = 0;
#pragma unroll 1
    for (int other = 0; other < n; ++other) {
      const int block = __shfl_sync(0xffffffffu, own, other);
      index += block >= 0 && block < own;
    }
    if (lane < n) p.selected[std::int64_t{at.work_item} * n + (own < 0 ? lane : index)] = own;
    if constexpr (Params::is_layer)
      if (lane < n && p.log.selected && log_row() < p.log.rows)
        p.log.selected[log_row() * p.log.selected_count + std::int64_t{at.work_item} * n + (own < 0 ? lane : index)] =
            own;
  }
};

/// Both passes of a step.
template <class WarpTile, int W, bool Sums, class Params>
__device__ __forceinline__ void attend(FusedDecode<WarpTile, W, Sums, Params>& step, ParkedTile<WarpTile>& cmp_tile,
                                       WarpTile& warp_tile) {
  if constexpr (Params::after_cmp) {
    griddep_wait();
    step.select_blocks();
    warp_tile = step.make_tile();
    step.attend_second(warp_tile);
  } else {
#pragma unroll 1
    for (int pass = 0;; ++pass) {
      bool is_own = true;
      if constexpr (Params::lends)
        if (pass == 0) is_own = step.begin_cmp();
      step.mainloop(warp_tile, pass);
      if (pass == 1) break;
      if constexpr (Params::lends)
        if (!is_own) {
          step.store_loan(warp_tile);
          warp_tile = step.make_tile();
          --pass;
          continue;
        }
      cmp_tile.park(warp_tile);
      warp_tile = step.make_tile();
      step.select_blocks();
    }
    if (step.cluster_arrived) cluster_wait();
  }
}
/// Both passes of a step of a tuned instance. The partials of the cluster are sent, and not yet visible.
template <class WarpTile, int W, bool Sums, class Params>
__device__ __forceinline__ FusedMerge<WarpTile, W, Params> attend_and_send(
    FusedDecode<WarpTile, W, Sums, Params>& step) {
  static_assert(WarpTile::parts == 1);
  WarpTile warp_tile = step.make_tile();
  ParkedTile<WarpTile> cmp_tile(warp_tile);
  attend(step, cmp_tile, warp_tile);
  if constexpr (Params::is_shard) step.at.end_phase(StepPhase::attend_sel);
  const auto merge = step.merge();
  merge.template send_partials<0>(cmp_tile, warp_tile, step.pipeline.attends_sel);
  return merge;
}

template <class WarpTile, int W, bool Sums, class Params = FusedDecodeParams>
__global__ void __launch_bounds__(32 * W, W < fused_warps ? 2 : 1)
    fused_decode_kernel(const __grid_constant__ Params p) {
  using SharedLayout = FusedSharedLayout<WarpTile, W>;
  extern __shared__ __align__(128) char shared[];
  FusedDecode<WarpTile, W, Sums, Params> step(p, shared);
  step.wait_for_inputs();
  if constexpr (Params::lends)
    step.at.template plan<WarpTile, W>(p, shared);
  else
    step.start();
  WarpTile warp_tile = step.make_tile();
  ParkedTile<WarpTile> cmp_tile(warp_tile);
  attend(step, cmp_tile, warp_tile);
  const auto merge = step.merge();
  const bool is_split = W >= fused_warps && merge.ctas() > 1;  // several CTAs have partials of a head tile
  if (!SharedLayout::whole && is_split) cluster_barrier();     // no CTA reads what the partials overlap
  for_each_part<WarpTile>(p.shape, [&](auto part) {
    if (part > 0 && is_split) cluster_barrier();  // the part before is merged
    merge.template send_partials<part>(cmp_tile, warp_tile, step.pipeline.attends_sel);
    if (!is_split) return;
    cluster_barrier();
    merge.template merge<part>();
  });
  if constexpr (Params::lends) step.at.clear_arrivals();
}

}  // namespace nsa::gpu
