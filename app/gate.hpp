#pragma once
// `nsa gate`.

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/diagnostics/error.hpp"

namespace nsa {

struct GateOptions {
  std::vector<std::string> files;      ///< result files and CSVs
  std::vector<std::int64_t> contexts;  ///< contexts to include; empty: all
  std::string adr;                     ///< file for the decision record; empty: none
  bool json = false, exit_verdict = false;
};

/// Prints a page for each device and an audit for each CSV. Returns ok; with exit_verdict the largest of the results:
/// ok PROCEED, 10 STAY, 11 INCONCLUSIVE, 12 NOT EVIDENCE (a CSV).
ExitCode gate(const GateOptions& options);

}  // namespace nsa
