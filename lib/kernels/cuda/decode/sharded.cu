// Attention of a decode step on one of several ranks that share its sequences, between the exchanges
// (ShardedAttention).
//
// local_attention: cmp and win in one launch, with as many splits as fill the GPU; a second launch forms the LSE
// buckets and the (m, sum) of the window, which are exchanged together. normalise_partials: once those of all
// ranks are there, the partials of both branches become one normalised and gated vector a head. So the last exchange
// carries that vector and the partial of sel, two vectors a head instead of three; one is not enough, because the
// normaliser of sel is known only after that exchange. merge_ranks adds them up.
//
// Bytes: as
// decode/split_kv/branch.cu, and the partials once more. Bound: memory bandwidth for long contexts; else launches and
// exchanges.

#include <algorithm>

#include "kernels/cuda/attention/online_softmax.cuh"
#include "kernels/cuda/decode/split_kv/merge_splits.cuh"
#include "kernels/cuda/decode/split_kv/stages.cuh"
#include "kernels/cuda/decode/stages.cuh"

namespace nsa::gpu {

namespace {

constexpr int threads = 128;

int splits_for(Branch branch, const AttendArgs& a) {
  return branch_splits(branch, a.shape, a.tile, max_kv_tiles(branch, a.shape, a.k.map, a.tile.max_positions));
}

// Parameters of the split-KV launch of local_attention(); normalise_partials() reads its partials.
DecodeParams local_attention_params(const ShardedAttentionArgs& a) {
  const AttendArgs &cmp_args = a.attend[cmp], &win_args = a.attend[win];
  const LayerShape& s = cmp_args.shape;
  const QueryTile& tile = cmp_args.tile;
  const std::int64_t work_items = decode_work_items(s, tile);
  DecodeParams p = decode_params(s, tile, cmp_args.q);
  p.epilogue = DecodeEpilogue::store_partials;
  set_cmp_outputs(p, cmp_args);
  if (leaves_sums(s)) p.block_sums = tile_sums(p.scores, p.max_tiles, decode_heads(s.dtype));
  p.keeps_scores = keeps_scores(p.block_sums.memory ? work_items * p.block_sums.item_floats
                                                    : std::int64_t{tile.rows()} * s.heads() * p.pitch);
  float* cmp_partials = static_cast<float*>(cmp_args.scratch) + tile_lse_floats(s, tile);
  if (tile.tokens > 1) {
    if (!a.combine.leave_out[win])
      p.jobs[p.job_count++] =
          decode_job(win, win_args, splits_for(win, win_args), static_cast<float*>(win_args.scratch));
    p.jobs[p.job_count++] = decode_job(cmp, cmp_args, splits_for(cmp, cmp_args), cmp_partials);
    return p;
  }
  if (tile.ragged()) {
    const TileSchedules schedules = schedules_at(cmp_partials, tile);
    if (!a.combine.leave_out[win])
      p.jobs[p.job_count++] = dealt_job(win, win_args, schedules, static_cast<float*>(win_args.scratch));
    p.jobs[p.job_count++] = dealt_job(cmp, cmp_args, schedules, cmp_partials + schedule_words(tile));
    return p;
  }
  const int cmp_splits = decode_splits(work_items, p.max_tiles);
  // Where cmp alone fills the GPU, some of its CTAs take win too.
  const bool shares_ctas = work_items * cmp_splits > limits().sms;
  if (!a.combine.leave_out[win]) {
    const int splits = std::min(decode_splits(work_items, max_kv_tiles(win, s, win_args.k.map, tile.max_positions)),
                                shares_ctas ? cmp_splits : max_split_rows);
    DecodeJob job = decode_job(win, win_args, splits, static_cast<float*>(win_args.scratch));
    job.first_cta = shares_ctas ? 0 : static_cast<int>(tile.rows()) * s.groups * cmp_splits;
    job.ctas = shares_ctas ? cmp_splits : 0;
    p.jobs[p.job_count++] = job;
  }
  p.jobs[p.job_count++] = decode_job(cmp, cmp_args, cmp_splits, cmp_partials);
  return p;
}

// A thread has 4 elements of a head.
template <class T>
__global__ void __launch_bounds__(threads) merge_ranks_kernel(const __grid_constant__ ShardedAttentionArgs a) {
  griddep_wait();
  const LayerShape& s = a.combine.shape;
  const std::int64_t rows = a.combine.tile.rows(), stride = gated_partial_floats(s, rows),
                     values = rows * s.heads() * s.d_v;
  const int column_quads = s.d_v / 4, item = blockIdx.x * threads + threadIdx.x, rh = item / column_quads;
  if (rh >= rows * s.heads()) return;
  const bool attends = !a.combine.leave_out[sel];
  float4 sum = {}, sel_o = {};
  SoftmaxState<Natural> sel_state;
#pragma unroll 4
  for (int rank = 0; rank < a.combine.ranks; ++rank) {
    const float* from = a.gated_all + rank * stride;
    const float4 w = reinterpret_cast<const float4*>(from)[item];
    sum.x += w.x, sum.y += w.y, sum.z += w.z, sum.w += w.w;
    if (!attends) continue;
    const float2 ms = reinterpret_cast<const float2*>(from + 2 * values)[rh];
    const float4 x = reinterpret_cast<const float4*>(from + values)[item];
    if (ms.x == -INFINITY) continue;
    const Rescale<Natural> r(sel_state.m, ms.x);
    sel_state = {r.m, r(sel_state.s, ms.y)};
    sel_o.x = r(sel_o.x, x.x), sel_o.y = r(sel_o.y, x.y), sel_o.z = r(sel_o.z, x.z), sel_o.w = r(sel_o.w, x.w);
  }
  if (sel_state.s > 0.0f) add_scaled(sum, a.combine.gate[rh / s.heads_per_group * branches + sel] / sel_state.s, sel_o);
  T* to = static_cast<T*>(a.combine.o) + std::int64_t{item} * 4;
  store(to, sum.x), store(to + 1, sum.y), store(to + 2, sum.z), store(to + 3, sum.w);
}

}  // namespace

bool sharded_attention_accepts(const ShardedAttentionArgs& a) {
  const LayerShape& s = a.combine.shape;
  bool reads = decode_accepts(s, a.combine.tile) && a.combine.tile.rows() > 0 && a.combine.ranks > 1;
  for (const Branch b : {cmp, win}) reads &= reads_step_map(b, s, a.attend[b].k.map);
  return reads && a.attend[cmp].k.map.rank != all_ranks;
}

void local_attention(const ShardedAttentionArgs& a, Stream* stream) {
  MergeParams merge{local_attention_params(a)};
  DecodeParams& launch = merge.launch;
  const LayerShape& s = launch.shape;
  if (launch.jobs[0].schedule.tiles_before) {
    float* scratch = static_cast<float*>(a.attend[cmp].scratch) + tile_lse_floats(s, launch.tile);
    launch_schedules(s, launch.tile, a.attend[cmp].k.map, a.attend[win].k.map, schedules_at(scratch, launch.tile),
                     stream);
  }
  launch_decode(launch, stream);
  const std::int64_t buckets = s.lse.buckets / a.combine.ranks;
  merge.buckets = true;
  merge.win_lse = launch.lse + buckets * launch.tile.rows() * s.heads() * 2;
  if (!a.gated)
    for (int i = 0; i < launch.job_count; ++i)
      if (launch.jobs[i].branch == win || !launch.scores_only) merge.out[i] = a.attend[launch.jobs[i].branch].out;
  launch_merge_splits(merge, stream);
}

void normalise_partials(const ShardedAttentionArgs& a, Stream* stream) {
  launch_normalise_partials(local_attention_params(a), a, stream);
}

void merge_ranks(const ShardedAttentionArgs& a, Stream* stream) {
  const LayerShape& s = a.combine.shape;
  const std::int64_t items = a.combine.tile.rows() * s.heads() * (s.d_v / 4);
  with_type(s.dtype, [&](auto type) {
    launch_pdl(merge_ranks_kernel<decltype(type)>, dim3(static_cast<unsigned>((items + threads - 1) / threads)),
               threads, 0, stream, 1, a);
  });
}

}  // namespace nsa::gpu
