// Runs a fuzz target over the files of a folder: the corpus as a test, with any compiler. replay FOLDER...
// No file of the corpus is larger than 1 MB, and none may cost memory out of proportion, here or in a child.

#include <sys/resource.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <vector>

#include "fuzz/target.hpp"

namespace {

constexpr long most_megabytes = 1024;  // sanitizers keep some hundreds

long peak_megabytes() {
  rusage own{}, children{};
  getrusage(RUSAGE_SELF, &own);
  getrusage(RUSAGE_CHILDREN, &children);
  return std::max(own.ru_maxrss, children.ru_maxrss) / 1024;
}

}  // namespace

int main(int argc, char** argv) {
  int files = 0;
  for (int i = 1; i < argc; ++i) {
    for (const auto& entry : std::filesystem::directory_iterator(argv[i])) {
      std::cout << entry.path().string() << std::endl;  // the last line names the file that crashed
      std::ifstream file(entry.path(), std::ios::binary);
      const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
      LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size());
      ++files;
      if (peak_megabytes() > most_megabytes) {
        std::cout << "it took " << peak_megabytes() << " MB\n";
        return 1;
      }
    }
  }
  std::cout << files << " files\n";
  return files > 0 ? 0 : 1;
}
