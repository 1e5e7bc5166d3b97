#pragma once
// `nsa diff A B`: the same result? which stage got slower, by how much, with the interval.

#include <ostream>
#include <string>

namespace nsa {

/// Prints the comparison; true when the results agree (parameters, reads, validity, and outputs where both
/// files kept their tensors), whatever the times.
/// Throws UserError for files that cannot be read or have no point in common.
bool diff_results(std::ostream& out, const std::string& path_a, const std::string& path_b);

}  // namespace nsa
