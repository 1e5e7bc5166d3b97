#pragma once
// The last things that a process does which cannot end in order.

#include <functional>
#include <string>

namespace nsa {

void write_to_stderr(const std::string& text);

/// Writes `path`.rankN.ops.json; nothing where `path` is empty.
void save_operations(const std::string& path, int rank, const std::string& json);

/// Runs `work`, and then writes out what is left of the rank's output, which _exit would lose, in a thread of its own,
/// since a terminal or a file system may be what hangs, and waits for it for some seconds. What it uses has to be its
/// own.
void run_beside(std::function<void()> work);

}  // namespace nsa
