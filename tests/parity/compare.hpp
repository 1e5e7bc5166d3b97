#pragma once
// How far the program may be from the oracle, and why.
//
// fp32: every number is a chain of a few sums of at most n terms, each rounded to 2^-24: sqrt(n) 2^-24 a sum
// for independent errors, relative to the tensor's largest value. `links` of them, at two sigma each.
//
// bf16, fp16 (unit roundoff u): the oracle rounds where the program stores. Both then hold the same numbers,
// except where an fp32 error carries a value over the middle between two neighbours: that flips a stored
// element by one ulp, at most 2u of the largest value. Flips are rare (fp32 error over ulp), so the largest
// difference is a few ulps, and the mean difference far below one: a rounding at a wrong place moves every
// element, by a quarter ulp of its own, and the mean by a sixteenth of the largest value's. Behind the first
// of several layers the inputs differ already, and more elements flip.

#include <cstdint>
#include <string>

#include "oracle/oracle.hpp"

namespace parity {

/// Largest and mean |a - b|, relative to the largest |b|. Infinite where a value is not a number.
struct Deviation {
  double largest = 0, mean = 0;
};
Deviation deviation(const oracle::Reals& a, const oracle::Reals& b);

struct Bound {
  double largest = 0, mean = 0;
};

/// The bound of `values` where each moves by a random amount besides, `moves` its standard deviation: the mean of |x|
/// is at most that. The largest difference has room for it: it is a sum of many such, each below an ulp.
Bound moved(const Bound& bound, const oracle::Reals& values, const oracle::Reals& moves);
/// For any tensor of a model with these options.
Bound bound_of(const oracle::Options& options);

/// Rows [first, first + rows) of axis 1.
template <class T>
oracle::Array<T> rows_of(const oracle::Array<T>& array, std::int64_t first, std::int64_t rows);

/// How two selections [B, R, G, n] differ, judged by scores [B, R, G, blocks].
struct SelectionDifference {
  std::int64_t total = 0;      ///< (b, r, g) compared
  std::int64_t differing = 0;  ///< of these, other blocks chosen
  double widest_gap = 0;       ///< most that a block left out scores above one taken in its place
  bool well_formed = true;     ///< ascending, -1 padded, as many blocks, forced ones among them
};
SelectionDifference compare_selections(const oracle::Options& options, const oracle::Integers& a,
                                       const oracle::Integers& b, const oracle::Reals& scores,
                                       std::int64_t first_position);

/// Catch2 checks of one tensor, and of a selection whose differences must be ties.
void check_close(const std::string& what, const oracle::Reals& a, const oracle::Reals& b, const Bound& bound);
SelectionDifference check_selection(const oracle::Options& options, const oracle::Integers& a,
                                    const oracle::Integers& b, const oracle::Reals& scores,
                                    std::int64_t first_position);

}  // namespace parity
