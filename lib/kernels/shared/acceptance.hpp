#pragma once
// How far a decode step of several query tokens moves a sequence on. Its first query token is the sequence's next
// token, the others are draft tokens. The step accepts draft tokens up to the first that it rejects, and the next step
// begins one position after the last that it keeps: the position of the first rejected draft token, if there is one. K,
// V and compressed tokens of rejected positions stay in the caches, where nothing reads them before the steps that
// reach these positions write them anew.

#include <cstdint>

#include "kernels/shared/random.hpp"

namespace nsa {

constexpr std::int32_t max_query_tokens = 8;  ///< of a sequence in a decode step

struct Acceptance {
  std::int32_t tokens = 1;                       ///< query tokens of a step
  std::uint64_t share = std::uint64_t{1} << 32;  ///< of 2^32: how often a draft token is accepted
  std::uint64_t key = 0;                         ///< of the random numbers
};

/// Whether every step moves every sequence on by its number of query tokens.
NSA_HD bool accepts_all(const Acceptance& a) { return a.tokens == 1 || a.share >> 32 != 0; }

/// Query tokens of a sequence that a step keeps, from 1 to a.tokens: the first, and the draft tokens it accepts. Draft
/// token j has the j-th of the random numbers that Philox gives for this step and sequence.
NSA_HD std::int32_t kept_tokens(const Acceptance& a, std::int64_t step, std::int64_t sequence) {
  if (accepts_all(a)) return a.tokens;
  for (std::int32_t j = 0; j + 1 < a.tokens; ++j) {
    const Philox4 r = philox(a.key, {{static_cast<std::uint32_t>(j / 4), static_cast<std::uint32_t>(step),
                                      static_cast<std::uint32_t>(step >> 32), static_cast<std::uint32_t>(sequence)}});
    if (r.v[j % 4] >= a.share) return j + 1;
  }
  return a.tokens;
}

}  // namespace nsa
