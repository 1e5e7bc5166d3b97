#pragma once
// `nsa info`.

#include <ostream>

namespace nsa {

/// The build, its libraries and the devices it sees here. No MPI launch.
void print_info(std::ostream& out);

}  // namespace nsa
