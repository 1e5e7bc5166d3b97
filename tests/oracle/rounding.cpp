#include "oracle/rounding.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace oracle {
namespace {

struct Format {
  int digits;        ///< of the significand, the hidden one included
  int min_exponent;  ///< of the smallest normal number
  double largest;
};

Format format_of(Storage storage) {
  switch (storage) {
    case Storage::fp32:
      return {24, -126, std::ldexp(2 - std::ldexp(1, -23), 127)};
    case Storage::bf16:
      return {8, -126, std::ldexp(2 - std::ldexp(1, -7), 127)};
    case Storage::fp16:
      return {11, -14, 65504};
    case Storage::exact:
      break;
  }
  return {53, -1022, std::numeric_limits<double>::max()};
}

}  // namespace

double round_to(Storage storage, double value) {
  if (storage == Storage::exact || value == 0 || !std::isfinite(value)) return value;
  const Format format = format_of(storage);
  const int exponent = std::max(std::ilogb(value), format.min_exponent);  // below it: subnormals with the same spacing
  const double spacing = std::ldexp(1, exponent - (format.digits - 1));
  const double rounded = std::nearbyint(value / spacing) * spacing;
  return std::abs(rounded) > format.largest ? std::copysign(std::numeric_limits<double>::infinity(), value) : rounded;
}

void round_to(Storage storage, Reals& array) {
  for (double& value : array.values) value = round_to(storage, value);
}

void round_to_fp8(std::vector<double>& row) {
  double largest = 0;
  bool finite = true;
  for (const double value : row) {
    finite = finite && std::isfinite(value);
    largest = std::max(largest, std::abs(value));
  }
  int k = -117;
  while (k < 119 && largest > std::ldexp(448, k)) ++k;
  for (double& value : row) {
    if (!finite) value = std::numeric_limits<double>::quiet_NaN();
    if (!finite || value == 0) continue;
    const double scaled = std::ldexp(value, -k), spacing = std::ldexp(1, std::max(std::ilogb(scaled), -6) - 3);
    const double rounded = std::nearbyint(scaled / spacing) * spacing;
    value = std::ldexp(std::copysign(std::min(std::abs(rounded), 448.0), value), k);
  }
}

double unit_roundoff(Storage storage) { return std::ldexp(1, -format_of(storage).digits); }

}  // namespace oracle
