#pragma once
// `nsa report`.

#include <ostream>
#include <string>
#include <vector>

#include "kernels/diagnostics/error.hpp"

namespace nsa {

/// Prints of each file the device it ran on, then what `nsa run` printed. Returns invalid_result where any point is
/// INVALID. Throws UserError for files that cannot be read. Needs no MPI launch.
ExitCode report_results(std::ostream& out, const std::vector<std::string>& paths);

}  // namespace nsa
