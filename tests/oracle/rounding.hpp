#pragma once
// Rounding of a float64 to what a storage type can hold, to nearest, ties to even.

#include "oracle/array.hpp"

namespace oracle {

enum class Storage { exact, fp32, bf16, fp16 };

/// Nearest value of the format; infinity past its largest.
double round_to(Storage storage, double value);
void round_to(Storage storage, Reals& array);

/// Half the distance between neighbours at 1: the largest relative error of one rounding (normal range).
double unit_roundoff(Storage storage);

}  // namespace oracle
