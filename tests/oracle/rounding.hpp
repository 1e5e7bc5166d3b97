#pragma once
// Rounding of a float64 to a storage type, to nearest, ties to even.

#include "oracle/array.hpp"

namespace oracle {

enum class Storage { exact, fp32, bf16, fp16 };

/// Nearest value of the format; infinity above its largest finite value.
double round_to(Storage storage, double value);
void round_to(Storage storage, Reals& array);

/// Half the distance between neighbours at 1: the largest relative error of one rounding (normal range).
double unit_roundoff(Storage storage);

}  // namespace oracle
