#pragma once
// The tolerance of comparisons with float64 and of outputs with one another, for checks of a run and for reports on it.

#include <limits>

#include "nsa/config/config.hpp"

namespace nsa {

/// Largest error of an attention output that rounding explains: atol + rtol * scale. `scale`: the largest |v| among the
/// values that the output averages; `score`: the largest |score| of its softmax, if known.
/// - rtol covers fp32 accumulation or, for 16-bit storage, the rounding of the output and of the softmax weights that
///   tensor-core kernels pass to the second product (2^-9 each);
/// - a score is rounded to fp32 a few times, by 2^-24 of its size, and its weight changes by the same fraction;
/// - atol is the least value that the storage type can tell from zero.
constexpr double error_bound(DType type, double scale, double score = 0) {
  const double relative = (type == DType::f32 ? 2e-5 : 4e-3) + 8 * 0x1p-24 * score;
  const double absolute = type == DType::f16 ? 0x1p-24 : 0x1p-126;
  return absolute + relative * scale;
}

/// Largest |value|; infinite where one is not finite.
template <class Values>
double largest_magnitude(const Values& values) {
  double largest = 0;
  for (const double value : values) {
    const double magnitude = value < 0 ? -value : value;
    if (!(magnitude <= largest)) largest = magnitude == magnitude ? magnitude : std::numeric_limits<double>::infinity();
  }
  return largest;
}

}  // namespace nsa
