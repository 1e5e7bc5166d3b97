#pragma once
// `nsa run`.

#include <optional>
#include <string>
#include <vector>

#include "comm/session.hpp"
#include "comm/watchdog/watchdog.hpp"

namespace nsa {

struct RunOptions {
  std::string input;                   ///< path of the TOML
  std::vector<std::string> overrides;  ///< "section.key=value"
  std::string output, csv;             ///< empty: the value of the input
  std::string json;                    ///< empty: none
  std::string max_time;                ///< stops after it; empty: no limit
  bool resume = false;                 ///< resumes from the result file where it exists
  bool strict = false;                 ///< a fallback is an error
  std::optional<double> deadline;      ///< seconds; empty: the value of the input
  std::string argv;                    ///< the whole command line, for the result file
};

/// Runs every point on all ranks; rank 0 prints and writes. Collective. Throws the same UserError on every rank. After
/// SIGUSR1, SIGTERM, SIGINT or max_time it stops at the next step boundary that all ranks reach, seals the points that
/// are complete and returns ExitCode::interrupted.
ExitCode run(const ControlComm& world, Watchdog& watchdog, const RunOptions& options);

/// Prints the plan for `ranks` ranks (0: heads * kv of the input, each 1 where it is "auto") and writes no file. Needs
/// no MPI.
void dry_run(const RunOptions& options, int ranks);

}  // namespace nsa
