#include "nsa/verify/shared_blocks.hpp"

#include <algorithm>

namespace nsa {

void SharedBlocks::add(const std::int32_t* selected, std::int64_t queries, std::int64_t lists, std::int32_t n) {
  for (std::int64_t i = 0; i < (queries - 1) * lists; ++i) {
    const std::int32_t *before = selected + i * n, *after = before + lists * n;
    const std::int32_t* const before_end = std::find(before, before + n, -1);
    const std::int32_t* const after_end = std::find(after, after + n, -1);
    std::int64_t common = 0;
    for (const std::int32_t *a = before, *b = after; a != before_end && b != after_end;) {
      common += *a == *b;
      const std::int32_t first = *a, second = *b;
      a += first <= second, b += second <= first;
    }
    if (after == after_end) continue;
    shares += static_cast<double>(common) / static_cast<double>(after_end - after);
    ++pairs;
  }
}

}  // namespace nsa
