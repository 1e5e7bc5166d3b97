#pragma once
// Limits that the user or the system sets to the memory of this process, and the message for a failed allocation.

#include <sys/resource.h>

#include <cstdint>
#include <string>

namespace nsa {

/// Bytes that this process may map at most (ulimit -v or -d); -1: no limit.
inline std::int64_t process_memory_limit() {
  std::int64_t least = -1;
  for (const auto resource : {RLIMIT_AS, RLIMIT_DATA}) {
    rlimit limit{};
    if (getrlimit(resource, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) continue;
    const auto bytes = static_cast<std::int64_t>(limit.rlim_cur);
    if (least < 0 || bytes < least) least = bytes;
  }
  return least;
}

/// What helps where an allocation on the host fails.
inline std::string memory_advice() {
  const std::int64_t limit = process_memory_limit();
  if (limit < 0) return "use more hosts, fewer ranks a host, a shorter context or a smaller batch";
  return "raise the limit of a process, " + std::to_string(limit / 1000000) + " MB (ulimit -v, ulimit -d)";
}

/// The message for std::bad_alloc.
inline std::string out_of_memory() { return "out of host memory (an allocation failed); " + memory_advice(); }

}  // namespace nsa
