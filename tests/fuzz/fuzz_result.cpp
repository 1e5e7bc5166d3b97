// The result reader, as `nsa diff`, `nsa gate` and `--resume` use it.

#include <sys/mman.h>

#include <algorithm>
#include <vector>

#include "fuzz/target.hpp"
#include "nsa/result_file.hpp"

extern "C" char __start___sancov_cntrs[] __attribute__((weak)), __stop___sancov_cntrs[] __attribute__((weak));

/// The reader reads in a child. Coverage counters on pages that the child shares tell libFuzzer what it ran through.
extern "C" int LLVMFuzzerInitialize(int*, char***) {
  const std::uintptr_t page = 4096;
  char* begin =
      reinterpret_cast<char*>((reinterpret_cast<std::uintptr_t>(__start___sancov_cntrs) + page - 1) / page * page);
  char* end = reinterpret_cast<char*>(reinterpret_cast<std::uintptr_t>(__stop___sancov_cntrs) / page * page);
  if (begin >= end) return 0;
  const std::vector<char> counters(begin, end);
  if (mmap(begin, counters.size(), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
    std::abort();
  std::copy(counters.begin(), counters.end(), begin);
  return 0;
}

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const nsa::fuzz::File file(data, size, ".h5");
  return nsa::fuzz::attempt([&] { nsa::read_result(file.path()); });
}
