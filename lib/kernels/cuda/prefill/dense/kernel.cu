// Prefill's compressed and window branches, 16-bit storage: dense tiles on Hopper's warpgroup products.
//
// Tiling (prefill/prefill.cuh): M = 4 queries x 16 heads a warpgroup, or up to 64 queries of fewer heads, N = 128
// tokens, all of Dk and Dv: 64 x 128 scores and 64 x Dv results in registers (prefill/dense/consumer.cuh). q k^T of
// tile j is in flight together with p v of tile j-1. The two warpgroups need no barrier to alternate: one's
// exponentials overlap with the other's products. FLOPs: 2 (Dk + Dv) a (head, token). Bytes: a tile's K and V once per
// 8 queries from L2. Bound: the tensor cores; the exponentials (16 a cycle and SM) take half their time.
//
// cmp's tiles begin at multiples of 128 and come in rising order. A tile that a row does not see does not change its
// results, not even by rounding: (m, sum) are independent of query tiling and K layout. In a contiguous K a window's
// tiles begin at the first token that the item's first query sees: 8 queries see w + 7 tokens, and a tile of 16 holds
// the rest.

#include "kernels/cuda/prefill/dense/epilogue.cuh"
#include "kernels/cuda/prefill/stages.cuh"

namespace nsa::gpu {

using namespace dense;

namespace {

template <Branch B, bool WithValues, class T, int DK, int DV, bool Tuned>
__device__ __forceinline__ void attend_branch(Consumer<T, DK, DV, Tuned>& consumer, const DenseWorkItem& item,
                                              int phase) {
  consumer.template mainloop<B, WithValues, true>(item, phase, [] {});
  consumer.template add_reads<B>(item);
  consumer.template store_partials<WithValues>(item);
}

template <class T, int DK, int DV, bool Tuned>
__device__ __forceinline__ void attend_gated(Consumer<T, DK, DV, Tuned>& consumer, const DenseWorkItem& item,
                                             int phase) {
  consumer.load_gates(item);
  consumer.template mainloop<win, true, false>(item, phase, [] {});
  consumer.template add_reads<win>(item);
  consumer.template store_gated<win>(item);
  consumer.template mainloop<cmp, true, true>(item, phase, [&] { consumer.load_win_output(item); });
  consumer.template add_reads<cmp>(item);
  consumer.template store_gated<cmp>(item);
}

template <class T, int DK, int DV, bool Tuned, Job J>
__global__ void __launch_bounds__(threads, 1) dense_kernel(const __grid_constant__ DenseAttentionParams p) {
#ifdef NSA_WGMMA
  extern __shared__ char memory[];
  const Shared<DK, DV> shared(memory);
  if (threadIdx.x == 0) shared.init_barriers();
  __syncthreads();
  griddep_wait();
  const std::int64_t first_position = *p.work.tile.first_position;
  const int warpgroup = warp_uniform(threadIdx.x / 128);
  if (warpgroup == consumer_warpgroups) {
    warpgroup_reg_dealloc<40>();
    if (threadIdx.x % 128 == 0) produce<DK, DV, Tuned, J>(p, shared, first_position);
  } else {
    warpgroup_reg_alloc<232>();
    Consumer<T, DK, DV, Tuned> consumer{p, shared, warpgroup};
    int phase = 0;
    for (int index = blockIdx.x; index < p.work.items; index += gridDim.x, phase ^= 1) {
      const DenseWorkItem item(p.work, index, first_position);
      if constexpr (J == Job::gated)
        attend_gated(consumer, item, phase);
      else
        attend_branch<J == Job::win ? win : cmp, J != Job::cmp_ms>(consumer, item, phase);
    }
  }
#endif
}

// with_head_sizes() with (256, 256) for whatever (192, 128) does not hold, so that q k^T is formed once.
template <class F>
void with_dense_sizes(const LayerShape& s, F f) {
  constexpr std::integral_constant<int, 256> largest;
  if (s.d_k > 192 || s.d_v > 128) return f(largest, largest, std::false_type{});
  with_head_sizes(s, [&](auto d_k, auto d_v, auto tuned) {
    if constexpr (d_k <= 192) f(d_k, d_v, tuned);
  });
}

template <class T, int DK, int DV, bool Tuned, Job J>
void launch(const AttendArgs* of[branches], const float* gate, Stream* stream) {
  const AttendArgs& a = *of[J == Job::win ? win : cmp];
  for_each_prefill_part(a.shape, DV, Tuned, [&](const PrefillPart& part) {
    if (J == Job::cmp_ms && part.first_column > 0) return;
    DenseAttentionParams p{};
    p.work = dense_work(a.shape, part, a.tile, a.q, item_rows);
    p.out = partials_of(part, a.shape, a.out);
    p.gate = gate;
    p.part = part;
    for (const Branch b : {cmp, win}) {
      if (!of[b]) continue;
      const std::int64_t end = a.tile.max_positions;
      p.kv[b] = kv_tensor_maps(a.shape, a.tile, of[b]->k, &of[b]->v,
                               b == cmp ? compressed_tokens(a.shape.rules, end - 1) : end, part.first_column,
                               tile_tokens<DK>);
      p.reads[b] = part.is_first() ? of[b]->reads : nullptr;
    }
    launch_pdl(dense_kernel<T, DK, DV, Tuned, J>, dim3(persistent_ctas(p.work)), threads, Shared<DK, DV>::bytes, stream,
               1, p);
  });
}

template <Job J>
void launch(const AttendArgs* of[branches], const float* gate, Stream* stream) {
  const LayerShape& s = of[J == Job::win ? win : cmp]->shape;
  const auto by_head_size = [&](auto type) {
    using T = decltype(type);
    with_dense_sizes(s, [&](auto d_k, auto d_v, auto tuned) { launch<T, d_k, d_v, tuned, J>(of, gate, stream); });
  };
  if (s.dtype == DType::bf16)
    by_head_size(__nv_bfloat16{});
  else
    by_head_size(__half{});
}

}  // namespace

bool prefill_accepts(Branch branch, const LayerShape& s, const RowMap& map) {
  return branch != sel && tiles_shape(s) && tma_accepts(map) &&
         (branch == cmp || map.chunk == INT64_MAX || map.chunk % 8 == 0);
}

void attend_prefill(Branch branch, const AttendArgs& a, Stream* stream) {
  if (a.tile.rows() == 0) return;
  const AttendArgs* of[branches] = {};
  of[branch] = &a;
  if (branch == win)
    launch<Job::win>(of, nullptr, stream);
  else if (a.scores_only)
    launch<Job::cmp_ms>(of, nullptr, stream);
  else
    launch<Job::cmp>(of, nullptr, stream);
}

void attend_prefill_gated(const AttendArgs& of_cmp, const AttendArgs& of_win, const float* gate, Stream* stream) {
  if (of_cmp.tile.rows() == 0) return;
  const AttendArgs* of[branches] = {};
  of[cmp] = &of_cmp;
  of[win] = &of_win;
  launch<Job::gated>(of, gate, stream);
}

}  // namespace nsa::gpu
