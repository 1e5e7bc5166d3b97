#pragma once
// How the stages of a step divide one scratch buffer. The three branches may run side by side on several streams, so
// each has a part of its own; rank has a part after them. project runs before all of them and overlaps them.

#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu {

constexpr std::size_t padded(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

/// Bytes of one branch's part, whichever kernel of dispatch.cu runs; masked is not among them.
std::size_t branch_scratch(const LayerShape&, const QueryTile&, const AttentionPolicy&);

/// Bytes that suffice for every stage: KernelTable::scratch_bytes.
std::size_t scratch_bytes(const LayerShape&, const QueryTile&, const AttentionPolicy&);

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
