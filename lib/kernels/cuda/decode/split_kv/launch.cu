// Arguments and launch of the split-KV decode kernel.

#include <algorithm>
#include <type_traits>

#include "kernels/cuda/attention/kv_tiles.cuh"
#include "kernels/cuda/decode/split_kv/instances.cuh"
#include "kernels/cuda/decode/split_kv/params.cuh"

namespace nsa::gpu {

int decode_splits(std::int64_t work_items, std::int64_t tiles) {
  if (work_items > max_split_rows) return 1;
  const std::int64_t wanted = std::max<std::int64_t>(1, 2 * limits().sms / work_items);
  return static_cast<int>(std::min(wanted, (tiles + decode_warps - 1) / decode_warps));
}

int branch_splits(Branch branch, const LayerShape& s, const QueryTile& tile, std::int64_t tiles) {
  if (branch != cmp || tile.tokens == 1) return decode_splits(decode_work_items(s, tile), tiles);
  return static_cast<int>(token_splits(s, tile, tiles));
}

DecodeParams decode_params(const LayerShape& s, const QueryTile& tile, const void* q) {
  DecodeParams p{};
  p.shape = s;
  p.tile = tile;
  p.q = q;
  p.head_tiles = decode_head_tiles(s);
  return p;
}

void set_cmp_outputs(DecodeParams& p, const AttendArgs& cmp_args) {
  p.scores = static_cast<float*>(cmp_args.scores);
  p.pitch = score_pitch(cmp_args.k.map, compressed_tokens(p.shape.rules, p.tile.max_positions - 1));
  p.scores_only = cmp_args.scores_only;
  p.max_tiles = max_kv_tiles(cmp, p.shape, cmp_args.k.map, p.tile.max_positions);
  p.lse = cmp_args.lse;
  p.tile_lse = static_cast<float2*>(cmp_args.scratch);
}

DecodeJob decode_job(Branch branch, const AttendArgs& a, int splits, float* partials) {
  return {branch, splits, 0, a.k, a.v, a.reads, partials};
}

int dealt_ctas(const LayerShape& s) { return std::max(1, 2 * limits().sms / decode_head_tiles(s)); }

DecodeJob dealt_job(Branch branch, const AttendArgs& a, const TileSchedules& schedules, float* partials) {
  DecodeJob job = decode_job(branch, a, 1, partials);
  job.schedule = {schedules.tiles_before[branch], dealt_ctas(a.shape)};
  return job;
}

std::int64_t partial_count(const DecodeJob& job, const LayerShape& s, const QueryTile& tile) {
  if (!job.schedule.tiles_before) return decode_work_items(s, tile) * job.splits;
  return decode_head_tiles(s) * max_partials(job.schedule.ctas, tile.rows() * s.groups);
}

namespace {

// Calls f(integral constant of the storage type, whether the instance is tuned).
template <class F>
void with_split_kv_instance(const LayerShape& s, F f) {
  const bool tuned = split_kv_instance(s).tuned;
  if (s.dtype == DType::f32) return f(std::integral_constant<DType, DType::f32>{}, std::true_type{});
  if (s.dtype == DType::bf16)
    tuned ? f(std::integral_constant<DType, DType::bf16>{}, std::true_type{})
          : f(std::integral_constant<DType, DType::bf16>{}, std::false_type{});
  else
    tuned ? f(std::integral_constant<DType, DType::f16>{}, std::true_type{})
          : f(std::integral_constant<DType, DType::f16>{}, std::false_type{});
}

#ifdef NSA_NO_SM90A
constexpr bool has_warpgroup_products = false;
#else
constexpr bool has_warpgroup_products = true;
#endif

// The jobs of `p` that are cmp, or those that are not.
DecodeParams with_jobs(const DecodeParams& p, bool of_cmp) {
  DecodeParams some = p;
  some.job_count = 0;
  for (int i = 0; i < p.job_count; ++i)
    if ((p.jobs[i].branch == cmp) == of_cmp) some.jobs[some.job_count++] = p.jobs[i];
  return some;
}

}  // namespace

bool attends_window_of_tokens(const AttendArgs& a) {
  const RowMap& map = a.k.map;
  const bool whole = map.ring > 0 ? map.ring > a.shape.rules.w && map.ring % window_span == 0 && map.slot_begin == 0 &&
                                        map.slot_end >= map.ring
                                  : map.chunk == INT64_MAX;
  return has_warpgroup_products && limits().capability == 90 && a.shape.dtype != DType::f32 &&
         split_kv_instance(a.shape).tuned && a.tile.tokens > 1 && whole && !a.k.pages.pages;
}

void launch_decode(const DecodeParams& p, Stream* stream) {
  with_split_kv_instance(p.shape, [&](auto type, auto tuned) {
    if (p.tile.tokens == 1 || limits().capability != 90) return launch_split_kv<type, tuned>(p, stream);
    if (p.fused_follows) return launch_tokens<type, tuned>(p, stream);
    const DecodeParams of_cmp = with_jobs(p, true), others = with_jobs(p, false);
    if (of_cmp.job_count > 0) launch_tokens<type, tuned>(of_cmp, stream);
    if (others.job_count > 0) launch_split_kv<type, tuned>(others, stream);
  });
}

}  // namespace nsa::gpu
