#include "kernels/cuda/sizes/scratch.hpp"

#include <algorithm>
#include <limits>

#include "kernels/cuda/sizes/accepts.hpp"
#include "kernels/cuda/sizes/limits.hpp"
#include "kernels/cuda/sizes/score_layout.hpp"
#include "kernels/cuda/sizes/work.hpp"

namespace nsa::gpu {

namespace {

// CTAs of cmp of several query tokens on an SM: four warps that multiply together, or four and one that copies.
int token_ctas(const LayerShape& s) { return s.dtype != DType::f32 && is_tuned_size(s) && s.d_k <= 128 ? 3 : 2; }

}  // namespace

std::size_t project_scratch(const LayerShape& s, const QueryTile& tile) {
  return static_cast<std::size_t>(tile.rows() * qkv_columns(s)) * sizeof(float);
}

// Work items are split only while they are fewer than the CTAs wanted (2 an SM), so there are less than twice as many
// splits.
std::size_t attend_scratch(const LayerShape& s, const QueryTile&) {
  return static_cast<std::size_t>(4 * limits().sms * split_partial_floats(s)) * sizeof(float);
}

std::int64_t tile_lse_floats(const LayerShape& s, const QueryTile& tile) {
  const std::int64_t segments = compressed_tokens(s.rules, tile.max_positions - 1) / s.lse.segment + 2;
  return tile.rows() * s.groups * padded_heads(s) * segments * tiles_per_span(cmp, s) * 2;
}

std::int64_t token_splits(const LayerShape& s, const QueryTile& tile, std::int64_t tiles) {
  constexpr int more_of_ragged = 4;  // CTAs of a short sequence end early
  const std::int64_t items = std::int64_t{tile.batches} * s.groups * decode_head_tiles(s) * token_fours(tile);
  const std::int64_t resident = std::int64_t{token_ctas(s)} * limits().sms;
  const auto fill = [&](std::int64_t splits) {  // of all waves of CTAs
    const std::int64_t ctas = items * splits, waves = (ctas + resident - 1) / resident;
    return static_cast<double>(ctas) / static_cast<double>(waves * resident);
  };
  const std::int64_t fewest = std::max<std::int64_t>(1, resident / items);
  std::int64_t wanted = fewest;
  for (const std::int64_t splits : {fewest + 1, fewest + 2})
    if (fill(splits) > fill(wanted) + 0.1) wanted = splits;
  const std::int64_t two_tiles_each = std::max<std::int64_t>(1, tiles / 2);
  return std::clamp<std::int64_t>(wanted * (tile.ragged() ? more_of_ragged : 1), 1, two_tiles_each);
}

// All work items together have at most two partials an SM, or one each; of a ragged batch the sum of both; of several
// query tokens one a split of cmp.
std::size_t decode_scratch(const LayerShape& s, const QueryTile& tile) {
  if (!decode_accepts(s, tile)) return 0;
  const std::int64_t work_items = decode_work_items(s, tile);
  const std::int64_t ctas = 2 * limits().sms;
  std::int64_t partials = tile.ragged() ? ctas + work_items : std::max(ctas, work_items);
  if (tile.tokens > 1)
    partials = std::max(partials, work_items * token_splits(s, tile, std::numeric_limits<std::int64_t>::max()));
  return static_cast<std::size_t>(partials * decode_partial_floats(decode_heads(s.dtype), s.d_v) +
                                  tile_lse_floats(s, tile) + schedule_words(tile)) *
         sizeof(float);
}

std::size_t rows_scratch(const LayerShape& s, const QueryTile& tile) {
  if (!rows_accept(s, tile)) return 0;
  const std::int64_t work_items = tile.rows() * s.groups * head_tiles(s),
                     segment_lse = compressed_tokens(s.rules, tile.max_positions - 1) / s.lse.segment + 2;
  const std::int64_t partials = std::max<std::int64_t>(4 * limits().sms, 16 * std::min<std::int64_t>(work_items, 16));
  constexpr std::int64_t state_floats = 2;  // (m, sum)
  return static_cast<std::size_t>(partials * split_partial_floats(s) +
                                  work_items * segment_lse * rows_warps * heads_per_tile * state_floats) *
         sizeof(float);
}

std::size_t rank_scratch(const LayerShape& s, const QueryTile& tile) {
  const std::int64_t blocks = tile.max_positions / s.rules.l_sel + 1;
  const std::size_t max_fixed_bytes = 48 << 10;  // of RankShared::bytes besides the keys; above it keys go to scratch
  return static_cast<std::size_t>(blocks) * sizeof(unsigned) + max_fixed_bytes <= limits().shared_bytes
             ? 0
             : static_cast<std::size_t>(tile.rows() * s.groups * blocks) * sizeof(unsigned);
}

std::size_t rank_prefill_scratch(const LayerShape& s, const QueryTile& tile) {
  if (!tiles_shape(s)) return 0;
  return static_cast<std::size_t>(tile.rows() * s.groups * block_score_pitch(s.rules, tile.max_positions)) *
         sizeof(float);
}

std::size_t rank_scratch(const LayerShape& s, const QueryTile& tile, const AttentionPolicy& policy) {
  return policy.recompute_scores ? rank_prefill_scratch(s, tile) : rank_scratch(s, tile);
}

std::size_t branch_scratch(const LayerShape& s, const QueryTile& tile, const AttentionPolicy& policy) {
  QueryTile split = tile;
  if (policy.recompute_scores) {  // no LSE segments are stored, and more rows than these are not split
    split.tokens = std::min(tile.tokens, 16);
    split.max_positions = 1;
  }
  return padded(std::max(
      {attend_scratch(s, tile), decode_scratch(s, split), rows_scratch(s, split), gemm_scratch(s, tile, policy)}));
}

std::size_t scratch_bytes(const LayerShape& s, const QueryTile& tile, const AttentionPolicy& policy) {
  const std::size_t product = padded(project_scratch(s, tile));
  // A decode layer in one launch reads its product while it attends.
  const std::size_t behind = std::max(padded(rank_scratch(s, tile, policy)), tile.tokens == 1 ? product : 0);
  return std::max(product, branches * branch_scratch(s, tile, policy) + behind);
}

std::size_t scratch_with_masked(const LayerShape& s, const QueryTile& tile, const AttentionPolicy& policy) {
  return padded(scratch_bytes(s, tile, policy)) + 2 * padded(masked_scratch(s, tile));
}

std::size_t offset_of_packed(const LayerShape& s, const QueryTile& tile, const AttentionPolicy& policy) {
  return masked_accepts(s, tile) ? scratch_with_masked(s, tile, policy) : padded(scratch_bytes(s, tile, policy));
}

std::size_t scratch_with_packed(const LayerShape& s, const QueryTile& tile, const AttentionPolicy& policy) {
  return offset_of_packed(s, tile, policy) + packed_scratch(s, tile);
}

std::size_t score_bytes(const LayerShape& s, const QueryTile& tile, std::int64_t cmp_rows) {
  // Where the rows are chunks with halos, there are at most so many chunks, and each takes so many padding floats.
  const std::int64_t halo = s.rules.l / s.rules.d - 1, segment = s.lse.segment,
                     chunks = cmp_rows / (segment + halo) + 1,
                     padding = round_up_to_sectors(segment) + round_up_to_sectors(halo) - segment - halo;
  const std::int64_t raw = tile.rows() * s.heads() * padded_columns(cmp_rows + chunks * padding);
  // A decode step may store block sums of whole segments instead, which are more floats where a group has few heads.
  const std::int64_t sums =
      scores_by_tile(s) && decode_accepts(s, tile)
          ? tile.rows() * s.groups *
                tile_sum_floats((cmp_rows + segment - 1) / segment * tiles_per_span(cmp, s), padded_heads(s))
          : 0;
  return static_cast<std::size_t>(std::max(raw, sums)) * sizeof(float);
}

}  // namespace nsa::gpu
