#pragma once
// Rounding of a float64 to a storage type, to nearest, ties to even.

#include "oracle/array.hpp"

namespace oracle {

enum class Storage { exact, fp32, bf16, fp16 };

/// Nearest value of the format; infinity above its largest finite value.
double round_to(Storage storage, double value);
void round_to(Storage storage, Reals& array);

/// A K or V vector as an FP8 cache holds it: each element over 2^k rounded to E4M3 (3 fraction bits, exponents from -6,
/// largest 448), times 2^k. k is the least integer with which no element is above 448 * 2^k, from -117 to 119; elements
/// that the latter leaves above become the largest. A vector with an element that is not finite is NaN.
void round_to_fp8(std::vector<double>& row);

/// Half the distance between neighbours at 1: the largest relative error of one rounding (normal range).
double unit_roundoff(Storage storage);

}  // namespace oracle
