// Attention of a decode step on a rank that holds all K and V. Fused into one kernel where that accepts the step
// (decode/fused/launch.cu); else four launches: cmp and win together, rank, sel, and one kernel that merges the splits
// of all three branches, normalises and applies the gates. No attention kernel waits to merge its splits.
//
// Where cmp alone fills the GPU, every CTA takes a split of win and then one of cmp, so that all finish together; where
// it does not, win has CTAs of its own.
//
// Of a ragged batch longer rows lend KV tiles to the clusters of shorter ones (decode/loans), where each has a cluster
// at the same time; in the launches the tiles are dealt by length (attention/tile_schedule.cuh).
//
// Of several query tokens cmp has a launch of its own (decode/tokens/kernel.cuh). The rest of the step is one launch
// too where its rows fill half of the GPU (plan_fused_tokens); else win runs beside sel.

#include <algorithm>
#include <functional>
#include <numeric>
#include <vector>

#include "kernels/cuda/attention/kv_tiles.cuh"
#include "kernels/cuda/attention/online_softmax.cuh"
#include "kernels/cuda/decode/fused/params.cuh"
#include "kernels/cuda/decode/loans/params.cuh"
#include "kernels/cuda/decode/split_kv/merge_splits.cuh"
#include "kernels/cuda/decode/split_kv/stages.cuh"
#include "kernels/cuda/decode/stages.cuh"
#include "kernels/cuda/rank/stages.cuh"
#include "kernels/cuda/sizes/accepts.hpp"

