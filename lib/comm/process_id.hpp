#pragma once
// Identifies the process of each rank, so that another process can signal it or connect to it.

#include <optional>
#include <string>
#include <vector>

#include "comm/session.hpp"

namespace nsa {

struct ProcessId {
  std::string host;
  std::string machine;     ///< boot id and namespaces: equal for processes that share pids and the loopback device
  std::string start_time;  ///< in clock ticks since boot: distinguishes it from a later process with the same pid
  int pid = 0;
};

std::string host_name();  ///< of this machine; "?" when the system call fails

/// The same for all processes of one machine, also in containers: its boot id; the host name where there is none.
std::string machine_id();

/// Of a process of this machine, from /proc/PID/stat (proc(5)).
struct ProcessStat {
  std::string name;              ///< of its program, at most 15 bytes; may contain spaces and parentheses
  char state = '?';              ///< 'R', 'S', 'Z', ...; '?': no such process
  std::string start_time = "?";  ///< in clock ticks since boot
};
std::string process_stat_path(int pid);
ProcessStat parse_process_stat(const std::string& text);
ProcessStat process_stat(int pid);

/// The rank that the launcher gave this process, from its environment: known before MPI is. Empty without a launcher.
std::optional<int> launched_rank();

ProcessId own_process_id();

/// The identities of all ranks, by rank. Collective.
std::vector<ProcessId> all_process_ids(const ControlComm& world);

/// Sends the signal (0: only checks for existence) if the process runs on this machine and its pid was not reused.
/// Returns whether the signal was sent.
bool signal_process(const ProcessId& process, int signal_number);

}  // namespace nsa
