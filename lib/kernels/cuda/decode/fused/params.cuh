#pragma once
// Arguments of the fused decode kernel (decode/fused/kernel.cuh). decode/attention.cu uses it where it accepts the
// step.

#include <optional>

#include "kernels/cuda/attention/block_scores.cuh"
#include "kernels/cuda/decode/split_kv/instances.cuh"
#include "kernels/cuda/decode/split_kv/params.cuh"

namespace nsa::gpu {

/// Warps of a CTA: 8, one CTA an SM; with more work items than SMs 4, two CTAs an SM, clusters of one. After a launch
/// of cmp 6 with smaller rings, two CTAs an SM, where head sizes are at most 128. Of FP8 rows 12 in place of 8 where a
/// warp has several tiles: a tile has half the bytes and more instructions.
constexpr int fused_warps = 8, fused_warps_small = 4, fused_warps_after_cmp = 6, fused_warps_fp8 = 12;
constexpr int fused_max_cluster = 16;  ///< CTAs of a work item; sizes above 8 are not portable
constexpr int round_tokens = 128;      ///< tokens that a warp scores in a round
constexpr int max_halo_tokens = 32;    ///< halo tokens before a block that overlap it

/// Division of 0 <= x < 2^31 by a divisor known at launch: x * magic / 2^(31 + shift).
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

/// Pages of cmp and sel. An LSE segment is a page of cmp; a page of sel holds whole blocks.
struct FusedPages {
  const std::int32_t* table[2] = {};  ///< [cmp, sel], of the tile's first sequence; null: rows are contiguous
  int per_sequence[2] = {}, rows[2] = {}, groups = 1;
  Divisor by_blocks;  ///< by the blocks of a page of sel

