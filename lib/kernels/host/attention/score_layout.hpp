#pragma once
// The raw scores attend_cmp leaves for rank: [slot / 64][rows][H][64], slot = the compressed token where all of them
// are held, else the memory row (so that the halo in front of a chunk has slots of its own).

#include <cstddef>
#include <cstdint>

#include "kernels/interface/kernel_table.hpp"

namespace nsa::host {

constexpr int score_block = 64;

/// Whether the buffer holds every compressed token; then the halo is not needed.
inline bool holds_all(const RowMap& map) { return map.rank == all_ranks || map.kv == 1; }

/// Slot of token i seen from chunk c.
inline std::int64_t score_slot(const RowMap& map, std::int64_t c, std::int64_t i) {
  return holds_all(map) ? i : row_in_chunk(map, c, i);
}

/// Offset of a slot's score of one (row, head).
inline std::int64_t score_offset(std::int64_t slot, std::int64_t row_heads, std::int64_t row_head) {
  return (slot / score_block * row_heads + row_head) * score_block + slot % score_block;
}

}  // namespace nsa::host
