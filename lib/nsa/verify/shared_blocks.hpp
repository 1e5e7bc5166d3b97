#pragma once
// How many of their selected blocks neighbouring queries have in common (docs/METRICS.md, "Overlap").

#include <cstdint>

namespace nsa {

/// The sum over pairs of neighbours of the fraction of the later query's blocks that the earlier one has too.
struct SharedBlocks {
  double shares = 0, pairs = 0;

  /// Lists of `queries` neighbours, [queries][lists][n], each ascending and padded with -1; list i of a query is
  /// compared with list i of the next.
  void add(const std::int32_t* selected, std::int64_t queries, std::int64_t lists, std::int32_t n);
  /// NaN without a pair.
  double mean() const { return shares / pairs; }
};

}  // namespace nsa
