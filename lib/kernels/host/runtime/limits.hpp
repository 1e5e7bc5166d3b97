#pragma once
// What the machine, its control groups (containers, Slurm) and the limits of a process leave of memory and cores.

#include <cstdint>
#include <string>

namespace nsa::host {

/// Bytes; -1 where unknown, or without such a limit.
struct FreeMemory {
  std::int64_t shared =
      -1;  ///< of the machine or of a control group (Slurm's --mem, a container): for all its processes
  std::int64_t process = -1;  ///< below the limits of this process (ulimit -v, -d)
};
FreeMemory free_memory();

/// What the control groups leave that the text `groups` (/proc/self/cgroup) names: the least of a group and those above
/// it, without page cache that the kernel drops first. `mount`: the folder of all groups.
std::int64_t free_in_groups(const std::string& groups, const std::string& mount = "/sys/fs/cgroup");

/// Cores that the control groups of the text allow, by their quota of processor time, rounded up; 0: any number.
int cores_in_groups(const std::string& groups, const std::string& mount = "/sys/fs/cgroup");

/// The text of /proc/self/cgroup.
std::string own_groups();

/// Memory of the machine in bytes, a line of /proc/meminfo; -1 where it is missing.
std::int64_t meminfo(const std::string& name);

}  // namespace nsa::host
