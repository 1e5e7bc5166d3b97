#pragma once
// Compressed attention of a decode step of several query tokens: K and V come to shared memory once for four query
// tokens of a sequence. This kernel serves fp32 and padded instances; tuned ones of 16-bit storage have warps that
// multiply together (decode/tokens/warpgroup_kernel.cuh).
//
// Tiling: a CTA has a (sequence, four query tokens, group, head tile) and a split of the KV tiles of cmp, 32 rows each.
// Warp w has query token w and attends all of these tiles, with the rows past its own position masked. A fifth warp
// copies K and V into a ring; a full and an empty barrier of each slot let every warp go at its own pace, as far as the
// ring reaches. Every warp stores the partial of its own row, as decode/split_kv/kernel.cuh does for a CTA, and the
// same scores, (m, sum) and block sums by tile: the arithmetic on a tile is that of a warp there, so the same blocks
// are chosen, bit for bit.
//
// Bytes: K and V once per four query tokens; block sums 9/8 * heads / (2 * Dk + 2 * Dv) of the bytes of cmp for each
// query token. Bound: the products and exponentials of four query tokens, which take about as long as the bytes.
// Capability 9.0.

#include "kernels/cuda/decode/split_kv/kernel.cuh"
#include "kernels/cuda/decode/tokens/warpgroup_kernel.cuh"
#include "kernels/cuda/primitives/mbarrier.cuh"

namespace nsa::gpu {

constexpr int token_threads = decode_threads + 32;  ///< and the warp that copies

/// Shared memory of a CTA: the ring, the queries and P of each warp, a halo row and two barriers beside every slot. The
/// epilogue reuses the ring for a part of o of each warp. The queries of the other warps take the place of slots.
template <class WarpTile>
struct TokenSharedLayout {
  using Warp = DecodeSharedLayout<WarpTile>;
  static constexpr int slot_bytes = Warp::slot_bytes, row_bytes = Warp::row_bytes,
                       more_queries = (decode_warps - 1) * WarpTile::query_bytes,
                       slots = decode_warps * Warp::slots - (more_queries + slot_bytes - 1) / slot_bytes;
  static constexpr int queries = slots * slot_bytes, prob = queries + decode_warps * WarpTile::query_bytes,
                       halo_rows = prob + decode_warps * WarpTile::prob_bytes, full = halo_rows + slots * row_bytes,
                       empty = full + slots * 8, bytes = empty + slots * 8;
  static constexpr int pitch = WarpTile::v_columns + 8, warp_floats = WarpTile::part_heads * pitch;
  static_assert(slots >= 3 && decode_warps * warp_floats * 4 <= queries);
};

/// The mainloop of a warp. The base's tiles and copies are those of the last query token, which has the most rows.
template <class WarpTile>
struct TokenMainloop : KvMainloop<WarpTile, cmp> {
  using Base = KvMainloop<WarpTile, cmp>;
  using SharedLayout = TokenSharedLayout<WarpTile>;
  KvTiles<cmp> own;  // of the query token of this warp
  PipelineState<SharedLayout::slots> state;

  // Of query token `token` of those of the CTA, whose first row is `first_row`.
  __device__ __forceinline__ TokenMainloop(const DecodeParams& params, const DecodeJob& job, char* memory,
                                           int first_row, int tokens, int token, int group, int split)
      : Base(params, job, memory,
             {(first_row + tokens - 1) * params.shape.groups + group, split, INT32_MAX, job.splits, 0}),
        own(params.shape, job.k.map, position_of_row(params.tile, first_row + token)) {
    const LayerShape& s = params.shape;
    this->row = first_row + token;
    const int row_group = this->row * s.groups + group;
    this->work_item = row_group * params.head_tiles + blockIdx.y;
    this->first_head = this->row * s.heads() + group * s.heads_per_group + blockIdx.y * WarpTile::heads;
    this->partial_index = std::int64_t{this->work_item} * job.splits + split;
    this->ring = shared_address(memory);
    this->halo_rows = this->ring + SharedLayout::halo_rows;
    this->first = this->load_tile = split;
    this->advance_load();
  }
  // By one thread, before a __syncthreads.
  static __device__ __forceinline__ void init_barriers(unsigned memory, int tokens) {
    for (int slot = 0; slot < SharedLayout::slots; ++slot) {
      mbarrier_init(memory + SharedLayout::full + slot * 8, 32);
      mbarrier_init(memory + SharedLayout::empty + slot * 8, tokens);
    }
  }
  __device__ __forceinline__ unsigned full() const { return this->ring + SharedLayout::full + state.slot * 8; }
  __device__ __forceinline__ unsigned empty() const { return this->ring + SharedLayout::empty + state.slot * 8; }

