// Arguments and launch of the split-KV decode kernel.

#include <algorithm>

#include "kernels/cuda/attention/kv_tiles.cuh"
#include "kernels/cuda/decode/split_kv/instances.cuh"
#include "kernels/cuda/decode/split_kv/params.cuh"

namespace nsa::gpu {

int decode_splits(std::int64_t work_items, std::int64_t tiles) {
  if (work_items > max_split_rows) return 1;
  const std::int64_t wanted = std::max<std::int64_t>(1, 2 * limits().sms / work_items);
  return static_cast<int>(std::min(wanted, (tiles + decode_warps - 1) / decode_warps));
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

void launch_decode(const DecodeParams& p, Stream* stream) {
  const bool tuned = split_kv_instance(p.shape).tuned;
  if (p.shape.dtype == DType::f32) return launch_split_kv<DType::f32, true>(p, stream);
  if (p.shape.dtype == DType::bf16)
    tuned ? launch_split_kv<DType::bf16, true>(p, stream) : launch_split_kv<DType::bf16, false>(p, stream);
  else
    tuned ? launch_split_kv<DType::f16, true>(p, stream) : launch_split_kv<DType::f16, false>(p, stream);
}

}  // namespace nsa::gpu
