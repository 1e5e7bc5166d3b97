// Decode attention as stages: one split-KV launch a branch, and a launch that merges the splits where work items are
// split or long.

#include <algorithm>

#include "kernels/cuda/attention/kv_tiles.cuh"
#include "kernels/cuda/attention/stages.cuh"
#include "kernels/cuda/decode/split_kv/instances.cuh"
#include "kernels/cuda/decode/split_kv/merge_splits.cuh"
#include "kernels/cuda/decode/split_kv/stages.cuh"

namespace nsa::gpu {

namespace {

void launch_branch(Branch branch, const AttendArgs& a, const std::int32_t* lengths, unsigned* arrivals,
                   Stream* stream) {
  DecodeParams p = decode_params(a.shape, a.tile, a.q);
  p.lengths = lengths;
  p.arrivals = arrivals;
  p.selected = a.selected;
  p.out = a.out;
  const std::int64_t tiles = max_kv_tiles(branch, a.shape, a.k.map, a.tile.max_positions);
  const int splits = branch_splits(branch, a.shape, a.tile, tiles);
  const bool tokens = branch == cmp && a.tile.tokens > 1, dealt = branch == cmp && a.tile.ragged() && !tokens;
  const bool separate_merge = dealt || tokens || merges_separately(branch, splits, tiles);
  p.epilogue = separate_merge ? DecodeEpilogue::store_partials : DecodeEpilogue::merge_all;
  float* partials = static_cast<float*>(a.scratch);
  if (branch == cmp) {
    set_cmp_outputs(p, a);
    p.keeps_scores = keeps_scores(p.tile.rows() * p.shape.heads() * p.pitch);
    partials += tile_lse_floats(a.shape, a.tile);
  }
  if (dealt) {
    const TileSchedules schedules = schedules_at(partials, a.tile);
    launch_schedules(a.shape, a.tile, a.k.map, a.k.map, schedules, stream);
    p.jobs[p.job_count++] = dealt_job(branch, a, schedules, partials + schedule_words(a.tile));
  } else {
    p.jobs[p.job_count++] = decode_job(branch, a, splits, partials);
  }
  launch_decode(p, stream);
  if (!separate_merge) return;
  MergeParams merge{p};
  if (!p.scores_only) merge.out[0] = a.out;
  merge.buckets = branch == cmp;
  launch_merge_splits(merge, stream);
}

}  // namespace

void attend_decode(Branch branch, const AttendArgs& a, Stream* stream) {
  if (a.tile.rows() == 0) return;
  if (!reads_step_map(branch, a.shape, a.k.map)) return attend_general(branch, a, stream);
  launch_branch(branch, a, nullptr, arrival_counters(branch), stream);
}

void attend_rows_of_length(Branch branch, const AttendArgs& a, const std::int32_t* lengths, Stream* stream) {
  launch_branch(win, a, lengths, arrival_counters(branch), stream);
}

}  // namespace nsa::gpu
