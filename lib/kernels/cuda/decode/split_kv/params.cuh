#pragma once
// Arguments of the split-KV decode kernel. decode/split_kv/branch.cu launches it for one branch, as a stage;
// decode/attention.cu launches it for cmp and win together, then for sel.

#include "kernels/cuda/attention/block_sums.cuh"
#include "kernels/cuda/attention/split_kv.cuh"
#include "kernels/cuda/attention/tile_schedule.cuh"
#include "kernels/cuda/sizes/scratch.hpp"

namespace nsa::gpu {

constexpr int decode_warps = 4;  ///< of a CTA
constexpr int decode_threads = 32 * decode_warps;
static_assert(tokens_a_cta == decode_warps);

/// One branch within a launch: CTAs [first_cta, first_cta + rows * groups * ctas) of x. Of the `ctas` of a work item
/// the last `splits` take this branch in reverse order: where spans do not divide evenly, those have fewer of the other
/// branch. A job with a schedule has `schedule.ctas` CTAs in all, each with a share of the tiles of all work items.
struct DecodeJob {
  Branch branch;
  int splits, first_cta;
  KvView k, v;
  std::int64_t* reads;
  float* partials;  ///< [work item][split][heads of a tile * (Dv + 2)]; work item: (row, group, head tile). With a
                    ///< schedule: [head tile][number of the partial][...]
  int ctas = 0;     ///< more than `splits`; 0: equal to `splits`
  TileSchedule schedule = {};
};

/// What the last CTA of a work item does: nothing (the partials stay in scratch); cmp: merges the (m, sum) of the tiles
/// into the LSE buckets `lse`; that, and merges the partials into `out`.
enum class DecodeEpilogue { store_partials, merge_buckets, merge_all };

struct DecodeParams {
  LayerShape shape;
  QueryTile tile;
  const void* q;
  DecodeJob jobs[2];
  int job_count;
  int head_tiles;
  DecodeEpilogue epilogue;
  unsigned* arrivals;
  const std::int32_t* selected;  ///< sel
  // cmp
  float* scores;  ///< raw scores
  std::int64_t pitch;
  TileBlockSums block_sums;  ///< or sums of blocks instead, by tile of this rank
  bool scores_only;
  bool keeps_scores;  ///< in the L2: K and V are loaded with evict_first
  float2* tile_lse;   ///< (m, sum) of each KV tile: [work item][max_tiles][heads of a head tile]
  std::int64_t max_tiles;
  float* lse;
  Partials out;                 ///< for merge_all
  const std::int32_t* lengths;  ///< win: the row attends its first `lengths[row]` tokens; null: by position
  /// Of several query tokens: the fused kernel does the rest. It reads the maxima of tiles from `tile_lse`. The job of
  /// win, if there is one, has the splits of cmp, and is attended with it.
  bool fused_follows;
};

/// CTAs of a job, for each head tile.
__host__ __device__ inline int job_ctas(const DecodeJob& job, int row_groups) {
  if (job.schedule.tiles_before) return job.schedule.ctas;
  return row_groups * (job.ctas > job.splits ? job.ctas : job.splits);
}

/// The partials of a work item.
__device__ __forceinline__ PartialRange partials_of(const DecodeJob& job, const LayerShape& s, int rows, int head_tiles,
                                                    int work_item) {
  if (!job.schedule.tiles_before) return {work_item * job.splits, job.splits};
  const PartialRange range = partials_of(job.schedule, rows, s.groups, work_item / head_tiles, decode_warps);
  return {work_item % head_tiles * (job.schedule.ctas + rows * s.groups) + range.first, range.count};
}

/// Splits of a work item: all work items together fill the SMs twice, and every warp has a tile.
int decode_splits(std::int64_t work_items, std::int64_t tiles);

/// Splits of a branch with so many KV tiles a work item: those, or, of cmp of several query tokens, token_splits().
int branch_splits(Branch branch, const LayerShape& s, const QueryTile& tile, std::int64_t tiles);

/// Whether scores or block sums, so many floats of all work items, stay in the L2 (50 MB on H100 and H200) while K and
/// V pass through it.
constexpr bool keeps_scores(std::int64_t floats) { return floats * std::int64_t{sizeof(float)} <= 40'000'000; }

/// Parameters without jobs and outputs.
DecodeParams decode_params(const LayerShape& s, const QueryTile& tile, const void* q);
/// Sets the outputs of cmp: raw scores, LSE buckets, and the (m, sum) of tiles at the begin of its scratch.
void set_cmp_outputs(DecodeParams& p, const AttendArgs& cmp_args);
/// A job of a launch on `splits` CTAs from CTA 0 on.
DecodeJob decode_job(Branch branch, const AttendArgs& a, int splits, float* partials);
/// CTAs of a job whose tiles are dealt by length, for each head tile: all work items together fill the SMs twice.
int dealt_ctas(const LayerShape& s);
/// A job of a launch whose tiles are dealt by length. The launch stores partials.
DecodeJob dealt_job(Branch branch, const AttendArgs& a, const TileSchedules& schedules, float* partials);
/// Partials of a job of any kind, of all work items.
std::int64_t partial_count(const DecodeJob& job, const LayerShape& s, const QueryTile& tile);

/// Whether the launch of cmp of several query tokens attends the window too, where the fused kernel does the rest.
bool attends_window_of_tokens(const AttendArgs& win_args);

/// Launches the kernel for a shape that decode_accepts() accepts. Of several query tokens cmp has a launch of its own,
/// which stores partials.
void launch_decode(const DecodeParams& p, Stream* stream);
/// The tuned or the padded kernels of one storage type, which a source file of its own instantiates
/// (decode/split_kv/kernel.cu.in).
template <DType Storage, bool Tuned>
void launch_split_kv(const DecodeParams& p, Stream* stream);
/// The same for cmp of several query tokens, and perhaps win (decode/tokens/kernel.cu.in).
template <DType Storage, bool Tuned>
void launch_tokens(const DecodeParams& p, Stream* stream);

}  // namespace nsa::gpu
