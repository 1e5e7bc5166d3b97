#include "kernels/diagnostics/process_counters.hpp"

#include <sched.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <sstream>
#include <string>

namespace nsa {
namespace {

/// Mean over the cores of this process's affinity mask, in seconds.
double steal_of_cores() {
  cpu_set_t mine;
  CPU_ZERO(&mine);
  if (sched_getaffinity(0, sizeof mine, &mine) != 0) return 0;
  std::ifstream file("/proc/stat");
  double ticks = 0;
  for (std::string line; std::getline(file, line) && line.starts_with("cpu");) {
    std::istringstream fields(line.substr(3));
    int core = -1;
    if (line[3] == ' ' || !(fields >> core) || core < 0 || core >= CPU_SETSIZE || !CPU_ISSET(core, &mine)) continue;
    double user, nice, system, idle, io, irq, softirq, steal;
    if (fields >> user >> nice >> system >> idle >> io >> irq >> softirq >> steal) ticks += steal;
  }
  return ticks / static_cast<double>(sysconf(_SC_CLK_TCK)) / std::max(1, CPU_COUNT(&mine));
}

/// Seconds that the control group waited because its CPU quota was used up.
double throttled_by_quota() {
  struct Place {
    const char *path, *key;
    double seconds;
  };
  for (const Place& place : {Place{"/sys/fs/cgroup/cpu.stat", "throttled_usec", 1e-6},
                             Place{"/sys/fs/cgroup/cpu/cpu.stat", "throttled_time", 1e-9}}) {
    std::ifstream file(place.path);
    std::string key;
    for (double value; file >> key >> value;)
      if (key == place.key) return value * place.seconds;
  }
  return 0;
}

}  // namespace

ProcessCounters& ProcessCounters::operator+=(const ProcessCounters& other) {
  voluntary_switches += other.voluntary_switches;
  involuntary_switches += other.involuntary_switches;
  minor_faults += other.minor_faults;
  major_faults += other.major_faults;
  steal += other.steal;
  return *this;
}

ProcessCounters ProcessCounters::operator-(const ProcessCounters& earlier) const {
  return {voluntary_switches - earlier.voluntary_switches, involuntary_switches - earlier.involuntary_switches,
          minor_faults - earlier.minor_faults, major_faults - earlier.major_faults, steal - earlier.steal};
}

ProcessCounters process_counters() {
  ProcessCounters counters;
  rusage usage{};
  if (getrusage(RUSAGE_SELF, &usage) == 0)
    counters = {usage.ru_nvcsw, usage.ru_nivcsw, usage.ru_minflt, usage.ru_majflt, 0};
  counters.steal = steal_of_cores() + throttled_by_quota();
  return counters;
}

}  // namespace nsa
