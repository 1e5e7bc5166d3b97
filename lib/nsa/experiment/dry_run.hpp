#pragma once
// `nsa run --dry-run`: who owns what, bytes a rank by kind, exchanges and their sizes. No MPI launch, no GPU.

#include <cstddef>
#include <ostream>

#include "nsa/config/config.hpp"

namespace nsa {

/// Throws UserError when the input's heads and kv do not multiply to `ranks`.
void print_plan(std::ostream& out, const Config& config, int ranks);

/// Bytes that the result file of a run will hold at most, for the check that there is room. A run that repeats its
/// steps for run.min_time may hold more.
std::size_t planned_result_bytes(const Config& config, int ranks);

}  // namespace nsa
