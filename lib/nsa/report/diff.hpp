#pragma once
// `nsa diff A B`: whether two files hold the same result, and which stages got slower, with intervals.

#include <ostream>
#include <string>

namespace nsa {

/// Prints the comparison. Returns true when the results agree: parameters, reads, validity, and outputs where both
/// files hold tensors. Times do not count. Throws UserError for files that cannot be read or have no point in common.
bool diff_results(std::ostream& out, const std::string& path_a, const std::string& path_b);

}  // namespace nsa
