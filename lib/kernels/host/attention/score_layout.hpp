#pragma once
// Layout of the raw scores between attend_cmp and rank: [slot / 64][rows][H][64]. A slot is the compressed token where
// the rank holds all of them, else the memory row, so that the halo in front of a chunk has slots of its own.

#include <cstddef>
#include <cstdint>

#include "kernels/interface/kernel_table.hpp"

namespace nsa::host {

constexpr int score_block = 64;  ///< slots of one (row, head) that are contiguous

/// Whether the buffer holds every chunk. The halo is then not needed.
inline bool holds_all_chunks(const RowMap& map) { return map.rank == all_ranks || map.kv == 1; }

/// Slot of token i seen from chunk c.
inline std::int64_t score_slot(const RowMap& map, std::int64_t c, std::int64_t i) {
  return holds_all_chunks(map) ? i : row_in_chunk(map, c, i);
}

/// Offset of a slot's score of one (row, head).
inline std::int64_t score_offset(std::int64_t slot, std::int64_t row_heads, std::int64_t row_head) {
  return (slot / score_block * row_heads + row_head) * score_block + slot % score_block;
}

}  // namespace nsa::host
