#pragma once
// The index arithmetic of NSA (arXiv 2502.11089), shared by lib/nsa and by the host and CUDA kernels. Positions and
// token counts are 64-bit: contexts exceed a million tokens.

#include <cstdint>

#include "kernels/shared/portable.hpp"

namespace nsa {

/// Block geometry of one layer. Valid: d | l, d | l_sel, l <= l_sel, n_sel >= n_init + n_local.
struct BlockRules {
  std::int32_t l = 32;       ///< positions a compressed token covers
  std::int32_t d = 16;       ///< positions between compressed tokens
  std::int32_t l_sel = 64;   ///< positions a selection block holds (l')
  std::int32_t n_sel = 16;   ///< blocks selected per query and group (n)
  std::int32_t n_init = 1;   ///< of these, the first blocks of the sequence, always selected
  std::int32_t n_local = 2;  ///< of these, the most recent blocks, always selected
  std::int32_t w = 512;      ///< window length
};

/// Number of compressed tokens valid at position t: those that end at or before t. A sequence of T tokens has as many
/// as are valid at T - 1.
NSA_HD std::int64_t compressed_tokens(const BlockRules& r, std::int64_t t) {
  return t + 1 < r.l ? 0 : (t + 1 - r.l) / r.d + 1;
}

/// Number of selection blocks that start at or before position t.
NSA_HD std::int64_t eligible_blocks(const BlockRules& r, std::int64_t t) { return t / r.l_sel + 1; }

/// Whether block j is always selected at position t: one of the first n_init or of the n_local most recent.
NSA_HD bool is_forced(const BlockRules& r, std::int64_t j, std::int64_t t) {
  return j < r.n_init || (j <= t / r.l_sel && j > t / r.l_sel - r.n_local);
}

/// First compressed token whose positions overlap selection block j (its last position is >= j*l_sel).
NSA_HD std::int64_t first_overlapping(const BlockRules& r, std::int64_t j) {
  const std::int64_t start = j * r.l_sel - r.l;  // token i overlaps when i*d > start
  return start < 0 ? 0 : start / r.d + 1;
}

/// One past the last compressed token whose positions overlap selection block j.
NSA_HD std::int64_t end_overlapping(const BlockRules& r, std::int64_t j) {
  return (j + 1) * r.l_sel / r.d;  // token i overlaps when i*d < (j+1)*l_sel; d divides l_sel
}

/// ov(i, j): positions shared by compressed token i and selection block j, in units of d
/// (1,2,2,2,1 at the paper's defaults). The overlap form of the paper's Eq. 9.
NSA_HD float overlap(const BlockRules& r, std::int64_t i, std::int64_t j) {
  const std::int64_t lo = i * r.d > j * r.l_sel ? i * r.d : j * r.l_sel;
  const std::int64_t hi_i = i * r.d + r.l, hi_j = (j + 1) * r.l_sel;
  const std::int64_t hi = hi_i < hi_j ? hi_i : hi_j;
  return hi > lo ? static_cast<float>(hi - lo) / static_cast<float>(r.d) : 0.0f;
}

/// First position of the window of position t.
NSA_HD std::int64_t window_begin(const BlockRules& r, std::int64_t t) { return t + 1 > r.w ? t + 1 - r.w : 0; }

}  // namespace nsa
