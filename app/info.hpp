#pragma once
// `nsa info`.

#include <ostream>

namespace nsa {

/// Prints the build, its libraries and the devices of this machine. Needs no MPI launch.
void print_info(std::ostream& out);

}  // namespace nsa