  FusedPages() = default;
  FusedPages(const PageTable& of_cmp, const PageTable& of_sel, const LayerShape& s, int first_sequence) {
    if (!of_cmp.pages) return;
    const PageTable* tables[2] = {&of_cmp, &of_sel};
    for (int i = 0; i < 2; ++i) {
      const PageTable& t = *tables[i];
      table[i] = t.pages + std::int64_t{t.first_sequence + first_sequence} * t.per_sequence;
      per_sequence[i] = t.per_sequence, rows[i] = t.rows;
    }
    groups = of_sel.groups;
    by_blocks = Divisor(rows[1] / s.rules.l_sel);
  }
  /// Row m of a plane, which lies in page `entry` of a sequence, from where the plane begins in a page.
  __device__ __forceinline__ int row(int cache, int sequence, int entry, int m) const {
    const int page = table[cache][std::int64_t{sequence} * per_sequence[cache] + entry];
    return (page * groups - entry) * rows[cache] + m;
  }
};

struct FusedCoord;

/// Rows of K and V, in the order of Branch (cmp: raw rows), that the step appends before it attends them, and the
/// compressed token that completes.
struct AppendedRows {
  struct Row {
    const char* from;  ///< [work item][bytes]
    char* to;          ///< plane of the first work item
    std::int64_t plane_bytes;
    int bytes;  ///< whole 16-byte vectors
  };
  Row rows[2 * branches] = {};  ///< K of cmp, V of cmp, K of sel, ...
  int ring[branches] = {};      ///< rows of the cache; 0: one a position
  Divisor by_ring[branches];
};

/// Where the counters and the blocks of a step are logged, and the end of the step (StepEnds).
struct StepLog {
  int rows = INT32_MAX, counters = 0, first_position = 0;  ///< counters = 0: `reads` are the counters themselves
  std::int32_t* selected = nullptr;                        ///< [rows][selected_count]; null: not logged
  std::int64_t selected_count = 0;
  std::int64_t *position = nullptr, *step = nullptr;  ///< null: the step goes on
  unsigned* arrivals = nullptr;                       ///< zero between launches
  const std::int64_t* number = nullptr;               ///< of a ragged batch: the step's, the row of the logs
};

/// Of a rank that holds all K and V. ShardedDecodeParams (decode/sharded/params.cuh) adds to it what a rank needs that
/// holds some chunks of them; the kernel is a template of both.
struct FusedDecodeParams {
  using Coord = FusedCoord;
  static constexpr bool is_shard = false, is_layer = false, projects = false, after_cmp = false, has_pages = true,
                        lends = false;
  LayerShape shape;
  QueryTile tile;
  const void* q;
  KvView k[branches], v[branches];
  FusedPages pages;
  std::int64_t* reads[branches];
  float* scores;  ///< raw scores, where there are no block sums
  std::int64_t pitch;
  TileBlockSums block_sums;  ///< or sums of blocks, by tile
  bool scores_only;
  bool keeps_scores;   ///< in the L2: K and V are loaded with evict_first
  bool longest_first;  ///< the k-th cluster has the k-th work item by falling length
  float2* tile_lse;    ///< (m, sum) of each KV tile: [work item][max_tiles][heads of a warp tile]
  std::int64_t max_tiles;
  int max_tokens;  ///< upper bound of compressed tokens
  std::int32_t* selected;
  float* p_slc;
  std::int64_t p_slc_blocks;
  const float* gate;
  bool leave_out[branches];
  void* o;
  float* o_branch[branches];
  Divisor groups, stride, block, segment;  ///< by shape.groups, rules.d, rules.l_sel, lse.segment
  int warps;                               ///< of a CTA
  int cluster;                             ///< CTAs of a work item
  Divisor by_cluster;                      ///< by cluster
  int o_slice;                             ///< four-column vectors of a part of o that a CTA of a head tile merges
  Divisor by_o_slice;                      ///< by o_slice
  int o_slice_heads;                       ///< upper bound of the heads of a slice
  int win_warps;                           ///< last warps of the cluster: win after cmp; the others sel after cmp
  int round_blocks;                        ///< blocks that a warp scores in a round
  int single_pass_blocks;  ///< blocks of a warp where one round of all warps scores every block; 0: never
  Divisor by_round_blocks, by_single_pass,
      by_scoring_warps;  ///< by round_blocks, single_pass_blocks, scoring warps (all but those of the window)
  int tokens_per_block,
      halo_tokens;  ///< compressed tokens that begin in a block, halo tokens before it that overlap it
  // 1 in a tuned instance: head tiles of a work item, CTAs of a head tile.
  int head_tiles, tile_ctas;
  Divisor by_head_tiles, by_tile_ctas;
  __device__ __forceinline__ int held_buckets() const { return shape.lse.buckets; }
};

/// The step with the rows it appends and its logs. A kernel of its own: the code would slow the step without them.
struct FusedAppendParams : FusedDecodeParams {
  static constexpr bool is_layer = true;
  AppendedRows appended;
  StepLog log;
};
/// The same where neither cmp nor sel is in pages.
struct FusedContiguousParams : FusedAppendParams {
  static constexpr bool has_pages = false;
};
/// RoPE and gate of project too.
struct FusedLayerParams : FusedAppendParams {
  static constexpr bool projects = true;
  ProjectArgs project;
  const float* product = nullptr;  ///< [rows, columns] of project
  std::int64_t columns = 0;
};

/// A step of several query tokens, whose cmp, and perhaps win, has had a launch of its own (decode/tokens/kernel.cuh):
/// a CTA a (row, group) scores and selects, attends the selected blocks, and the window if it is not yet attended, and
/// merges all branches.
struct FusedTokenParams : FusedDecodeParams {
  static constexpr bool after_cmp = true;
  /// Of branches attended before: [work item][splits][heads * (Dv + 2)]. A split with a sum of 0 has no o.
  const float* before[branches] = {};
  int splits = 0;
};

/// Whether the kernel is built for the shape of these steps, and their geometry is one that it reads.
bool fused_decode_accepts(const AttentionArgs& a);
/// The rows that a step with these ends appends.
AppendedRows appended_rows(const StepEnds& ends);
/// The log of a step with these ends. `reads` becomes the rows that its counters go to.
StepLog step_log(const StepEnds& ends, const AttentionArgs& attention, std::int64_t* (&reads)[branches]);
/// Inputs and outputs of the kernel. A rank that holds chunks has block sums only.
FusedDecodeParams fused_decode_params(const AttentionArgs& a);
/// How the work of `shards` ranks that share the sequences is divided; cluster = 0: not possible.
struct DivisionLimits {
  int (*active_clusters)(const LayerShape& s, int cluster);
  std::int64_t max_tiles;  ///< of cmp
  int shards = 1, max_cluster = fused_max_cluster;
  bool one_wave = false;  ///< all work items are resident at the same time
  int only_warps = 0;     ///< of a CTA, two an SM; 0: 8 or 4
  bool lends = false;     ///< rows of a ragged batch have the same work (decode/loans)
};
void divide_work(FusedDecodeParams& p, const DivisionLimits& limits);

/// Clusters of the step that are resident at the same time; 0: the kernel does not take the shape.
int fused_slots(const LayerShape& s, const QueryTile& tile);

/// Launches the fused decode step; false: it does not accept the shape and nothing was launched. decode/fused/launch.cu
bool try_fused_decode(const AttentionArgs& a, Stream* stream);

/// Plans what follows cmp in a step of several query tokens; none: it does not accept the shape, or the work items are
/// too few to fill half of the SMs. `cmp`: the launch of cmp, with block sums, and its job; `win`: that of the window
/// if it is attended there, or null.
std::optional<FusedTokenParams> plan_fused_tokens(const AttentionArgs& a, const DecodeParams& launch,
                                                  const DecodeJob& cmp, const DecodeJob* win);

/// Divides the work on one rank and launches; cluster = 0: not possible.
void divide_work(FusedDecodeParams& p);
template <class Params>
void launch_divided(const Params& p, Stream* stream);

/// The instance for a shape whose block rules the fused kernel takes.
inline DecodeInstance fused_instance(const LayerShape& s) {
  const bool few_heads = s.heads_per_group <= decode_heads(s.dtype), few_blocks = s.rules.n_sel <= warp_top_n;
  if (is_tuned_size(s) && few_heads && few_blocks && (s.dtype != DType::f32 || s.d_k == 64))
    return {s.d_k, s.d_v, decode_heads(s.dtype), true};
  if (s.heads_per_group > padded_max_heads || s.rules.n_sel > padded_max_blocks) return {};
  return padded_instance(s, s.heads_per_group > 16 ? 32 : 16);
}

// The tuned or the padded kernels of one storage type, which a source file of its own instantiates
// (decode/fused/kernel.cu.in).
/// Clusters of that size, of CTAs of 8 warps, that are resident at the same time; 0: none.
template <DType Storage, bool Tuned>
int active_clusters(const LayerShape& s, int cluster);
template <DType Storage, bool Tuned, class Params>
void launch_fused_decode(const Params& p, Stream* stream);
// The same of the kernels of FP8 rows. Without p.appended nothing is appended.
int active_clusters_fp8(const LayerShape& s, int cluster);
void launch_fused_decode_fp8(const FusedAppendParams& p, Stream* stream);

/// Warps of a CTA of an instance after a launch of cmp.
constexpr int after_cmp_warps(const DecodeInstance& i) {
  if (i.heads > 16 || i.d_v > 128) return fused_warps;
  return i.tuned && i.heads == 16 && i.d_k <= 128 ? fused_warps_after_cmp : fused_warps_small;
}

}  // namespace nsa::gpu
