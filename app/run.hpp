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
  std::string output, csv;             ///< empty: as in the input
  std::string json;                    ///< figures of the run, or the plan; empty: none
  std::string machine;                 ///< machine file to advise for, with a dry run; empty: no advice
  std::string max_time;                ///< stop after this duration; empty: no limit
  bool resume = false;                 ///< continue the result file if it exists
  bool strict = false;                 ///< a fallback is an error
  bool record_selection = false;       ///< output.selection
  std::optional<double> deadline;      ///< seconds; empty: as in the input
  std::optional<double> min_interval;  ///< of the median; empty: as in the input
  std::string argv;                    ///< the whole command line, for the result file
  std::string words;                   ///< the command line after the program, the same on all ranks
};

/// Runs every point on all ranks; rank 0 prints and writes. Collective. Throws AgreedError on every rank. On SIGUSR1,
/// SIGTERM or SIGINT, and at the end of max_time, all ranks stop at the same step, seal the finished points and return
/// ExitCode::interrupted.
ExitCode run(const ControlComm& world, Watchdog& watchdog, const RunOptions& options);

/// Prints the plan for `ranks` ranks (0: heads x kv of the input, with 1 for "auto"). Opens no device and no file but
/// the input. No MPI.
void dry_run(const RunOptions& options, int ranks);

}  // namespace nsa
