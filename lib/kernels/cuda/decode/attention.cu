// Attention of a decode step on a rank that holds all K and V. Fused into one kernel where that accepts the step
// (decode/fused/launch.cu); else four launches: cmp and win together, rank, sel, and one kernel that merges the splits
// of all three branches, normalises and applies the gates. No attention kernel waits to merge its splits.
//
// Where cmp alone fills the GPU, every CTA takes a split of win and then one of cmp, so that all finish together; where
// it does not, win has CTAs of its own.

#include <algorithm>

#include "kernels/cuda/attention/kv_tiles.cuh"
#include "kernels/cuda/attention/online_softmax.cuh"
#include "kernels/cuda/decode/fused/params.cuh"
#include "kernels/cuda/decode/split_kv/merge_splits.cuh"
#include "kernels/cuda/decode/split_kv/stages.cuh"
#include "kernels/cuda/decode/stages.cuh"
#include "kernels/cuda/rank/stages.cuh"

namespace nsa::gpu {

namespace {

constexpr int threads = 128;

struct MergeBranchesParams {
  CombineArgs a;
  const float* partials[branches];  // [work item][splits][partial]
  int splits[branches];
  int tiles, heads;  // head tiles of a group, heads of a tile
};

// A thread has 4 elements of a head.
template <class T>
__global__ void __launch_bounds__(threads) merge_branches_kernel(const __grid_constant__ MergeBranchesParams p) {
  griddep_wait();
  const LayerShape& s = p.a.shape;
  const int column_quads = s.d_v / 4, item = blockIdx.x * threads + threadIdx.x, rh = item / column_quads,
            column_quad = item % column_quads;
  if (rh >= p.a.tile.rows() * s.heads()) return;
  const int group = rh / s.heads_per_group, in_group = rh % s.heads_per_group;  // row * groups + g
  const int head = in_group % p.heads;
  const std::int64_t work_item = std::int64_t{group} * p.tiles + in_group / p.heads;
  const std::int64_t partial_stride = decode_partial_floats(p.heads, s.d_v);
  float4 sum = {};
#pragma unroll
  for (int b = 0; b < branches; ++b) {
    if (p.a.leave_out[b]) continue;
    const float* partial = p.partials[b] + work_item * p.splits[b] * partial_stride;
    SoftmaxState<Exp2> state;
    float4 o = {};
    for (int i0 = 0; i0 < p.splits[b]; i0 += 4) {
      float2 ms[4];
      float4 x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i0 + i >= p.splits[b]) break;
        const float* from = partial + (i0 + i) * partial_stride;
        ms[i] = reinterpret_cast<const float2*>(from + p.heads * s.d_v)[head];
        x[i] = reinterpret_cast<const float4*>(from)[head * column_quads + column_quad];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i0 + i >= p.splits[b]) break;
        merge_partial(state, o, ms[i], x[i]);
      }
    }
    const float inverse = inverse_or_zero(state.s), gate = p.a.gate[group * branches + b];
    scale_by(o, inverse);
    if (p.a.o_branch[b]) reinterpret_cast<float4*>(p.a.o_branch[b])[item] = o;
    add_scaled(sum, gate, o);
  }
  T* to = static_cast<T*>(p.a.o) + std::int64_t{item} * 4;
  store(to, sum.x), store(to + 1, sum.y), store(to + 2, sum.z), store(to + 3, sum.w);
}

// A job whose partials begin at `partials`, which is advanced past them.
DecodeJob make_job(Branch branch, const AttendArgs& a, int splits, float*& partials) {
  const DecodeJob job = decode_job(branch, a, splits, partials);
  partials +=
      decode_work_items(a.shape, a.tile) * splits * decode_partial_floats(decode_heads(a.shape.dtype), a.shape.d_v);
  return job;
}

int splits_for(Branch branch, const AttendArgs& a) {
  return decode_splits(decode_work_items(a.shape, a.tile),
                       max_kv_tiles(branch, a.shape, a.k.map, a.tile.max_positions));
}

}  // namespace

bool decode_attention_accepts(const AttentionArgs& a) {
  const LayerShape& s = a.combine.shape;
  const QueryTile& tile = a.combine.tile;
  bool reads = decode_accepts(s, tile) && a.combine.ranks == 1 && a.rank.lse_ranks == 1;
  for (int b = 0; b < branches; ++b) {
    const RowMap& map = a.attend[b].k.map;
    reads &= map.chunk == INT64_MAX && reads_kv_map(static_cast<Branch>(b), s, map);
  }
  return reads;
}

void decode_attention(const AttentionArgs& a, Stream* stream) {
  const LayerShape& s = a.combine.shape;
  const QueryTile& tile = a.combine.tile;
  if (tile.rows() == 0) return;
  if (try_fused_decode(a, stream)) return;
  const AttendArgs& cmp_args = a.attend[cmp];
  const int row_groups = static_cast<int>(tile.rows()) * s.groups;
  const bool* leave_out = a.combine.leave_out;
  DecodeParams p = decode_params(s, tile, cmp_args.q);
  set_cmp_outputs(p, cmp_args);
  const bool separate_buckets = !leave_out[sel] && merges_separately(cmp, 1, p.max_tiles);
  p.epilogue = leave_out[sel] || separate_buckets ? DecodeEpilogue::store_partials : DecodeEpilogue::merge_buckets;
  p.arrivals = arrival_counters(cmp);
  float* partials = static_cast<float*>(cmp_args.scratch) + tile_lse_floats(s, tile);

  const int cmp_splits = splits_for(cmp, cmp_args);
  const bool shares_ctas = row_groups * p.head_tiles * cmp_splits > limits().sms;
  const DecodeJob cmp_job = make_job(cmp, cmp_args, cmp_splits, partials);
  DecodeJob win_job = make_job(win, a.attend[win], shares_ctas ? cmp_splits : splits_for(win, a.attend[win]), partials);
  if (!shares_ctas) win_job.first_cta = row_groups * cmp_splits;
  if (!leave_out[win]) p.jobs[p.job_count++] = win_job;
  p.jobs[p.job_count++] = cmp_job;
  launch_decode(p, stream);
  if (separate_buckets) launch_merge_splits({.launch = p, .buckets = true}, stream);

  const DecodeJob sel_job = make_job(sel, a.attend[sel], splits_for(sel, a.attend[sel]), partials);
  if (!leave_out[sel]) {
    rank(a.rank, stream);
    p.epilogue = DecodeEpilogue::store_partials;
    p.selected = a.rank.selected;
    p.jobs[0] = sel_job;
    p.job_count = 1;
    launch_decode(p, stream);
  }

  const MergeBranchesParams merge{a.combine,
                                  {cmp_job.partials, sel_job.partials, win_job.partials},
                                  {cmp_job.splits, sel_job.splits, win_job.splits},
                                  p.head_tiles,
                                  decode_heads(s.dtype)};
  const std::int64_t items = tile.rows() * s.heads() * (s.d_v / 4);
  with_type(s.dtype, [&](auto type) {
    launch_pdl(merge_branches_kernel<decltype(type)>, dim3(static_cast<unsigned>((items + threads - 1) / threads)),
               threads, 0, stream, 1, merge);
  });
}

}  // namespace nsa::gpu
