#pragma once
// A decode step's attention in one launch: what the kernel is told. decode/fused/kernel.cuh is the kernel,
// decode/attention.cu chooses between it and the launches one after the other.

#include "kernels/cuda/attention/block_scores.cuh"
#include "kernels/cuda/decode/split_kv/params.cuh"

namespace nsa::gpu {

/// Warps of a CTA: 8, one CTA an SM; with more lists than SMs 4, two CTAs an SM, clusters of one.
constexpr int step_warps = 8, step_warps_of_many = 4;
constexpr int most_step_cluster = 16;  ///< CTAs of a list; past 8 the size is not a portable one
constexpr int scored_tokens = 128;     ///< a warp scores at a time
constexpr int most_lead = 32;          ///< tokens in front of a block that reach into it

/// Division of 0 <= x < 2^31 by a number known at launch: x * magic / 2^(31 + shift).
struct Divisor {
  unsigned magic = 0, shift = 0;
  Divisor() = default;
  explicit Divisor(std::int64_t by) {
    while ((std::int64_t{1} << shift) < by) ++shift;
    magic = static_cast<unsigned>(((std::uint64_t{1} << (31 + shift)) + static_cast<std::uint64_t>(by) - 1) /
                                  static_cast<std::uint64_t>(by));
  }
  __device__ __forceinline__ int operator()(int x) const {
    return static_cast<int>(__umulhi(2u * static_cast<unsigned>(x), magic) >> shift);
  }
};

struct StepParams {
  LayerShape shape;
  QueryTile tile;
  const void* q;
  KvView k[branches], v[branches];
  std::int64_t* reads[branches];
  float* scores;  ///< raw ones, where there are no sums
  std::int64_t pitch;
  TileSums sums;  ///< or of blocks, by tile
  bool scores_only;
  bool keeps_scores;  ///< in the L2, where K and V are not to drive them out
  float2* leaves;     ///< (m, sum) by tile of 32 tokens: [list][most_tiles][heads of the engine]
  std::int64_t most_tiles;
  int most_tokens;  ///< compressed ones, whatever the position
  std::int32_t* selected;
  float* p_slc;
  std::int64_t p_slc_blocks;
  const float* gate;
  bool leave_out[branches];
  void* o;
  float* o_branch[branches];
  Divisor groups, stride, block, leaf;   ///< by shape.groups, rules.d, rules.l_sel, shape.leaf
  int warps;                             ///< of a CTA
  int cluster;                           ///< CTAs of a list
  Divisor by_cluster;                    ///< by cluster
  int share;                             ///< columns of o, by 4, that a CTA of the cluster merges
  Divisor by_share;                      ///< by share
  int share_heads;                       ///< heads they belong to, at most
  int win_warps;                         ///< of the list's, the last ones: win behind cmp; the others sel
  int piece;                             ///< blocks a warp scores at a time
  int few;                               ///< blocks a warp scores where no warp has more to do than those; 0: never
  Divisor by_piece, by_few, by_scorers;  ///< by piece, by few, by warps that score: all but the window's
  int ratio, lead;                       ///< compressed tokens that begin in a block, and those before it that reach in
};

/// A decode step in one kernel; false: it does not take the shape, and nothing was launched. decode/fused/launch.cu
bool step_in_one(const AttentionArgs& a, Stream* stream);

// By type, in files of their own. step_clusters: clusters of that size, CTAs of 8 warps, that run at the same time; 0:
// none.
int step_clusters_bf16(const LayerShape& s, int cluster);
int step_clusters_f16(const LayerShape& s, int cluster);
int step_clusters_f32(const LayerShape& s, int cluster);
void launch_step_bf16(const StepParams& p, Stream* stream);
void launch_step_f16(const StepParams& p, Stream* stream);
void launch_step_f32(const StepParams& p, Stream* stream);

}  // namespace nsa::gpu
