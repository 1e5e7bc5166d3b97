#pragma once
// `nsa info --keys`: docs/INPUT.md, the reference of the input's keys and of the environment variables.

#include <ostream>

namespace nsa {

/// Prints the page as Markdown: every key by section with type, default, allowed values, unit and meaning, and every
/// environment variable.
void print_input_reference(std::ostream& out);

}  // namespace nsa