  // The warp that copies: the rows of all tiles, each into the next slot, once all query tokens have used it.
  __device__ __forceinline__ void produce() {
#pragma unroll 1
    while (this->load_tile < this->end) {
      mbarrier_wait(empty(), state.phase ^ 1);
      if (!this->load_v && this->load_panel == 0 && this->has_halo(this->load_tile))
        cp_async_row(this->halo_rows + state.slot * SharedLayout::row_bytes,
                     this->k + (this->load_rows.row - 1) * k_row_bytes<WarpTile>(this->s),
                     k_row_bytes<WarpTile>(this->s));
      this->copy_rows(this->ring + state.slot * SharedLayout::slot_bytes);
      cp_async_arrive(full());
      state.advance();
      this->advance_copy();
    }
    cp_async_commit();
    cp_async_wait<0>();
  }

  // Waits for the next slot and uses it.
  template <class Use>
  __device__ __forceinline__ void consume_shared(Use use) {
    mbarrier_wait(full(), state.phase);
    this->slot = state.slot;
    use(this->ring + state.slot * SharedLayout::slot_bytes);
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(empty());
    state.advance();
  }
  __device__ __forceinline__ float2* tile_lse(int i) const {
    return this->p.tile_lse + (this->work_item * this->p.max_tiles + i) * WarpTile::heads;
  }
  // Tile i, from the slots that follow; another query token may have rows of it that this one has not.
  __device__ __forceinline__ void attend(WarpTile& warp_tile, int i) {
    const bool has_halo = this->has_halo(i), exists = i < own.count;
    const KvRows now = exists ? own(i) : KvRows{};
    const bool reads = exists && (now.count > 0 || has_halo);
    if (exists && !reads) store_no_lse(i);
    consume_shared([&](unsigned from) {
      if (!reads) return;
      if (has_halo) this->store_halo(warp_tile, i, now.column);
      warp_tile.multiply_qk(from);
    });
#pragma unroll 1
    for (int panel = 1; panel < k_panels<WarpTile>(this->s); ++panel)
      consume_shared([&](unsigned from) {
        if (reads) warp_tile.multiply_qk(from, panel);
      });
    if (reads) {
      warp_tile.scale_scores();
      this->softmax_tile(warp_tile, i, now);
      warp_tile.store_tile_lse(tile_lse(i));
      this->count += now.count;
    }
    if (this->has_pv)
      for_each_part<WarpTile>(this->s, [&](auto panel) {
        consume_shared([&](unsigned from) {
          if (reads) warp_tile.template multiply_pv<panel>(from);
        });
      });
  }
  __device__ __forceinline__ void store_no_lse(int i) const {
    if (static_cast<int>(threadIdx.x) % 32 < WarpTile::heads)
      tile_lse(i)[threadIdx.x % 32] = make_float2(neg_inf, 0.0f);
  }
  __device__ __forceinline__ void run_tokens(WarpTile& warp_tile) {
#pragma unroll 1
    for (int i = this->first; i < this->end; i += this->step) {
      if (this->tiles(i).count > 0 || this->has_halo(i))
        attend(warp_tile, i);
      else if (i < own.count)
        store_no_lse(i);
    }
  }

