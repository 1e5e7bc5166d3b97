#pragma once
// Arguments of the split-KV decode kernel. decode/split_kv/branch.cu launches it for one branch, as a stage;
// decode/attention.cu launches it for cmp and win together, then for sel.

#include "kernels/cuda/attention/block_sums.cuh"
#include "kernels/cuda/attention/split_kv.cuh"

namespace nsa::gpu {

constexpr int decode_warps = 4;  ///< of a CTA
constexpr int decode_threads = 32 * decode_warps;

/// One branch within a launch: CTAs [first_cta, first_cta + rows * groups * ctas) of x. Of the `ctas` of a work item
/// the last `splits` take this branch in reverse order: where spans do not divide evenly, those have fewer of the other
/// branch.
struct DecodeJob {
  Branch branch;
  int splits, first_cta;
  KvView k, v;
  std::int64_t* reads;
  float* partials;  ///< [work item][split][heads of a tile * (Dv + 2)]; work item: (row, group, head tile)
  int ctas = 0;     ///< more than `splits`; 0: equal to `splits`
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
};

__host__ __device__ inline std::int64_t decode_partial_floats(int heads, int d_v) {
  return std::int64_t{heads} * (d_v + 2);
}

/// Work items of a launch: (row, group, head tile).
inline std::int64_t decode_work_items(const LayerShape& s, const QueryTile& tile) {
  return tile.rows() * s.groups * decode_head_tiles(s);
}

/// Floats of scratch for the (m, sum) of all KV tiles.
std::int64_t tile_lse_floats(const LayerShape& s, const QueryTile& tile);

/// Splits of a work item: all work items together fill the SMs twice, and every warp has a tile.
int decode_splits(std::int64_t work_items, std::int64_t tiles);

/// Whether scores or block sums, so many floats of all work items, stay in the L2 (50 MB on H100 and H200) while K and
/// V pass through it.
constexpr bool keeps_scores(std::int64_t floats) { return floats * std::int64_t{sizeof(float)} <= 40'000'000; }

/// Parameters without jobs and outputs.
DecodeParams decode_params(const LayerShape& s, const QueryTile& tile, const void* q);
/// Sets the outputs of cmp: raw scores, LSE buckets, and the (m, sum) of tiles at the begin of its scratch.
void set_cmp_outputs(DecodeParams& p, const AttendArgs& cmp_args);
/// A job of a launch on `splits` CTAs from CTA 0 on.
DecodeJob decode_job(Branch branch, const AttendArgs& a, int splits, float* partials);

/// Launches the kernel for a shape that decode_accepts() accepts.
void launch_decode(const DecodeParams& p, Stream* stream);
/// The tuned or the padded kernels of one storage type, which a source file of its own instantiates
/// (decode/split_kv/kernel.cu.in).
template <DType Storage, bool Tuned>
void launch_split_kv(const DecodeParams& p, Stream* stream);

}  // namespace nsa::gpu
