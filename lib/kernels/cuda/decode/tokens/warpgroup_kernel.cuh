#pragma once
// Compressed attention of a decode step of several query tokens in tuned instances of 16-bit storage: the 16 heads of
// four query tokens of a sequence are the 64 rows of a warpgroup's products (decode/tokens/warpgroup_tile.cuh).
//
// Tiling: a CTA of four warps has a (sequence, four query tokens, group, head tile) and a split of the KV tiles of cmp,
// 32 rows each. Warp w has query token w, with the rows past its own position masked. All warps copy K and V of a tile
// into a stage of a ring; one barrier a tile ends the use of the stage before and begins that of the next. Every warp
// stores the partial of its own row, as decode/split_kv/kernel.cuh does for a CTA, and the same scores, (m, sum) and
// block sums by tile, bit for bit: the same blocks are chosen.
//
// Bytes: K and V once per four query tokens; block sums 9/8 * heads / (2 * Dk + 2 * Dv) of the bytes of cmp for each
// query token. Bound: the exponentials and sums of four query tokens, in 12 warps an SM whose latencies hide one
// another, which take about as long as the bytes. Capability 9.0 (sm_90a).

#include "kernels/cuda/decode/split_kv/kernel.cuh"
#include "kernels/cuda/decode/tokens/warpgroup_tile.cuh"

namespace nsa::gpu {

/// Shared memory of a CTA: the stages, the queries, a halo row beside every stage. The epilogue reuses the ring for o
/// of each warp.
template <class WarpTile>
struct WarpgroupLayout {
  static constexpr int k_tile = slot_rows * WarpTile::k_bytes, stage_bytes = k_tile + slot_rows * WarpTile::v_bytes;
  static constexpr int all_queries = decode_warps * WarpTile::query_bytes, row_bytes = WarpTile::k_bytes;
  static constexpr int cta_bytes = (WarpTile::ctas_per_sm > 2 ? 74 : 112) << 10;
  static constexpr int stages = std::min(6, (cta_bytes - all_queries) / (stage_bytes + row_bytes));
  static constexpr int queries = stages * stage_bytes, halo_rows = queries + all_queries,
                       bytes = halo_rows + stages * row_bytes;
  static constexpr int pitch = WarpTile::v_columns + 8, warp_floats = WarpTile::heads * pitch;
  static_assert(stages >= 3 && decode_warps * warp_floats * 4 <= queries);
};

/// The mainloop of a warp. The base's tiles and copies are those of the last query token, which has the most rows.
template <class WarpTile>
struct WarpgroupMainloop : KvMainloop<WarpTile, cmp> {
  using Base = KvMainloop<WarpTile, cmp>;
  using Layout = WarpgroupLayout<WarpTile>;
  static constexpr int heads = WarpTile::heads;
  KvTiles<cmp> own;              // of the query token of this warp
  bool is_token;                 // whether this warp has a query token
  bool in_order;                 // tile i begins at token 32 i and has no halo
  std::int64_t sums_at, lse_at;  // of its row and group, in the block sums and the (m, sum) of tiles
  int halos_at, maxima_at;       // behind the block sums

  // The CTA has `tokens` query tokens, the first of which has row `first_row`.
  __device__ __forceinline__ WarpgroupMainloop(const DecodeParams& params, const DecodeJob& job, char* memory,
                                               int first_row, int tokens, int group, int split)
      : Base(params, job, memory,
             {(first_row + tokens - 1) * params.shape.groups + group, split, INT32_MAX, job.splits, 0}),
        own(params.shape, job.k.map,
            position_of_row(params.tile, first_row + min(static_cast<int>(threadIdx.x) / 32, tokens - 1))),
        is_token(static_cast<int>(threadIdx.x) / 32 < tokens) {
    const LayerShape& s = params.shape;
    this->row = first_row + min(this->warp, tokens - 1);
    const int row_group = this->row * s.groups + group;
    this->work_item = row_group * params.head_tiles + blockIdx.y;
    this->first_head = this->row * s.heads() + group * s.heads_per_group + blockIdx.y * heads;
    this->partial_index = std::int64_t{this->work_item} * job.splits + split;
    this->ring = shared_address(memory);
    this->halo_rows = this->ring + Layout::halo_rows;
    this->first = this->load_tile = split;
    this->advance_load();
    in_order = shards_of(job.k.map) == 1 && s.lse.segment == own.per_span * tile_rows;
    sums_at = this->work_item * params.block_sums.item_floats;
    halos_at = params.block_sums.tiles * heads * tile_blocks, maxima_at = halos_at + params.block_sums.tiles * heads;
    lse_at = this->work_item * params.max_tiles * heads;
    // Kept in registers: the compiler would compute them again for each tile.
    asm("" : "+l"(sums_at), "+l"(lse_at), "+r"(halos_at), "+r"(maxima_at));
  }

