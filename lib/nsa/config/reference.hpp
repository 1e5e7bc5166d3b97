#pragma once
// The environment variables; `nsa info --keys`: docs/INPUT.md, the reference of the input's keys and of the variables.

#include <ostream>

namespace nsa {

/// Throws UserError where this process has a variable that looks like one of nsa's and is none, such as NSA_ROUTE_SELL,
/// or one with a value that nsa does not know.
void check_environment();

/// Prints the page as Markdown: every key by section with type, default, allowed values, unit and meaning, and every
/// environment variable.
void print_input_reference(std::ostream& out);

}  // namespace nsa
