// Prefill's compressed and window branches, 16-bit storage: dense tiles on Hopper's warpgroup products.
//
// Tiling: prefill/prefill.cuh. M = 4 queries x 16 heads a warpgroup, N = 128 tokens, all of Dk and Dv at once: 64 x 128
// scores and 64 x Dv results in registers (prefill/dense/consumer.cuh). The scores of tile j are under way together
// with tile j-1's weighted sum, and the two warpgroups take turns by themselves: one's exponentials run beside the
// other's products. FLOPs: 2 (Dk + Dv) a (head, token). Bytes: a tile's K and V once per 8 queries from L2. Bound: the
// tensor cores, with the exponentials (16 a cycle and SM) at half their time.
//
// cmp's tiles begin at multiples of 128 and go up, and a tile that a row does not see changes nothing, not even by
// rounding: (m, sum) do not depend on how queries are tiled or K is laid out. A window's tiles begin where the item's
// first query sees its first token, where K is not cut: 8 queries see w + 7 tokens, so that 16 are left for a last one.

#include "kernels/cuda/prefill/dense/consumer.cuh"
#include "kernels/cuda/prefill/stages.cuh"

namespace nsa::gpu {

using namespace dense;

namespace {

template <class T, int DK, int DV, Job J>
__global__ void __launch_bounds__(threads, 1) dense_kernel(const __grid_constant__ Params p) {
#ifdef NSA_WGMMA
  extern __shared__ char memory[];
  const Shared<DK, DV> shared(memory);
  if (threadIdx.x == 0) shared.open();
  __syncthreads();
  griddep_wait();
  const std::int64_t first_position = *p.d.tile.first_position;
  const int group = uniform(threadIdx.x / 128);
  if (group == groups) {
    warpgroup_reg_dealloc<40>();
    if (threadIdx.x % 128 == 0) stream<DK, DV, J>(p, shared, first_position);
  } else {
    warpgroup_reg_alloc<232>();
    Rows<T, DK, DV> rows{p, shared, group};
    int phase = 0;
    for (int index = blockIdx.x; index < p.d.items; index += gridDim.x, phase ^= 1) {
      const DenseItem item(p.d, index, first_position);
      if constexpr (J == Job::gated)
        rows.gated(item, phase);
      else
        rows.template alone<J == Job::win ? win : cmp, J != Job::cmp_ms>(item, phase);
    }
  }
#endif
}

template <class T, int DK, int DV, Job J>
void launch(const AttendArgs* of[branches], const float* gate, Stream* stream) {
  const AttendArgs& a = *of[J == Job::win ? win : cmp];
  Params p{};
  p.d = dense_params(a.shape, a.tile, a.q, queries);
  p.out = a.out;
  p.gate = gate;
  for (const Branch b : {cmp, win}) {
    if (!of[b]) continue;
    const std::int64_t end = a.tile.max_positions;
    p.source[b] =
        dense_source(a.shape, a.tile, of[b]->k, &of[b]->v, b == cmp ? compressed_tokens(a.shape.rules, end - 1) : end);
    p.reads[b] = of[b]->reads;
  }
  launch_pdl(dense_kernel<T, DK, DV, J>, dim3(dense_ctas(p.d)), threads, Layout<DK, DV>::bytes, stream, 1, p);
}

template <Job J>
void launch(const AttendArgs* of[branches], const float* gate, Stream* stream) {
  const LayerShape& s = of[J == Job::win ? win : cmp]->shape;
  const auto sized = [&](auto type) {
    using T = decltype(type);
    if (s.d_k == 64)
      launch<T, 64, 64, J>(of, gate, stream);
    else
      launch<T, 128, 128, J>(of, gate, stream);
  };
  if (s.dtype == DType::bf16)
    sized(__nv_bfloat16{});
  else
    sized(__half{});
}

}  // namespace

bool prefill_accepts(Branch branch, const LayerShape& s, const RowMap& map) {
  return branch != sel && tiles_shape(s) && map_is_whole(map) &&
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
