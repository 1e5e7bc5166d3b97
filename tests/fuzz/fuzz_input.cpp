// The readers of [input] file and [input] selection: tensors and lists of blocks that another program wrote.

#include <algorithm>
#include <vector>

#include "fuzz/target.hpp"
#include "nsa/results/result_file.hpp"
#include "nsa/results/selection_file.hpp"

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const nsa::fuzz::File file(data, size, ".h5");
  for (const char* name : {"x", "weights/w_q", "weights/layer0/w_q", "given/q"}) {
    nsa::fuzz::attempt([&] {
      const nsa::TensorFile tensors(file.path());
      if (!tensors.has(name)) return;
      // What a run asks for is as large as its own parameters say, never as the file does: a row at most here.
      const std::vector<std::int64_t> shape = tensors.shape(name);
      std::vector<std::int64_t> count(shape.size(), 1);
      if (!shape.empty()) count.back() = std::min<std::int64_t>(shape.back(), 4096);
      tensors.read(name, shape, std::vector<std::int64_t>(shape.size(), 0), count);
    });
  }
  return nsa::fuzz::attempt([&] {
    const nsa::SelectionFile selections(file.path());
    for (std::size_t i = 0; i < selections.shapes().size(); ++i)
      if (selections.shapes()[i].n < 4096) selections.read_rows(i, selections.shapes()[i].positions - 1, 1);
  });
}
