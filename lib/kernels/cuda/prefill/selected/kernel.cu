// Prefill's selected branch, 16-bit storage: neighbouring queries share the blocks that a CTA loads.
//
// Tiling: a CTA takes a group and 12 consecutive queries, a consumer warp each: a query's (up to 16) heads are the M of
// m16n8k16, its q stays in registers. Where groups have up to 8 heads a warp takes up to 16 consecutive queries: their
// heads are its rows, it takes every block that one of them selected, and the rows of others get nothing from it. Four
// more warps: one schedules the union of the queries' blocks, two load each block's K and V once, through a ring each
// (tensor copies, 128-byte swizzle), and one notifies every query that selected the block of its slot. A consumer
// releases K as soon as the scores are computed, and a slot is empty when all queries that selected its block have
// released it: a warp waits for its own blocks only, not for other warps. No product is wasted, however little the
// selections overlap. CTAs are persistent and take one of every gridDim.x work items: late queries, which have more
// blocks, first, if the L2 holds K and V of all groups; otherwise group after group. FLOPs: 2 (Dk + Dv) a (head,
// selected token). Bytes: from L2, a block's K and V once per 12 queries that share it; from shared memory, once per
// query that selected it (32 KB at Dk = Dv = 128: 256 cycles). Bound: the L2 where few blocks are shared, otherwise
// shared memory and tensor cores alike.

#include "kernels/cuda/prefill/selected/consumer.cuh"
#include "kernels/cuda/prefill/selected/producer.cuh"
#include "kernels/cuda/prefill/selected/scheduler.cuh"
#include "kernels/cuda/prefill/selected/shared_scheduler.cuh"
#include "kernels/cuda/prefill/stages.cuh"

