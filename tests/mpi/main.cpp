// The main of tests that need MPI, on one rank or several: every rank runs every test, rank 0 prints, the exit
// code is the worst of all ranks. What another rank has to say it prints when it failed.

#include <iostream>
#include <sstream>

#include "comm/session.hpp"
#if __has_include(<catch2/catch_session.hpp>)
#include <catch2/catch_session.hpp>
#else
#define CATCH_CONFIG_RUNNER
#include <catch2/catch.hpp>
#endif

int main(int argc, char* argv[]) {
  nsa::MpiSession mpi(argc, argv);
  const nsa::Control world = nsa::Control::world();
  std::ostringstream quiet;
  std::streambuf* const terminal = std::cout.rdbuf();
  if (world.rank() != 0) std::cout.rdbuf(quiet.rdbuf());
  const int failed = Catch::Session().run(argc, argv);
  std::cout.rdbuf(terminal);
  if (world.rank() != 0 && failed != 0) std::cout << "rank " << world.rank() << ":\n" << quiet.str() << std::flush;
  return static_cast<int>(world.max(std::int64_t{failed})) == 0 ? 0 : 1;
}
