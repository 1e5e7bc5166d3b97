#pragma once
// The command line beyond what CLI11 does: help as a command, suggestions, completion.

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

namespace nsa {

/// The words after the program's name; "help" and "help COMMAND" as "--help" and "COMMAND --help".
std::vector<std::string> command_line_words(int argc, char** argv);

/// What is wrong, the nearest option or command, and where help is: "... was not expected: --rank (did you mean
/// --ranks?); see nsa run --help".
std::string usage_error(const CLI::App& app, const CLI::ParseError& error, int argc, char** argv);

/// A script for bash that completes commands, options and file names.
std::string bash_completion(const CLI::App& app);

}  // namespace nsa
