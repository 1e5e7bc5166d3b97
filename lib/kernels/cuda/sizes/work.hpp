#pragma once
// Into which work items, tiles and partials the attention kernels divide a tile of query rows, and which instance of
// the decode kernels serves a shape. Plain C++: the kernels use it, and so does the plan of a GPU that is not here.

#include <algorithm>
#include <cstdint>

#include "kernels/interface/layer_shape.hpp"

namespace nsa::gpu {

constexpr int window_span = 64;     ///< positions of a span of the window
constexpr int heads_per_tile = 16;  ///< query heads of a group that share one pass over K/V
constexpr int tile_rows = 32;       ///< rows of a KV tile of the decode kernels
constexpr int rows_warps = 4;       ///< consumer warps of the rows kernel

inline int head_tiles(const LayerShape& s) { return (s.heads_per_group + heads_per_tile - 1) / heads_per_tile; }

/// Floats of the partial of one split of a work item.
NSA_HD std::int64_t split_partial_floats(const LayerShape& s) { return std::int64_t{heads_per_tile} * (s.d_v + 2); }

constexpr int decode_heads(DType type) { return type == DType::f32 ? 4 : 16; }
inline int decode_head_tiles(const LayerShape& s) {
  return (s.heads_per_group + decode_heads(s.dtype) - 1) / decode_heads(s.dtype);
}
NSA_HD std::int64_t decode_partial_floats(int heads, int d_v) { return std::int64_t{heads} * (d_v + 2); }

/// Work items of a decode launch: (row, group, head tile).
inline std::int64_t decode_work_items(const LayerShape& s, const QueryTile& tile) {
  return tile.rows() * s.groups * decode_head_tiles(s);
}

/// Query tokens of a sequence that a CTA of cmp takes (decode/tokens/kernel.cuh), and how many such a step has.
constexpr int tokens_a_cta = 4;
NSA_HD int token_fours(const QueryTile& tile) { return (tile.tokens + tokens_a_cta - 1) / tokens_a_cta; }

/// KV tiles of a span.
NSA_HD int tiles_per_span(Branch branch, const LayerShape& s) {
  const std::int64_t tokens = branch == cmp ? s.lse.segment : branch == sel ? s.rules.l_sel : window_span;
  return static_cast<int>((tokens + tile_rows - 1) / tile_rows);
}

/// Words of scratch of the schedules by which a ragged batch is dealt: whole vectors; 0 where the batch is not ragged.
inline std::int64_t schedule_words(const QueryTile& tile) {
  return tile.ragged() ? (branches * (tile.rows() + 1) + 3) / 4 * 4 : 0;
}

/// Warps, of the `warps` of `ctas` CTAs, that attend the window after cmp while the others choose blocks and attend
/// these: in proportion to tiles. A window that begins anywhere has two tiles more. Where a warp has several tiles of
/// cmp, the choice takes about as long as three tiles of the blocks: half as many warps suffice for the window, unless
/// these would still end last. Every CTA keeps a warp that scores.
inline int window_warps(int warps, int ctas, int win_tiles, int sel_tiles, bool several_cmp_tiles) {
  if (sel_tiles == 0) return warps;
  const int tiles = win_tiles + sel_tiles, most = std::min(win_tiles + 2, warps - ctas);
  if (!several_cmp_tiles) return std::clamp((warps * win_tiles + tiles / 2) / tiles, 1, most);
  constexpr float choice_tiles = 3;
  int count = std::clamp((warps * win_tiles + 2 * tiles - 1) / (2 * tiles), 1, most);
  const auto tiles_a_warp = [](int tiles, int warps) { return static_cast<float>(tiles) / static_cast<float>(warps); };
  while (count < most && tiles_a_warp(win_tiles, count) > choice_tiles + tiles_a_warp(sel_tiles, warps - count))
    ++count;
  return count;
}

constexpr int cmp_tokens_per_block = 4, tile_blocks = tile_rows / cmp_tokens_per_block;

/// Whether selection blocks are scored from sums by KV tile (attention/block_sums.cuh). It depends on the shape alone.
/// An LSE segment, and so a chunk, has whole tiles.
NSA_HD bool scores_by_tile(const LayerShape& s) {
  const BlockRules& r = s.rules;
  return r.l == 2 * r.d && r.l_sel == cmp_tokens_per_block * r.d && s.lse.segment % tile_rows == 0;
}
constexpr std::int64_t tile_sum_floats(std::int64_t tiles, int heads) {
  return tiles * heads * (tile_blocks + 2) + heads;
}

// For which shapes the decode kernels are built.
//
// A tuned instance serves one pair of head sizes, which are constants of its code, with up to 16 query heads a group
// and 16 selected blocks in the fused step. A padded instance serves every pair of multiples of 16 up to its size: rows
// in memory have the shape's length, slots and registers the instance's. Columns past the head size are zeros up
// to the next 64, and nothing is multiplied past these. It takes up to 128 query heads a group, in head tiles, and 32
// selected blocks.

struct DecodeInstance {
  int d_k = 0, d_v = 0;  ///< 0: no instance serves the shape
  int heads = 0;         ///< of a warp tile
  bool tuned = false;
  explicit operator bool() const { return d_k > 0; }
};

constexpr int warp_top_n = 16;  ///< entries of a sorted list that a warp keeps: at most so many blocks are selected
constexpr int padded_max_heads = 128;  ///< query heads of a group
constexpr int padded_max_blocks = 32;  ///< selected blocks of a fused step

inline bool is_tuned_size(const LayerShape& s) {
  if (s.dtype == DType::f32) return s.d_k == s.d_v && (s.d_k == 64 || s.d_k == 128);
  return (s.d_k == 64 && s.d_v == 64) || ((s.d_k == 128 || s.d_k == 192) && s.d_v == 128);
}
/// The padded instance whose warp tiles have `heads` heads.
inline DecodeInstance padded_instance(const LayerShape& s, int heads) {
  const int largest = std::max(s.d_k, s.d_v);
  if (s.dtype == DType::f32 || s.d_k % 16 != 0 || s.d_v % 16 != 0 || largest > 256) return {};
  if (largest <= 128) return {128, 128, heads, false};
  return {256, 256, 16, false};
}

/// Instance of the split-KV kernel.
inline DecodeInstance split_kv_instance(const LayerShape& s) {
  if (is_tuned_size(s)) return {s.d_k, s.d_v, decode_heads(s.dtype), true};
  return padded_instance(s, 16);
}

/// Heads of a group as the scratch of either kernel counts them: whole warp tiles.
NSA_HD int padded_heads(const LayerShape& s) {
  const int tile = s.dtype == DType::f32 ? 4 : s.heads_per_group > 16 ? 32 : 16;
  return (s.heads_per_group + tile - 1) / tile * tile;
}

}  // namespace nsa::gpu
