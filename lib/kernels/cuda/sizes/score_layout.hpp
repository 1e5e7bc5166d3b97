#pragma once
// Layout of the raw scores of a rank's own chunks: every chunk starts at a multiple of 8 columns (a 32-byte sector),
// and so does its halo, which ends where the chunk starts. Partial writes of a sector cost more than full ones.

#include <cstdint>

#include "kernels/shared/row_map.hpp"

namespace nsa::gpu {

NSA_HD constexpr std::int64_t round_up_to_sectors(std::int64_t columns) { return (columns + 7) / 8 * 8; }
NSA_HD std::int64_t score_halo_columns(const RowMap& map) { return round_up_to_sectors(map.halo); }
NSA_HD std::int64_t score_stride(const RowMap& map) { return score_halo_columns(map) + round_up_to_sectors(map.chunk); }
/// Whether columns are counted chunk by chunk; otherwise by token.
NSA_HD bool scores_by_chunk(const RowMap& map) { return map.rank != all_ranks && map.chunk != INT64_MAX; }

/// Columns of the raw scores of a tile: every token below `tokens`, and the halos of the chunks.
inline std::int64_t score_columns(const RowMap& map, std::int64_t tokens) {
  if (!scores_by_chunk(map)) return tokens;
  const std::int64_t owned = owned_chunks(map, tokens + map.halo, map.rank);
  if (owned == 0) return 0;
  const std::int64_t rest = tokens - ((owned - 1) * map.kv + map.rank) * map.chunk;
  return (owned - 1) * score_stride(map) + score_halo_columns(map) +
         (rest < 0           ? 0
          : rest < map.chunk ? rest
                             : map.chunk);
}

/// Floats between the score rows of two heads of so many columns: whole sectors.
inline std::int64_t padded_columns(std::int64_t columns) { return round_up_to_sectors(columns); }
inline std::int64_t score_pitch(const RowMap& map, std::int64_t tokens) {
  return padded_columns(score_columns(map, tokens));
}

}  // namespace nsa::gpu
