// The result reader, as `nsa diff`, `nsa gate` and `--resume` use it.

#include "fuzz/target.hpp"
#include "nsa/results/result_file.hpp"

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const nsa::fuzz::File file(data, size, ".h5");
  return nsa::fuzz::attempt([&] { nsa::read_result(file.path()); });
}
