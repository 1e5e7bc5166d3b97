// Prefill's selected branch, 16-bit storage: neighbouring queries share the blocks that a CTA loads.
//
// Tiling: a CTA takes a group and 12 consecutive queries, a consumer warp each: a query's (up to 16) heads are the M of
// m16n8k16, its q stays in registers. Four more warps: one schedules the union of the queries' blocks, two load each
// block's K and V once, through a ring each (tensor copies, 128-byte swizzle), and one notifies every query that
// selected the block of its slot. A consumer releases K as soon as the scores are computed, and a slot is empty when
// all queries that selected its block have released it: a warp waits for its own blocks only, not for other warps. No
// product is wasted, however little the selections overlap. CTAs are persistent and take one of every gridDim.x work
// items: late queries, which have more blocks, first, if the L2 holds K and V of all groups; otherwise group after
// group. FLOPs: 2 (Dk + Dv) a (head, selected token). Bytes: from L2, a block's K and V once per 12 queries that share
// it; from shared memory, once per query that selected it (32 KB at Dk = Dv = 128: 256 cycles). Bound: the L2 where few
// blocks are shared, otherwise shared memory and tensor cores alike.

#include "kernels/cuda/prefill/selected/consumer.cuh"
#include "kernels/cuda/prefill/selected/producer.cuh"
#include "kernels/cuda/prefill/selected/scheduler.cuh"
#include "kernels/cuda/prefill/stages.cuh"

namespace nsa::gpu {

using namespace selected;

namespace {

// The four warps that are not consumers.
template <int DK, int DV, bool Tuned, int MaxBlocks>
__device__ __forceinline__ void produce(const SelectedParams& p, const Shared<DK, DV>& shared, int warp) {
  if (threadIdx.x == 32 * item_queries)
    Producer<DK, DV>{p, shared}.load_keys();
  else if (threadIdx.x == 32 * (item_queries + 1))
    Producer<DK, DV>{p, shared}.load_values();
  else if (warp == item_queries + 2)
    TileScheduler<DK, DV, Tuned, MaxBlocks>{p, shared}.run();
  else if (warp == item_queries + 3)
    Producer<DK, DV>{p, shared}.notify_queries();
}

template <class T, int DK, int DV, bool Tuned, int MaxBlocks>
__global__ void __launch_bounds__(threads, 1) sel_kernel(const __grid_constant__ SelectedParams p) {
#ifdef NSA_WGMMA
  extern __shared__ __align__(1024) char memory[];
  const Shared<DK, DV> shared(memory);
  if (threadIdx.x == 0) shared.init_barriers();
  __syncthreads();
  griddep_wait();
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (warp >= item_queries) {
    warpgroup_reg_dealloc<56>();
    produce<DK, DV, Tuned, MaxBlocks>(p, shared, warp);
  } else {
    warpgroup_reg_alloc<152>();
    const int first_position = static_cast<int>(*p.a.tile.first_position);
    QueryConsumer<T, DK, DV, Tuned> consumer(p, shared, warp);
    for (WorkItems items(p); items.more(); items.next()) {
      const WorkItem item(p, items.index());
      consumer.attend_item(item, warp, first_position + item.first_query + warp);
    }
  }
#endif
}

constexpr std::int64_t max_interleaved_bytes = 24 << 20;  // bytes of K and V: half of the L2

int query_tiles_of(const QueryTile& tile) { return (tile.tokens + item_queries - 1) / item_queries; }
int items_of(const LayerShape& s, const QueryTile& tile) { return tile.batches * s.groups * query_tiles_of(tile); }

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
  p.query_tiles = query_tiles_of(a.tile);
  p.items = items_of(a.shape, a.tile);
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
    with_head_sizes(a.shape, [&](auto d_k, auto d_v, auto tuned) {
      for_each_prefill_part(a.shape, d_v, [&](const PrefillPart& part) {
        if constexpr (tuned)
          if (a.shape.rules.l_sel == block_tokens) return launch<T, d_k, d_v, true>(a, part, gate, o, stream);
        launch<T, d_k, d_v, false>(a, part, gate, o, stream);
      });
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
  return tile.max_positions <= max_schedulable_positions && std::int64_t{3} * items_of(s, tile) > limits().sms;
}

void attend_prefill_sel(const AttendArgs& a, Stream* stream) { launch(a, nullptr, nullptr, stream); }

void attend_prefill_sel_gated(const AttendArgs& a, const float* gate, void* o, Stream* stream) {
  launch(a, gate, o, stream);
}

}  // namespace nsa::gpu
