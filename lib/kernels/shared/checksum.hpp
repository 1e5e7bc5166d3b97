#pragma once
// A checksum of cached rows: a sum of one term an element. It does not depend on the order of its terms, so that every
// backend sums in its own order. Any flip of one bit changes it.

#include <cstdint>

#include "kernels/shared/portable.hpp"

namespace nsa {

/// Term of the element with these bits at this index: a 64-bit bijection (splitmix64) of index * constant + bits. Two
/// values at one index never have the same term.
NSA_HD std::uint64_t checksum_term(std::uint32_t bits, std::uint64_t index) {
  std::uint64_t x = index * 0x9E3779B97F4A7C15ull + bits;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

}  // namespace nsa