  __device__ __forceinline__ const char* rows_at(const char* plane, const KvView& view, int row_bytes) const {
    const KvRows& rows = this->load_rows;
    return plane + rows.owner * view.rank_stride * static_cast<int>(sizeof(typename WarpTile::Type)) +
           rows.row * row_bytes;
  }
  // Issues this warp's copies of the next tile with rows, if there is one.
  __device__ __forceinline__ void issue_stage(int stage) {
    if (this->load_tile < this->end) {
      const unsigned to = this->ring + stage * Layout::stage_bytes;
      if (this->warp == 0 && has_halo_at(this->load_tile))
        cp_async_row(this->halo_rows + stage * Layout::row_bytes,
                     this->k + (this->load_rows.row - 1) * WarpTile::k_bytes, WarpTile::k_bytes);
      cp_async_panels<WarpTile::k_bytes>(to, rows_at(this->k, this->job.k, WarpTile::k_bytes), this->load_rows.count,
                                         this->kv_policy);
      if (this->has_pv)
        cp_async_panels<WarpTile::v_bytes>(to + Layout::k_tile, rows_at(this->v, this->job.v, WarpTile::v_bytes),
                                           this->load_rows.count, this->kv_policy);
      this->load_tile += this->step;
      this->advance_load();
    }
    cp_async_commit();
  }
  __device__ __forceinline__ void start() {
    for (int stage = 0; stage < Layout::stages - 1; ++stage) issue_stage(stage);
  }

  __device__ __forceinline__ bool has_halo_at(int i) const { return !in_order && this->has_halo(i); }
  // Tokens below n of tile i.
  __device__ __forceinline__ int tokens_of(int n, int i) const {
    if (in_order) return min(tile_rows, n - i * tile_rows);
    const int segment = static_cast<int>(this->s.lse.segment), per_span = own.per_span,
              u = per_span == 2 ? i / 2 : i / per_span,
              begin = static_cast<int>(segment_at(this->job.k.map, u)) * segment;
    return min(tile_rows, min(segment, n - begin) - (i - u * per_span) * tile_rows);
  }
  __device__ __forceinline__ float2* lse(int i) const { return this->p.tile_lse + lse_at + i * heads; }
  // Online softmax of `count` tokens with the outputs for rank; as KvMainloop::softmax_tile().
  __device__ __forceinline__ void softmax_tile(WarpTile& warp_tile, int i, int count) const {
    if (this->p.block_sums.memory) {
      float* sums = this->p.block_sums.memory + sums_at;
      const BlockSumOutput rows{sums + i * (heads * tile_blocks),
                                has_halo_at(i + 1) ? nullptr : sums + halos_at + (i + 1) * heads, this->p.keeps_scores,
                                this->scores_policy};
      warp_tile.store_last_score(rows, count);
      warp_tile.online_softmax(count, rows);
      warp_tile.store_tile_max(sums + maxima_at + (i + 1) * heads, rows);
    } else {
      warp_tile.store_scores(this->scores_at(own(i).column), count, this->valid_heads);
      warp_tile.online_softmax(count);
    }
    warp_tile.store_tile_lse(lse(i));
  }
  // Tile i, of which this query token has `count` tokens and perhaps the halo; `reads`: any of it.
  __device__ __forceinline__ void attend(WarpTile& warp_tile, int i, int count, bool reads) {
    const unsigned k = this->ring + this->slot * Layout::stage_bytes;
    if (reads && has_halo_at(i)) this->store_halo(warp_tile, i, own(i).column);
    warp_tile.multiply_qk(k);
    if (reads) {
      warp_tile.scale_scores();
      softmax_tile(warp_tile, i, count);
      this->count += count;
    } else {
      warp_tile.clear_scores();
    }
    if (this->has_pv) warp_tile.multiply_pv(k + Layout::k_tile);
  }
  __device__ __forceinline__ void run_tokens(WarpTile& warp_tile) {
    int next = Layout::stages - 1;  // the stage to fill
#pragma unroll 1
    for (int i = this->first; i < this->end; i += this->step) {
      const bool has_halo = has_halo_at(i), exists = is_token && i < own.count;
      const int count = exists ? tokens_of(own.n, i) : 0;
      const bool reads = exists && (count > 0 || has_halo);
      if (exists && !reads && static_cast<int>(threadIdx.x) % 32 < heads)
        lse(i)[threadIdx.x % 32] = make_float2(neg_inf, 0.0f);
      // Another query token may have rows of it that this one has not.
      if (tokens_of(this->tiles.n, i) <= 0 && !has_halo) continue;
      cp_async_wait<Layout::stages - 2>();
      fence_proxy_async();  // the products read what cp.async wrote
      __syncthreads();      // the tile is here, and all are through with the one before
      issue_stage(next);
      next = next + 1 == Layout::stages ? 0 : next + 1;
      attend(warp_tile, i, count, reads);
      this->slot = this->slot + 1 == Layout::stages ? 0 : this->slot + 1;
    }
  }