namespace nsa::gpu {

namespace {

constexpr int threads = 128;

struct MergeBranchesParams {
  CombineArgs a;
  DecodeJob jobs[branches];
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
  const int rows = static_cast<int>(p.a.tile.rows()), work_item = group * p.tiles + in_group / p.heads;
  const std::int64_t partial_stride = decode_partial_floats(p.heads, s.d_v);
  float4 sum = {};
#pragma unroll
  for (int b = 0; b < branches; ++b) {
    if (p.a.leave_out[b]) continue;
    const PartialRange range = partials_of(p.jobs[b], s, rows, p.tiles, work_item);
    const float* partial = p.jobs[b].partials + range.first * partial_stride;
    SoftmaxState<Exp2> state;
    float4 o = {};
    for (int i0 = 0; i0 < range.count; i0 += 4) {
      float2 ms[4];
      float4 x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i0 + i >= range.count) break;
        const float* from = partial + (i0 + i) * partial_stride;
        ms[i] = reinterpret_cast<const float2*>(from + p.heads * s.d_v)[head];
        x[i] = reinterpret_cast<const float4*>(from)[head * column_quads + column_quad];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i0 + i >= range.count) break;
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

// Advances `partials` past those of the job.
DecodeJob place(const DecodeJob& job, const AttendArgs& a, float*& partials) {
  partials += partial_count(job, a.shape, a.tile) * decode_partial_floats(decode_heads(a.shape.dtype), a.shape.d_v);
  return job;
}

int splits_for(Branch branch, const AttendArgs& a) {
  return branch_splits(branch, a.shape, a.tile, max_kv_tiles(branch, a.shape, a.k.map, a.tile.max_positions));
}

// The jobs of a step, by branch.
struct StepJobs {
  DecodeJob of[branches];
};
StepJobs split_jobs(const AttentionArgs& a, const DecodeParams& p, float* partials) {
  const AttendArgs &cmp_args = a.attend[cmp], &sel_args = a.attend[sel], &win_args = a.attend[win];
  const int row_groups = static_cast<int>(p.tile.rows()) * p.shape.groups, cmp_splits = splits_for(cmp, cmp_args);
  const bool shares_ctas = row_groups * p.head_tiles * cmp_splits > limits().sms;
  StepJobs jobs;
  jobs.of[cmp] = place(decode_job(cmp, cmp_args, cmp_splits, partials), cmp_args, partials);
  const int win_splits = shares_ctas ? cmp_splits : splits_for(win, win_args);
  jobs.of[win] = place(decode_job(win, win_args, win_splits, partials), win_args, partials);
  if (!shares_ctas) jobs.of[win].first_cta = row_groups * cmp_splits;
  jobs.of[sel] = place(decode_job(sel, sel_args, splits_for(sel, sel_args), partials), sel_args, partials);
  return jobs;
}
// Rank reads sums of blocks, where there are such, as in a sharded step.
void keep_block_sums(DecodeParams& p) {
  const std::int64_t work_items = decode_work_items(p.shape, p.tile);
  if (leaves_sums(p.shape)) p.block_sums = tile_sums(p.scores, p.max_tiles, decode_heads(p.shape.dtype));
  p.keeps_scores = keeps_scores(p.block_sums.memory ? work_items * p.block_sums.item_floats
                                                    : p.tile.rows() * p.shape.heads() * p.pitch);
}
// Of several query tokens: cmp alone, or win with it in as many splits; then sel and win.
StepJobs token_jobs(const AttentionArgs& a, float* partials, bool win_with_cmp) {
  StepJobs jobs;
  for (const Branch b : {cmp, sel, win}) {
    const Branch of = b == win && win_with_cmp ? cmp : b;
    jobs.of[b] = place(decode_job(b, a.attend[b], splits_for(of, a.attend[of]), partials), a.attend[b], partials);
  }
  return jobs;
}
// Launches a step of several query tokens in two kernels: cmp, and win where one kernel takes both; the rest. false:
// the second does not take the step.
bool launch_fused_tokens(const AttentionArgs& a, DecodeParams& p, float* partials, Stream* stream) {
  keep_block_sums(p);
  const bool win_with_cmp = !a.combine.leave_out[win] && !p.scores_only && attends_window_of_tokens(a.attend[win]);
  const StepJobs jobs = token_jobs(a, partials, win_with_cmp);
  const auto rest = plan_fused_tokens(a, p, jobs.of[cmp], win_with_cmp ? &jobs.of[win] : nullptr);
  if (!rest) return false;
  p.fused_follows = true;
  p.keeps_scores = rest->keeps_scores;  // the sums without the maxima of tiles, which are not stored
  p.jobs[p.job_count++] = jobs.of[cmp];
  if (win_with_cmp) p.jobs[p.job_count++] = jobs.of[win];
  launch_decode(p, stream);
  launch_divided(*rest, stream);
  return true;
}
// The tiles of a ragged batch dealt by length.
StepJobs dealt_jobs(const AttentionArgs& a, const DecodeParams& p, float* partials, Stream* stream) {
  const TileSchedules schedules = schedules_at(partials, p.tile);
  launch_schedules(p.shape, p.tile, a.attend[cmp].k.map, a.attend[win].k.map, schedules, stream);
  partials += schedule_words(p.tile);
  StepJobs jobs;
  for (const Branch b : {cmp, sel, win})
    jobs.of[b] = place(dealt_job(b, a.attend[b], schedules, partials), a.attend[b], partials);
  return jobs;
}

// The most work of a slot over the mean of all, where each in turn takes the longest sequence and group that is left.
double longest_first_imbalance(const LayerShape& s, std::vector<std::int64_t> tiles, int slots) {
  std::ranges::sort(tiles, std::greater<>());
  std::vector<std::int64_t> work(static_cast<std::size_t>(std::max(1, slots)), 0);
  for (const std::int64_t of_sequence : tiles)
    for (int g = 0; g < s.groups; ++g) *std::ranges::min_element(work) += of_sequence;
  const double sum = static_cast<double>(std::accumulate(work.begin(), work.end(), std::int64_t{0}));
  return static_cast<double>(*std::ranges::max_element(work)) * static_cast<double>(work.size()) / sum;
}

}  // namespace

bool decode_attention_accepts(const AttentionArgs& a) {
  const LayerShape& s = a.combine.shape;
  const QueryTile& tile = a.combine.tile;
  bool reads = decode_accepts(s, tile) && a.combine.ranks == 1 && a.rank.lse_ranks == 1;
  for (int b = 0; b < branches; ++b) {
    const RowMap& map = a.attend[b].k.map;
    reads &= map.chunk == INT64_MAX && reads_step_map(static_cast<Branch>(b), s, map);
    reads &= is_quantised(a.attend[b].k) == is_quantised(a.attend[cmp].k);
  }
  return reads && (!is_quantised(a.attend[cmp].k) || (fp8_step_accepts(s) && fused_decode_accepts(a)));
}

const char* decode_attention_variant(const AttentionArgs& a) {
  if (a.combine.tile.tokens > 1) return "tokens";
  return a.combine.tile.ragged() && !fused_decode_accepts(a) ? "dealt" : "step";
}

double schedule_imbalance(const LayerShape& s, const QueryTile& tile, std::span<const std::int64_t> positions) {
  std::vector<std::int64_t> tiles;  // of a group, of one sequence each
  for (const std::int64_t t : positions)
    tiles.push_back((compressed_tokens(s.rules, t) + s.lse.segment - 1) / s.lse.segment * tiles_per_span(cmp, s));
  const std::int64_t total = std::accumulate(tiles.begin(), tiles.end(), std::int64_t{0}) * s.groups;
  if (total == 0) return 1.0;
  if (const int cluster = loan_cluster(s, tile); cluster > 0)
    return loan_imbalance(std::vector<int>(tiles.begin(), tiles.end()), fused_warps * cluster);
  if (const int slots = fused_slots(s, tile); slots > 0) return longest_first_imbalance(s, tiles, slots);
  const std::int64_t ctas = dealt_ctas(s), share = (total + ctas * decode_warps - 1) / (ctas * decode_warps);
  return static_cast<double>(std::min(share * decode_warps, total) * ctas) / static_cast<double>(total);
}

void decode_attention(const AttentionArgs& a, Stream* stream) {
  const LayerShape& s = a.combine.shape;
  const QueryTile& tile = a.combine.tile;
  if (tile.rows() == 0) return;
  if (try_loan_decode(a, stream) || try_fused_decode(a, stream)) return;
  if (is_quantised(a.attend[cmp].k)) throw LaunchError("the decode kernel of FP8 rows does not take this step");
  const AttendArgs& cmp_args = a.attend[cmp];
  const bool* leave_out = a.combine.leave_out;
  DecodeParams p = decode_params(s, tile, cmp_args.q);
  set_cmp_outputs(p, cmp_args);
  const bool several = tile.tokens > 1;
  const bool separate_buckets = !leave_out[sel] && (several || tile.ragged() || merges_separately(cmp, 1, p.max_tiles));
  p.epilogue = leave_out[sel] || separate_buckets ? DecodeEpilogue::store_partials : DecodeEpilogue::merge_buckets;
  p.arrivals = arrival_counters(cmp);
  float* partials = static_cast<float*>(cmp_args.scratch) + tile_lse_floats(s, tile);

  if (several && launch_fused_tokens(a, p, partials, stream)) return;
  const StepJobs jobs = several         ? token_jobs(a, partials, false)
                        : tile.ragged() ? dealt_jobs(a, p, partials, stream)
                                        : split_jobs(a, p, partials);
  if (!several && !leave_out[win]) p.jobs[p.job_count++] = jobs.of[win];
  p.jobs[p.job_count++] = jobs.of[cmp];
  launch_decode(p, stream);
  if (separate_buckets) launch_merge_splits({.launch = p, .buckets = true}, stream);

  p.epilogue = DecodeEpilogue::store_partials;
  p.job_count = 0;
  if (!leave_out[sel]) {
    RankArgs rank_args = a.rank;
    rank_args.local_attention = p.block_sums.memory != nullptr;
    rank(rank_args, stream);
    p.selected = a.rank.selected;
    p.jobs[p.job_count++] = jobs.of[sel];
  }
  if (several && !leave_out[win]) {
    p.jobs[p.job_count++] = jobs.of[win];
    if (p.job_count > 1) p.jobs[1].first_cta = job_ctas(p.jobs[0], static_cast<int>(tile.rows()) * s.groups);
  }
  if (p.job_count > 0) launch_decode(p, stream);

  const MergeBranchesParams merge{
      a.combine, {jobs.of[cmp], jobs.of[sel], jobs.of[win]}, p.head_tiles, decode_heads(s.dtype)};
  const std::int64_t items = tile.rows() * s.heads() * (s.d_v / 4);
  with_type(s.dtype, [&](auto type) {
    launch_pdl(merge_branches_kernel<decltype(type)>, dim3(static_cast<unsigned>((items + threads - 1) / threads)),
               threads, 0, stream, 1, merge);
  });
}

}  // namespace nsa::gpu
