#pragma once
// How far the program may be from the oracle, and why.
//
// fp32: every number comes from a chain of a few sums of at most n terms, each rounded to 2^-24. Independent errors
// make sqrt(n) 2^-24 per sum, relative to the tensor's largest value. `links` is the number of sums, at two sigma each.
//
// bf16, fp16 (unit roundoff u): the oracle rounds where the program stores. Both then hold the same numbers, except
// where an fp32 error carries a value past the midpoint of two neighbours: that changes a stored element by one ulp, at
// most 2u of the largest value. Such flips are rare (fp32 error over ulp), so the largest difference is a few ulps, and
// the mean difference is far below one ulp. A rounding at a wrong place changes every element by a quarter of its ulp,
// and the mean by a sixteenth of the largest value's ulp. After the first of several layers the inputs already differ,
// and more elements flip.

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "oracle/oracle.hpp"

namespace parity {

/// Largest and mean |a - b|, relative to the largest |b|. Infinite where a value is not a number.
struct Deviation {
  double largest = 0, mean = 0;
};
Deviation deviation(const oracle::Reals& a, const oracle::Reals& b);
double largest_of(const oracle::Reals& values);  ///< largest magnitude

struct Bound {
  double largest = 0, mean = 0;
};

/// The bound of `values` that also change by random amounts with standard deviation `moves`: the mean of |x| is at most
/// that. The largest difference keeps its bound: such a change is a sum of many amounts below one ulp.
Bound moved(const Bound& bound, const oracle::Reals& values, const oracle::Reals& moves);
/// The bound of any tensor of a model with these options.
Bound bound_of(const oracle::Options& options);

/// Positions of the first recorded row: one for all sequences, or one each.
struct FirstPositions {
  std::int64_t all = 0;
  std::vector<std::int64_t> each;
  FirstPositions(std::int64_t first) : all(first) {}
  FirstPositions(std::int64_t first, std::vector<std::int64_t> of_sequences)
      : all(first), each(std::move(of_sequences)) {}
  std::int64_t operator()(std::int64_t b) const { return each.empty() ? all : each.at(static_cast<std::size_t>(b)); }
};

/// Rows [first, first + rows) of axis 1.
template <class T>
oracle::Array<T> rows_of(const oracle::Array<T>& array, const FirstPositions& first, std::int64_t rows);

/// How two selections [B, R, G, n] differ, judged by scores [B, R, G, blocks].
struct SelectionDifference {
  std::int64_t total = 0;      ///< (b, r, g) compared
  std::int64_t differing = 0;  ///< those with different blocks
  double widest_gap = 0;       ///< largest excess of a left-out block's score over that of a block chosen instead
  bool well_formed = true;     ///< ascending, -1 padded, the right number of blocks, with the forced ones
};
SelectionDifference compare_selections(const oracle::Options& options, const oracle::Integers& a,
                                       const oracle::Integers& b, const oracle::Reals& scores,
                                       const FirstPositions& first_position);

/// Catch2 checks of one tensor, and of a selection whose differences must be ties.
void check_close(const std::string& what, const oracle::Reals& a, const oracle::Reals& b, const Bound& bound);
SelectionDifference check_selection(const oracle::Options& options, const oracle::Integers& a,
                                    const oracle::Integers& b, const oracle::Reals& scores,
                                    const FirstPositions& first_position);

}  // namespace parity
