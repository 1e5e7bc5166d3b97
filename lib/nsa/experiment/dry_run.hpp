#pragma once
// `nsa run --dry-run`: heads and blocks of each rank, bytes per rank by kind, exchanges and their sizes. Needs no MPI
// launch and no GPU.

#include <cstddef>
#include <ostream>
#include <string>

#include "nsa/config/config.hpp"
#include "nsa/config/machine.hpp"

namespace nsa {

/// Throws UserError when the input's heads and kv do not multiply to `ranks`. `machine`: also ranks the layouts of
/// these ranks on it, unless null. `json`: receives the plan as JSON, unless null; not for task.kind = "kernels".
void print_plan(std::ostream& out, const Config& config, int ranks, const Machine* machine = nullptr,
                std::string* json = nullptr);

/// Upper bound of the result file's bytes, for the check of free disk space.
std::size_t planned_result_bytes(const Config& config, int ranks);

}  // namespace nsa
