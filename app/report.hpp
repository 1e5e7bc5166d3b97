#pragma once
// `nsa report`.

#include <ostream>
#include <string>
#include <vector>

#include "kernels/diagnostics/error.hpp"

namespace nsa {

/// What `nsa run` printed of these result files, each below what it ran on. invalid_result where a point of any is
/// INVALID. Throws UserError for files that cannot be read. No MPI launch.
ExitCode report_results(std::ostream& out, const std::vector<std::string>& paths);

}  // namespace nsa
