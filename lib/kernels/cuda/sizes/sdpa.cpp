#include "kernels/cuda/sizes/sdpa.hpp"

#include "kernels/cuda/sizes/accepts.hpp"
#include "kernels/cuda/sizes/score_layout.hpp"
#include "kernels/cuda/sizes/scratch.hpp"

namespace nsa::gpu {

namespace {

constexpr std::size_t packed_budget = std::size_t{1} << 30;

/// Upper bound of the rows of a rank, halos with them (halo < segment <= chunk).
std::int64_t max_rows(const LayerShape& s, std::int64_t tokens) { return tokens + 2 * s.lse.segment + tokens; }

// The last tile of a prefill may have one row, which packs K and V of its own.
QueryTile last_tile(QueryTile tile) {
  tile.tokens = 1;
  return tile;
}

}  // namespace

std::int64_t selected_columns(const LayerShape& s, const QueryTile& tile) {
  return std::min<std::int64_t>(s.rules.n_sel, eligible_blocks(s.rules, tile.max_positions - 1)) * s.rules.l_sel;
}

std::int64_t tokens_of(Branch branch, const LayerShape& s, const QueryTile& tile) {
  return branch == cmp ? compressed_tokens(s.rules, tile.max_positions - 1) : tile.max_positions;
}

std::int64_t window_columns(const LayerShape& s, const QueryTile& tile) {
  return std::min<std::int64_t>(s.rules.w + std::min(tile.tokens, max_window_rows) - 1, tile.max_positions);
}

bool stores_scores(Branch branch, const AttentionPolicy& policy) { return branch == cmp && !policy.recompute_scores; }

ScratchNeeds scratch_needs(bool stored, Source source, bool own_kv, std::int64_t columns, const LayerShape& s,
                           const QueryTile& tile) {
  const std::size_t storage = size_of(s.dtype), packed = static_cast<std::size_t>(columns * (s.d_k + s.d_v)) * storage;
  ScratchNeeds needs;
  needs.work_items = own_kv ? tile.rows() * s.groups : tile.tokens;
  needs.work_item =
      static_cast<std::size_t>(s.heads_per_group * padded_columns(columns)) * (storage + (stored ? 0 : sizeof(float)));
  if (source == Source::in_place) return needs;
  (own_kv ? needs.work_item : needs.once) += packed;
  return needs;
}

std::size_t gemm_scratch(const LayerShape& s, const QueryTile& tile, const AttentionPolicy& policy) {
  const bool own_kv = tile.tokens == 1;
  const std::size_t least = own_kv ? 0 : gemm_scratch(s, last_tile(tile), policy);
  const std::int64_t compressed = tokens_of(cmp, s, tile);
  std::size_t bytes =
      std::max(least, scratch_needs(false, Source::selected_blocks, true, selected_columns(s, tile), s, tile).bytes());
  const auto consider = [&](Branch branch, Source source, std::int64_t columns) {
    if (columns > 0)
      bytes = std::max(bytes, scratch_needs(stores_scores(branch, policy), source, own_kv, columns, s, tile).bytes());
  };
  consider(win, Source::window, window_columns(s, tile));
  consider(cmp, Source::whole, compressed);
  consider(cmp, Source::in_place, max_rows(s, compressed));
  return bytes;
}

std::size_t masked_scratch(const LayerShape& s, const QueryTile& tile) {
  const bool own_kv = tile.tokens == 1;
  const std::size_t least = own_kv ? 0 : masked_scratch(s, last_tile(tile));
  return std::max({least, scratch_needs(false, Source::whole, own_kv, tile.max_positions, s, tile).bytes(),
                   scratch_needs(false, Source::in_place, own_kv, tile.max_positions, s, tile).bytes()});
}

bool masked_accepts(const LayerShape& s, const QueryTile& tile) {
  const ScratchNeeds one =
      scratch_needs(false, Source::whole, tile.tokens == 1, std::max<std::int64_t>(1, tile.max_positions), s, tile);
  return one.once + one.work_item <= gemm_budget;
}

LayerShape shape_of_job(const LayerShape& s, std::int64_t columns) {
  LayerShape job = s;
  job.groups = 1;
  job.rules.w = static_cast<std::int32_t>(columns);
  return job;
}

QueryTile tile_of_job(const QueryTile& tile, std::int64_t items, std::int64_t columns) {
  QueryTile job;
  job.batches = static_cast<std::int32_t>(items);
  job.first_position = tile.first_position;
  job.max_positions = columns;
  return job;
}

JobBytes::JobBytes(const LayerShape& s, const QueryTile& tile, std::int64_t items) {
  const std::int64_t columns = selected_columns(s, tile);
  const std::size_t rows = static_cast<std::size_t>(items * columns) * size_of(s.dtype);
  k = padded(rows * static_cast<std::size_t>(s.d_k));
  v = padded(rows * static_cast<std::size_t>(s.d_v));
  lengths = padded(static_cast<std::size_t>(items) * sizeof(std::int32_t));
  attention = padded(decode_scratch(shape_of_job(s, columns), tile_of_job(tile, items, columns)));
}

std::int64_t items_that_fit(const LayerShape& s, const QueryTile& tile, std::size_t bytes) {
  std::int64_t fit = 0, too_many = std::min(tile.rows() * s.groups, max_job_items) + 1;
  while (too_many - fit > 1) {
    const std::int64_t middle = fit + (too_many - fit) / 2;
    (JobBytes(s, tile, middle).sum() <= bytes ? fit : too_many) = middle;
  }
  return fit;
}

std::size_t packed_scratch(const LayerShape& s, const QueryTile& tile) {
  if (!packed_accepts(s, tile) || tile.rows() == 0) return 0;
  const std::int64_t items = std::max<std::int64_t>(1, items_that_fit(s, tile, packed_budget));
  return JobBytes(s, tile, items).sum();
}

}  // namespace nsa::gpu
