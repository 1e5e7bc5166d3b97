#pragma once
// The tolerance of comparisons with float64, for checks of a run and for reports on it.

#include "nsa/config/config.hpp"

namespace nsa {

/// Largest error that rounding explains: fp32 accumulation, and for 16-bit storage the rounding of the softmax
/// weights that tensor-core kernels pass to the second product (2^-9 relative), for |v| of order one.
constexpr double error_bound(DType type) { return type == DType::f32 ? 1e-4 : 2e-2; }

}  // namespace nsa
