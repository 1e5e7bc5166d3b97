#pragma once
// Which rank owns which heads and rows. The world is heads x kv ranks: rank = head_shard * kv + kv_rank. A head shard
// owns whole KV groups; a kv shard owns every kv-th chunk of the sequence (shared/row_map.hpp). Pure arithmetic: no
// MPI, no memory.

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "kernels/interface/kernel_table.hpp"
#include "nsa/config/config.hpp"

namespace nsa {

struct Partition {
  std::int32_t heads = 1, kv = 1;            ///< shards
  std::int32_t head_shard = 0, kv_rank = 0;  ///< of this rank
  LayerShape shape;                          ///< of this rank
  std::int32_t group_begin = 0;              ///< first global group
  std::int64_t chunk_tokens = 0;             ///< selection K/V positions a chunk holds
  std::int32_t query_tokens = 1;             ///< of a sequence in a decode step

  RowMap tokens(bool gathered) const;      ///< selection K/V
  RowMap compressed(bool gathered) const;  ///< compressed tokens, with the halo that scoring needs
  RowMap raw_cmp() const;                  ///< prefill: cmp projections of own chunks, with the halo after each
  RowMap raw_heads(bool gathered) const;   ///< prefill: the first l-d rows of each chunk, which fill those halos
  RowMap window_ring() const;              ///< decode: what the windows of a step reach, replicated on the kv ranks
  RowMap window_share() const;             ///< the slots of that ring that this kv rank reads
  RowMap raw_ring() const;                 ///< decode: what the compressed tokens of a step cover, replicated
  /// Rows of memory that a rank allocates under a local map for a sequence of `rows` rows; the same on every rank.
  std::int64_t capacity(const RowMap& local, std::int64_t rows) const;
};

/// heads x kv for `ranks`: as the input says, else the most heads that divide the groups, and the rest kv.
/// Throws UserError when they do not multiply to `ranks` or heads does not divide the groups.
std::pair<std::int32_t, std::int32_t> factorise(const Config& config, std::int32_t ranks);

Partition make_partition(const Config& config, const Point& point, std::int32_t ranks, std::int32_t rank);

/// Tokens read at position t for one (b, g), summed over the kv ranks, from the shape alone (docs/METRICS.md).
struct ExpectedReads {
  std::int64_t branch[branches];
};
ExpectedReads expected_reads(const BlockRules& rules, std::int64_t t);
std::int64_t nsa_vibe_reads(const BlockRules& rules, std::int64_t t);

/// Rows [0, rows) of a sharded sequence that the map's rank owns.
std::int64_t owned_rows(const RowMap& local, std::int64_t rows);

/// Whether a backend that has one launch for a sharded decode step may take it: the kv of its kernel, whose ranks merge
/// as many LSE buckets each. What else the launch asks of a step, it is asked itself (docs/kernels/sharding.md).
constexpr bool may_run_in_one_launch(std::int32_t kv) { return kv > 1 && kv <= 8 && 24 % kv == 0; }

/// Positions [first, end) of a sequence.
struct Span {
  std::int64_t first = 0, end = 0;
};

/// The rows of memory that hold the positions of a span under a local map: rows [first, end), the same on every rank.
Span memory_rows(const RowMap& local, const Span& positions);

/// The positions [first, end) that a prefill runs, `chunk` of them at a time. The caches hold those before `first`.
struct PrefillRange {
  std::int64_t first = 0, end = 0, chunk = INT64_MAX;
  std::vector<Span> chunks() const;  ///< the prefill chunks, by rising position
  /// Whether a chunk finds rows before it, or leaves rows to the next one.
  bool in_parts() const { return first > 0 || end - first > chunk; }
};
/// The most rows of memory that the positions of a prefill chunk take, KV chunks whole.
std::int64_t widest_chunk(const RowMap& local, const PrefillRange& range);
/// That of a point of kind = "prefill".
PrefillRange prefill_range(const Config& config, const Point& point);

/// Positions that a point needs memory for: those of its longest sequence; in decode the query
/// tokens of all steps, in prefill its prefix.
std::int64_t total_positions(const Config& config, const Point& point);

}  // namespace nsa
