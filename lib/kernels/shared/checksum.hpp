#pragma once
// A checksum of cached rows that does not depend on the order of its terms, so that every backend adds it up as it
// likes. Any flip of one bit changes it.

#include <cstdint>

#include "kernels/shared/portable.hpp"

namespace nsa {

/// The term of an element with these bits at this place: a bijection of 64 bits (splitmix64) of both, so that two
/// values in one place never have the same term.
NSA_HD std::uint64_t checksum_term(std::uint32_t bits, std::uint64_t place) {
  std::uint64_t x = place * 0x9E3779B97F4A7C15ull + bits;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

}  // namespace nsa
