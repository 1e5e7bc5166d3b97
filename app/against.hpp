#pragma once
// `nsa run --against BINARY`: this program and another one by turns, on the same input.

#include <limits>
#include <string>

#include "app/run.hpp"

namespace nsa {

struct AgainstOptions {
  std::string binary;    ///< the other program, A; this one is B
  std::string launcher;  ///< what starts a run, as words: "mpirun -n 4"; empty: nothing
  int pairs = 12;
  double fail_above = std::numeric_limits<double>::infinity();  ///< as of `nsa diff`
};

/// Runs both programs `pairs` times, the first one of a pair by turns, into OUTPUT.a1.h5, OUTPUT.b1.h5, ..., and prints
/// the comparison. Throws UserError where a run does not end with 0: its exit code. `self`: path of this program.
/// Returns invalid_result where the results differ; 1 where B is SLOWER than allowed.
ExitCode run_against(const RunOptions& run, const AgainstOptions& options, const std::string& self);

}  // namespace nsa