  // o and (m, sum) of the row, in the place of the ring.
  __device__ __forceinline__ void store_row(const WarpTile& warp_tile) const {
    constexpr int d_v = WarpTile::d_v, quads = d_v / 4;
    float *to = this->job.partials + this->partial_index * decode_partial_floats(heads, d_v),
          *o = reinterpret_cast<float*>(this->shared) + this->warp * Layout::warp_floats;
    warp_tile.store_state(reinterpret_cast<float2*>(to + heads * d_v));
    warp_tile.store_scaled_o(o, [](int, float) { return 1.0f; });
    __syncwarp();
    for (int item = threadIdx.x % 32; item < this->valid_heads * quads; item += 32)
      reinterpret_cast<float4*>(to)[item] =
          *reinterpret_cast<const float4*>(o + item / quads * Layout::pitch + item % quads * 4);
  }
};

template <class WarpTile>
__global__ void __launch_bounds__(decode_threads, WarpTile::ctas_per_sm)
    warpgroup_token_kernel(const __grid_constant__ DecodeParams p) {
  using Layout = WarpgroupLayout<WarpTile>;
  extern __shared__ __align__(1024) char stages[];
  griddep_wait();
  const DecodeJob& job = p.jobs[0];
  const int fours = token_fours(p.tile), split = blockIdx.x % job.splits, item = blockIdx.x / job.splits,
            four = item % fours, group = item / fours % p.shape.groups, sequence = item / fours / p.shape.groups,
            first_token = four * decode_warps, tokens = min(decode_warps, p.tile.tokens - first_token);
  WarpgroupMainloop<WarpTile> mainloop(p, job, stages, sequence * p.tile.tokens + first_token, tokens, group, split);
  mainloop.start();
  char* queries = stages + Layout::queries + mainloop.warp * WarpTile::query_bytes;
  WarpTile::load_queries(
      queries, static_cast<const typename WarpTile::Type*>(p.q) + std::int64_t{mainloop.first_head} * WarpTile::d_k,
      typename WarpTile::Size(p.shape), mainloop.valid_heads, threadIdx.x % 32, 32);
  __syncwarp();
  WarpTile warp_tile(queries, nullptr, p.shape);
  mainloop.run_tokens(warp_tile);
  if (threadIdx.x % 32 == 0 && blockIdx.y == 0 && mainloop.count > 0 && job.reads)
    atomicAdd(reinterpret_cast<unsigned long long*>(job.reads) + sequence * p.shape.groups + group,
              static_cast<unsigned long long>(mainloop.count));
  if (!mainloop.has_pv) return;
  __syncthreads();  // all are through with the ring
  if (mainloop.is_token) mainloop.store_row(warp_tile);
}

}  // namespace nsa::gpu
