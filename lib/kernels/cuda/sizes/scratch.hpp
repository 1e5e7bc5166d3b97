#pragma once
// How the stages of a step divide one scratch buffer. The three branches may run side by side on several streams, so
// each has a part of its own; rank has a part after them. project runs before all of them and overlaps them.
//
// Plain C++ that needs no GPU: limits() says what the GPU is.

#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/diagnostics/error.hpp"
#include "kernels/interface/stage_args.hpp"

namespace nsa::gpu {

constexpr std::size_t padded(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

// Bytes of scratch a stage needs.
std::size_t project_scratch(const LayerShape&, const QueryTile&);
std::size_t attend_scratch(const LayerShape&, const QueryTile&);                        ///< scalar, of one branch
std::size_t decode_scratch(const LayerShape&, const QueryTile&);                        ///< of one branch
std::size_t rows_scratch(const LayerShape&, const QueryTile&);                          ///< of one branch
std::size_t gemm_scratch(const LayerShape&, const QueryTile&, const AttentionPolicy&);  ///< of one branch
std::size_t masked_scratch(const LayerShape&, const QueryTile&);                        ///< of one branch
std::size_t packed_scratch(const LayerShape&, const QueryTile&);                        ///< beside the others
std::size_t rank_scratch(const LayerShape&, const QueryTile&);
std::size_t rank_prefill_scratch(const LayerShape&, const QueryTile&);

/// rank_scratch or rank_prefill_scratch, whichever kernel the policy asks for.
std::size_t rank_scratch(const LayerShape&, const QueryTile&, const AttentionPolicy&);

/// Floats at the begin of the decode kernels' scratch of cmp: the (m, sum) of all KV tiles.
std::int64_t tile_lse_floats(const LayerShape&, const QueryTile&);

/// Splits of cmp of several query tokens, of so many KV tiles a work item: all CTAs together fill the SMs twice, or, of
/// a ragged batch, some times more often, and every CTA has a tile.
std::int64_t token_splits(const LayerShape&, const QueryTile&, std::int64_t tiles);

/// Bytes of one branch's part, whichever kernel of dispatch.cu runs; masked is not among them.
std::size_t branch_scratch(const LayerShape&, const QueryTile&, const AttentionPolicy&);

/// Bytes that suffice for every stage: KernelTable::scratch_bytes.
std::size_t scratch_bytes(const LayerShape&, const QueryTile&, const AttentionPolicy&);

// masked and the packed rows of sdpa are used only where a route asks for them. Their scratch lies after that of the
// other stages: first that of masked, for sel and win, then that of the packed rows.
std::size_t scratch_with_masked(const LayerShape&, const QueryTile&, const AttentionPolicy&);
std::size_t offset_of_packed(const LayerShape&, const QueryTile&, const AttentionPolicy&);
std::size_t scratch_with_packed(const LayerShape&, const QueryTile&, const AttentionPolicy&);

/// KernelTable::score_bytes.
std::size_t score_bytes(const LayerShape&, const QueryTile&, std::int64_t cmp_rows);

/// The same arguments with bytes [offset, offset + bytes) of their scratch. Throws InternalError when it is too small.
template <class Args>
Args with_scratch(Args a, std::size_t offset, std::size_t bytes) {
  if (offset + bytes > a.scratch_bytes)
    throw InternalError("scratch of " + std::to_string(a.scratch_bytes) + " bytes is too small (" +
                        std::to_string(offset + bytes) + " needed)");
  a.scratch = static_cast<char*>(a.scratch) + offset;
  a.scratch_bytes = bytes;
  return a;
}

/// The same arguments with the scratch of `branch`.
inline AttendArgs with_branch_scratch(const AttendArgs& a, Branch branch) {
  const std::size_t part = branch_scratch(a.shape, a.tile, a.policy);
  return with_scratch(a, branch * part, part);
}

/// The same arguments with the scratch of rank, which needs `bytes`.
inline RankArgs with_rank_scratch(const RankArgs& a, std::size_t bytes) {
  return with_scratch(a, branches * branch_scratch(a.shape, a.tile, a.policy), bytes);
}

}  // namespace nsa::gpu
