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
  std::string output, csv;             ///< empty: what the input says
  std::string json;                    ///< empty: none
  std::string max_time;                ///< stops after it; empty: no limit
  bool resume = false;                 ///< goes on with the result file where there is one
  bool strict = false;                 ///< a fallback is an error
  std::optional<double> deadline;      ///< seconds; empty: what the input says
  std::string argv;                    ///< the whole command line, for the result file
};

/// Runs every point on all ranks; rank 0 prints and writes. Collective. Throws UserError on every rank alike. On
/// SIGUSR1, SIGTERM, SIGINT and at the end of max_time it stops at the next place that all ranks pass, seals what is
/// whole and returns ExitCode::interrupted.
ExitCode run(const ControlComm& world, Watchdog& watchdog, const RunOptions& options);

/// Prints the plan for `ranks` ranks (0: what the input's heads and kv say, 1 where they are "auto") and touches
/// nothing. No MPI.
void dry_run(const RunOptions& options, int ranks);

}  // namespace nsa
