#pragma once
// What the operating system counts of this process: the traces that a disturbance of its timed work leaves.

#include <cstdint>

namespace nsa {

struct ProcessCounters {
  std::int64_t voluntary_switches = 0;              ///< context switches of all threads because they waited
  std::int64_t involuntary_switches = 0;            ///< because another task got the core
  std::int64_t minor_faults = 0, major_faults = 0;  ///< page faults without and with a read from the disk
  double steal = 0;  ///< seconds that each of the process's cores, in the mean, gave to other virtual machines, and
                     ///< that the control group spent over its quota

  ProcessCounters& operator+=(const ProcessCounters& other);
  ProcessCounters operator-(const ProcessCounters& earlier) const;
};

/// Since the process (steal: the machine) started. Switches and faults: getrusage(2). Steal: /proc/stat over the cores
/// of the affinity mask, in ticks of 10 ms, and cpu.stat of the control group; 0 where the system does not say.
ProcessCounters process_counters();

}  // namespace nsa
