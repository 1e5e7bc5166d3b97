#pragma once
// The last actions of a process that has to end without cleanup.

#include <functional>
#include <string>

namespace nsa {

void write_to_stderr(const std::string& text);

/// Writes PATH.rankN.ops.json. Does nothing if `path` is empty.
void save_operations(const std::string& path, int rank, const std::string& json);

/// Runs `work` in a detached thread, flushes stdout there, which _exit would not do, and waits 4 s at most for both: a
/// terminal or a file system may be what hangs. `work` must own what it uses.
void run_detached(std::function<void()> work);

/// If the parent of this process is Open MPI's mpirun or its daemon and still runs `seconds` later, kills it. They wait
/// for a lost host until TCP gives up, which takes 15 minutes once they have sent something: keepalive probes only idle
/// connections. Another process does this, since this one ends before.
void kill_stuck_launcher_after(int seconds);

}  // namespace nsa
