// Writes the sample result file that the Python tests open: write_sample FILE.h5.

#include <cstdio>

#include "nsa/results/result_file.hpp"
#include "unit/sample_record.hpp"

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  try {
    nsa::ResultWriter writer(argv[1], nsa::sample_run(), 0);
    writer.seal(nsa::sample_point(0));
    writer.seal(nsa::sample_point(1));
    writer.finish(nsa::sample_run());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
