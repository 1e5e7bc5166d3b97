// The main function of tests that need MPI, on one rank or several. Every rank runs every test, and the exit code is
// the largest of all ranks. Rank 0 prints; another rank prints only if it failed.

#include <cstdlib>
#include <iostream>
#include <sstream>
#include <utility>
#include <vector>

#include "comm/session.hpp"
#include "kernels/interface/backend.hpp"
#include "mpi/at_end.hpp"
#if __has_include(<catch2/catch_session.hpp>)
#include <catch2/catch_session.hpp>
#else
#define CATCH_CONFIG_RUNNER
#define CATCH_CONFIG_NO_POSIX_SIGNALS  // a rank that crashes must end, or the others wait for it
#include <catch2/catch.hpp>
#endif

namespace {

std::vector<std::function<void()>> closings;

bool every_rank_has_a_gpu(const nsa::ControlComm& world) {
  bool here = true;
  try {
    nsa::open_backend(nsa::BackendKind::cuda, world.local_rank());
  } catch (const nsa::UserError&) {
    here = false;
  }
  return world.max(std::int64_t{!here}) == 0;
}

}  // namespace

void at_end(std::function<void()> close) { closings.push_back(std::move(close)); }

int main(int argc, char* argv[]) {
  nsa::MpiSession mpi(argc, argv);
  const nsa::ControlComm world = nsa::ControlComm::world();
  if (std::getenv("NSA_TEST_BACKEND") && !every_rank_has_a_gpu(world)) {
    if (world.rank() == 0) std::cout << "skipped: " << world.size() << " ranks need as many GPUs\n";
    return 77;
  }
  std::ostringstream captured;
  std::streambuf* const terminal = std::cout.rdbuf();
  if (world.rank() != 0) std::cout.rdbuf(captured.rdbuf());
  const int failed = Catch::Session().run(argc, argv);
  for (const auto& close : closings) close();
  std::cout.rdbuf(terminal);
  if (world.rank() != 0 && failed != 0) std::cout << "rank " << world.rank() << ":\n" << captured.str() << std::flush;
  return static_cast<int>(world.max(std::int64_t{failed})) == 0 ? 0 : 1;
}
