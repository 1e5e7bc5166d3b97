#pragma once
// How sdpa divides a branch into jobs: batched matrix products (attention/sdpa/gemm.cu), and gathers of selected rows
// with attention over them (attention/sdpa/packed.cu).

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels/interface/stage_args.hpp"

namespace nsa::gpu {

constexpr std::int64_t max_job_items = 65535;  ///< work items of a job: the limit of a grid's y

/// Columns of the packed K and V of a row's selected blocks.
std::int64_t selected_columns(const LayerShape&, const QueryTile&);

// Matrix products.

constexpr int max_window_rows = 256;                        ///< rows of a job whose window is packed
constexpr std::size_t gemm_budget = std::size_t{64} << 20;  ///< bytes of a job, most of which an L2 holds

/// Source of column j of K and V.
enum class Source {
  in_place,         ///< memory row j of the plane (ring: slot_begin + j)
  selected_blocks,  ///< packed: token j % l' of selected block j / l'
  window,           ///< packed: the window of the rows of the job, from its first token on
  whole             ///< packed: token j of the sequence
};

/// Tokens of the branch below max_positions.
std::int64_t tokens_of(Branch, const LayerShape&, const QueryTile&);
/// Columns of a packed window. A short sequence is packed from its beginning.
std::int64_t window_columns(const LayerShape&, const QueryTile&);
/// Whether the compressed scores are stored for rank: not where rank recomputes them.
bool stores_scores(Branch, const AttentionPolicy&);

/// Scratch bytes: those of one work item and those that a job needs once.
struct ScratchNeeds {
  std::size_t once = 0, work_item = 0;
  std::int64_t work_items = 0;
  /// Not rounded to whole work items: a tile of fewer rows or positions then never needs more.
  std::size_t bytes() const {
    return once + 1024 + std::min(std::max(gemm_budget, work_item), work_item * static_cast<std::size_t>(work_items));
  }
};
ScratchNeeds scratch_needs(bool stored, Source source, bool own_kv, std::int64_t columns, const LayerShape&,
                           const QueryTile&);

// Gathers.

/// A (row, group) as a sequence of its own with one query row.
LayerShape shape_of_job(const LayerShape&, std::int64_t columns);
QueryTile tile_of_job(const QueryTile&, std::int64_t items, std::int64_t columns);

/// Scratch of a job of so many work items.
struct JobBytes {
  std::size_t k, v, lengths, attention;
  JobBytes(const LayerShape&, const QueryTile&, std::int64_t items);
  std::size_t sum() const { return k + v + lengths + attention; }
};

/// Most work items of a job that `bytes` hold.
std::int64_t items_that_fit(const LayerShape&, const QueryTile&, std::size_t bytes);

}  // namespace nsa::gpu
