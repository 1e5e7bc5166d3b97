// The result reader reads in a child: coverage counters on pages that the child shares tell libFuzzer what it ran
// through. Not instrumented itself, since instrumentation has names of its own for the ends of the counters.

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <vector>

extern "C" char __start___sancov_cntrs[], __stop___sancov_cntrs[];

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  constexpr std::uintptr_t page = 4096;
  const auto first = (reinterpret_cast<std::uintptr_t>(__start___sancov_cntrs) + page - 1) / page * page,
             last = reinterpret_cast<std::uintptr_t>(__stop___sancov_cntrs) / page * page;
  if (first >= last) return 0;
  char* const begin = reinterpret_cast<char*>(first);
  const std::vector<char> counters(begin, reinterpret_cast<char*>(last));
  if (mmap(begin, counters.size(), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
    std::abort();
  std::copy(counters.begin(), counters.end(), begin);
  return 0;
}