namespace nsa::gpu {

using namespace selected;

namespace {

// The four warps that are not consumers.
template <int DK, int DV, bool Tuned, int MaxBlocks>
__device__ __forceinline__ void produce(const SelectedParams& p, const Shared<DK, DV>& shared, int warp) {
  if (threadIdx.x == 32 * consumer_warps)
    Producer<DK, DV>{p, shared}.load_keys();
  else if (threadIdx.x == 32 * (consumer_warps + 1))
    Producer<DK, DV>{p, shared}.load_values();
  else if (warp == consumer_warps + 2 && (Tuned || !p.merges_selections))
    TileScheduler<DK, DV, Tuned, MaxBlocks>{p, shared}.run();
  else if (warp == consumer_warps + 3)
    Producer<DK, DV>{p, shared}.template notify_warps<Tuned>();
  else if (!Tuned && warp == consumer_warps + 2)
    SharedSelectionScheduler<DK, DV>{p, shared}.run();
}

template <class T, int DK, int DV, bool Tuned, int MaxBlocks>
__global__ void __launch_bounds__(threads, 1) sel_kernel(const __grid_constant__ SelectedParams p) {
#ifdef NSA_WGMMA
  extern __shared__ __align__(1024) char memory[];
  const Shared<DK, DV> shared(memory);
  if (threadIdx.x == 0) shared.init_barriers(!Tuned && p.merges_selections ? consumer_warps : slot_blocks);
  __syncthreads();
  griddep_wait();
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (warp >= consumer_warps) {
    warpgroup_reg_dealloc<56>();
    produce<DK, DV, Tuned, MaxBlocks>(p, shared, warp);
  } else {
    warpgroup_reg_alloc<152>();
    const int first_position = static_cast<int>(*p.a.tile.first_position);
    QueryConsumer<T, DK, DV, Tuned> consumer(p, shared, warp);
    for (WorkItems items(p); items.more(); items.next()) {
      const WorkItem item(p, items.index(), Tuned ? 1 : p.warp_queries);
      const int query = warp * (Tuned ? 1 : p.warp_queries);
      consumer.attend_item(item, query, first_position + item.first_query + query);
    }
  }
#endif
}

// with_head_sizes() with a padded instance of (64, 64) too. Tuned instances have up to 32 blocks of 64 tokens.
template <class F>
void with_selected_sizes(const LayerShape& s, F f) {
  with_head_sizes(s, [&](auto d_k, auto d_v, auto tuned) {
    if constexpr (tuned)
      if (s.rules.l_sel == block_tokens && s.rules.n_sel <= max_blocks) return f(d_k, d_v, tuned);
    if constexpr (d_k <= 128)
      if (s.d_k <= 64 && s.d_v <= 64) {
        constexpr std::integral_constant<int, 64> small;
        return f(small, small, std::false_type{});
      }
    if constexpr (d_k > 64) f(d_k, d_v, std::false_type{});
  });
}

constexpr std::int64_t max_interleaved_bytes = 24 << 20;  // bytes of K and V: half of the L2

int query_tiles_of(const QueryTile& tile, int warp_queries) {
  const int item_queries = consumer_warps * warp_queries;
  return (tile.tokens + item_queries - 1) / item_queries;
}
int items_of(const LayerShape& s, const QueryTile& tile, int warp_queries) {
  return tile.batches * s.groups * query_tiles_of(tile, warp_queries);
}
// As many as the rows of a product hold, as long as the work items fill the GPU: a warp of several queries takes the
// blocks of all of them.
int queries_of_warp(const LayerShape& s, const QueryTile& tile, const PrefillPart& part) {
  int queries = heads_per_tile / part.query_rows;
  while (queries > 1 && items_of(s, tile, queries) < limits().sms) queries /= 2;
  return queries;
}

template <class T, int DK, int DV, bool Tuned>
void launch(const AttendArgs& a, const PrefillPart& part, const float* gate, void* o, Stream* stream) {
  SelectedParams p{};
  p.a = a;
  p.part = part;
  p.a.q = static_cast<const T*>(a.q) + std::int64_t{part.first_head} * a.shape.d_k;
  p.a.out = partials_of(part, a.shape, a.out);
  if (!part.is_first()) p.a.reads = nullptr;
  p.gate = gate;
  if (o) p.o = static_cast<T*>(o) + std::int64_t{part.first_head} * a.shape.d_v + part.first_column;
  p.box_rows = max_box_rows(a.k.map, block_tokens);
  const std::int64_t planes = std::int64_t{a.tile.batch_begin + a.tile.batches} * a.shape.groups;
  p.k = kv_tensor_map(a.k, a.shape.dtype, planes, p.box_rows);
  p.v = kv_tensor_map(a.v, a.shape.dtype, planes, p.box_rows, 1, part.first_column);
  p.warp_queries = Tuned ? 1 : queries_of_warp(a.shape, a.tile, part);
  p.merges_selections = p.warp_queries > 1 || blocks_of(a.shape.rules) > max_blocks;
  p.part.query_rows = heads_per_tile / p.warp_queries;
  p.query_tiles = query_tiles_of(a.tile, p.warp_queries);
  p.items = items_of(a.shape, a.tile, p.warp_queries);
  p.pairs_blocks = a.shape.rules.l_sel > block_tokens;
  p.interleave_planes =
      planes * a.tile.max_positions * (a.shape.d_k + a.shape.d_v) * std::int64_t{sizeof(T)} <= max_interleaved_bytes;
  const auto launch_kernel = [&](auto* kernel) {
    launch_pdl(kernel, dim3(std::min(p.items, limits().sms)), threads, Shared<DK, DV>::bytes, stream, 1, p);
  };
  if (blocks_of(a.shape.rules) <= max_blocks_small)
    launch_kernel(sel_kernel<T, DK, DV, Tuned, max_blocks_small>);
  else
    launch_kernel(sel_kernel<T, DK, DV, Tuned, max_blocks>);
}

void launch(const AttendArgs& a, const float* gate, void* o, Stream* stream) {
  if (a.tile.rows() == 0) return;
  if (a.tile.max_positions > max_schedulable_positions) throw LaunchError("tiled has no room for so many positions");
  const auto by_head_size = [&](auto type) {
    using T = decltype(type);
    with_selected_sizes(a.shape, [&](auto d_k, auto d_v, auto tuned) {
      for_each_prefill_part(a.shape, d_v, tuned,
                            [&](const PrefillPart& part) { launch<T, d_k, d_v, tuned>(a, part, gate, o, stream); });
    });
  };
  if (a.shape.dtype == DType::bf16)
    by_head_size(__nv_bfloat16{});
  else
    by_head_size(__half{});
}

}  // namespace

bool prefill_sel_accepts(const LayerShape& s, const RowMap& map) { return selected_tiles_shape(s) && tma_accepts(map); }

bool prefill_sel_pays(const LayerShape& s, const QueryTile& tile) {
  return tile.max_positions <= max_schedulable_positions && std::int64_t{3} * items_of(s, tile, 1) > limits().sms;
}

void attend_prefill_sel(const AttendArgs& a, Stream* stream) { launch(a, nullptr, nullptr, stream); }

void attend_prefill_sel_gated(const AttendArgs& a, const float* gate, void* o, Stream* stream) {
  launch(a, gate, o, stream);
}

}  // namespace nsa::gpu
