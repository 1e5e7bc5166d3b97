#pragma once
// A decode kernel's work: what one launch reads and who finishes it. decode/split_kv/branch.cu launches it for one
// branch, as a stage; decode/attention.cu for cmp, rank and win together, then sel.

#include "kernels/cuda/attention/block_sums.cuh"
#include "kernels/cuda/attention/split_kv.cuh"

namespace nsa::gpu {

constexpr int decode_warps = 4;  ///< of a CTA
constexpr int decode_threads = 32 * decode_warps;

/// One branch within a launch: CTAs [first_cta, first_cta + rows * groups * ctas) of x. Of a list's `ctas` the last
/// `splits` take it, the very last first: where units do not come out even, those have fewer of the other branch.
struct DecodeJob {
  Branch branch;
  int splits, first_cta;
  KvView k, v;
  std::int64_t* reads;
  float* parts;  ///< [list][split][heads of a tile * (Dv + 2)]; list: (row, group, head tile)
  int ctas = 0;  ///< more than `splits`, or 0: as many
};

/// What the last CTA of a list does: nothing (the parts stay); of cmp, merges the tiles' (m, sum) into `lse`; that, and
/// the list's parts into `out`.
enum class DecodeEnd { parts, lanes, merge };

struct DecodeParams {
  LayerShape shape;
  QueryTile tile;
  const void* q;
  DecodeJob jobs[2];
  int job_count;
  int head_tiles;
  DecodeEnd end;
  unsigned* arrivals;
  const std::int32_t* selected;  ///< sel
  // cmp
  float* scores;  ///< raw ones
  std::int64_t pitch;
  TileSums sums;  ///< or of blocks, by this rank's tiles
  bool scores_only;
  bool keeps_scores;  ///< in the L2, where K and V are not to drive them out
  float2* leaves;     ///< (m, sum) by tile of 32 tokens: [list][most_tiles][heads of a head tile]
  std::int64_t most_tiles;
  float* lse;
  Partials out;  ///< end = merge
};

__host__ __device__ inline std::int64_t decode_part_floats(int heads, int d_v) {
  return std::int64_t{heads} * (d_v + 2);
}

/// Of the scratch: (m, sum) of all tiles.
std::int64_t decode_leaf_floats(const LayerShape& s, const QueryTile& tile);

/// CTAs a list is split over, so that all lists together fill the SMs twice and no warp is without a tile.
int decode_splits(std::int64_t lists, std::int64_t tiles);

/// Whether what blocks are scored by, so many floats of all lists, fits the L2 (50 MB on H100 and H200) beside what
/// passes through it until then.
constexpr bool keeps_scores(std::int64_t floats) { return floats * std::int64_t{sizeof(float)} <= 40'000'000; }

/// Shapes that decode_accepts() takes; by type in files of their own.
void launch_decode(const DecodeParams& p, Stream* stream);
void launch_decode_bf16(const DecodeParams& p, Stream* stream);
void launch_decode_f16(const DecodeParams& p, Stream* stream);
void launch_decode_f32(const DecodeParams& p, Stream* stream);

}  // namespace nsa::gpu
