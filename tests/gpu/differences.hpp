#pragma once
// Compares two GPU buffers on the GPU: hundreds of MB, thousands of times.

#include <cstddef>
#include <cstdint>

#include "kernels/interface/kernel_table.hpp"

namespace nsa::test {

struct Differences {
  std::uint64_t count;  ///< 32-bit words that differ
  std::uint64_t first;  ///< the first such word
};

/// Compares `bytes` (a multiple of 4) after the work that `stream` has queued; waits for it.
Differences differences(const void* a, const void* b, std::size_t bytes, Stream* stream);

}  // namespace nsa::test