  // o and (m, sum) of the row, in the place of the ring.
  __device__ __forceinline__ void store_row(const WarpTile& warp_tile) const {
    const int d_v = typename WarpTile::Size(this->s).d_v;
    float* to = this->job.partials + this->partial_index * decode_partial_floats(WarpTile::heads, d_v);
    warp_tile.store_state(reinterpret_cast<float2*>(to + WarpTile::heads * d_v));
    for_each_part<WarpTile>(this->s, [&](auto part) { store_row_part<part>(warp_tile, to, d_v); });
  }
  template <int Part>
  __device__ __forceinline__ void store_row_part(const WarpTile& warp_tile, float* to, int d_v) const {
    constexpr int quads = WarpTile::v_columns / 4;
    float* o = reinterpret_cast<float*>(this->shared) + this->warp * SharedLayout::warp_floats;
    __syncwarp();  // the part before is stored
    warp_tile.template store_scaled_o<Part>(o, [](int, float) { return 1.0f; });
    __syncwarp();
    for (int item = threadIdx.x % 32; item < this->valid_heads * quads; item += 32) {
      const int head = item / quads, column = item % quads * 4;
      if (!WarpTile::tuned && Part * WarpTile::v_columns + column >= d_v) continue;
      *reinterpret_cast<float4*>(to + head * d_v + Part * WarpTile::v_columns + column) =
          *reinterpret_cast<const float4*>(o + head * SharedLayout::pitch + column);
    }
  }
};

template <class WarpTile>
__global__ void __launch_bounds__(token_threads, WarpTile::parts > 1 ? 1 : WarpTile::ctas_per_sm)
    token_kernel(const __grid_constant__ DecodeParams p) {
  using SharedLayout = TokenSharedLayout<WarpTile>;
  using Size = typename WarpTile::Size;
  extern __shared__ __align__(128) char shared[];
  griddep_wait();
  const DecodeJob& job = p.jobs[0];
  const int fours = token_fours(p.tile), split = blockIdx.x % job.splits, item = blockIdx.x / job.splits,
            four = item % fours, group = item / fours % p.shape.groups, sequence = item / fours / p.shape.groups,
            first_token = four * decode_warps, tokens = min(decode_warps, p.tile.tokens - first_token),
            warp = threadIdx.x / 32;
  TokenMainloop<WarpTile> mainloop(p, job, shared, sequence * p.tile.tokens + first_token, tokens,
                                   min(warp, tokens - 1), group, split);
  if (threadIdx.x == 0) mainloop.init_barriers(shared_address(shared), tokens);
  __syncthreads();
  if (warp == decode_warps) return mainloop.produce();
  if (warp >= tokens) return;
  char* queries = shared + SharedLayout::queries + warp * WarpTile::query_bytes;
  WarpTile::load_queries(
      queries, static_cast<const typename WarpTile::Type*>(p.q) + std::int64_t{mainloop.first_head} * Size(p.shape).d_k,
      Size(p.shape), mainloop.valid_heads, threadIdx.x % 32, 32);
  __syncwarp();
  WarpTile warp_tile(queries, shared + SharedLayout::prob + warp * WarpTile::prob_bytes, p.shape);
  mainloop.run_tokens(warp_tile);
  if (threadIdx.x % 32 == 0 && blockIdx.y == 0 && mainloop.count > 0 && job.reads)
    atomicAdd(reinterpret_cast<unsigned long long*>(job.reads) + sequence * p.shape.groups + group,
              static_cast<unsigned long long>(mainloop.count));
  if (!mainloop.has_pv) return;
  named_barrier_sync(1, 32 * tokens);  // every query token is through with the ring
  mainloop.store_row(warp_tile);
}

template <DType Storage, bool Tuned>
void launch_tokens(const DecodeParams& p, Stream* stream) {
  with_split_kv_tile<Storage, Tuned>(p.shape, [&](auto tile) {
    using WarpTile = typename decltype(tile)::type;
    using Tile = typename Together<WarpTile>::Tile;
    const dim3 grid(static_cast<unsigned>(p.tile.batches * p.shape.groups * token_fours(p.tile) * p.jobs[0].splits),
                    static_cast<unsigned>(p.head_tiles));
    if constexpr (std::is_void_v<Tile>) {
      launch_pdl(token_kernel<WarpTile>, grid, token_threads, TokenSharedLayout<WarpTile>::bytes, stream, 1, p);
    } else {
      const RowMap& map = p.jobs[0].k.map;
      const bool plain =
          p.block_sums.memory && !p.scores_only && map.chunk == INT64_MAX && p.shape.lse.segment % tile_rows == 0;
      launch_pdl(plain ? warpgroup_token_kernel<Tile, true> : warpgroup_token_kernel<Tile, false>, grid, decode_threads,
                 WarpgroupLayout<Tile>::bytes, stream, 1, p);
    }
  });
}

}  // namespace nsa::gpu
