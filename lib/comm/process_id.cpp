#include "comm/process_id.hpp"

#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <sstream>

namespace nsa {

namespace {

std::string read_first_word(const std::string& path) {
  std::ifstream file(path);
  std::string word;
  file >> word;
  return word;
}

std::string read_link(const char* link) {
  char text[64] = "?";
  if (const ssize_t n = readlink(link, text, sizeof text - 1); n > 0) text[n] = '\0';
  return text;
}

}  // namespace

std::string host_name() {
  char name[256] = "?";
  (void)gethostname(name, sizeof name - 1);
  return name;
}

std::string machine_id() {
  const std::string id = read_first_word("/proc/sys/kernel/random/boot_id");
  return id.empty() ? host_name() : id;
}

std::string process_stat_path(int pid) { return fmt::format("/proc/{}/stat", pid); }

ProcessStat parse_process_stat(const std::string& text) {
  ProcessStat stat;
  const std::size_t name = text.find('('), name_end = text.rfind(')');
  if (name == std::string::npos || name_end == std::string::npos || name_end < name) return stat;
  stat.name = text.substr(name + 1, name_end - name - 1);
  std::istringstream fields(text.substr(name_end + 1));
  fields >> stat.state;
  for (int field = 4; field <= 22; ++field) fields >> stat.start_time;
  return stat;
}

ProcessStat process_stat(int pid) {
  std::ifstream file(process_stat_path(pid));
  std::string text;
  std::getline(file, text, '\0');
  return parse_process_stat(text);
}

std::optional<int> launched_rank() {
  // SLURM_PROCID comes last: mpirun within a batch job inherits that of the batch script.
  for (const char* name :
       {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", "PALS_RANKID", "SLURM_PROCID"})
    if (const char* text = std::getenv(name)) return std::max(0, std::atoi(text));
  return {};
}

ProcessId own_process_id() {
  const std::string machine = read_first_word("/proc/sys/kernel/random/boot_id") + read_link("/proc/self/ns/pid") +
                              read_link("/proc/self/ns/net");
  return {host_name(), machine, process_stat(getpid()).start_time, getpid()};
}

std::vector<ProcessId> all_process_ids(const ControlComm& world) {
  const ProcessId own = own_process_id();
  std::string text;
  for (const std::string& line :
       world.gather(fmt::format("{} {} {} {}\n", own.host, own.machine, own.start_time, own.pid)))
    text += line;
  std::istringstream lines(world.broadcast(text));
  std::vector<ProcessId> processes(static_cast<std::size_t>(world.size()));
  for (ProcessId& process : processes) lines >> process.host >> process.machine >> process.start_time >> process.pid;
  return processes;
}

bool signal_process(const ProcessId& process, int signal_number) {
  static const std::string own_machine = own_process_id().machine;
  return process.pid > 0 && process.machine == own_machine &&
         process_stat(process.pid).start_time == process.start_time && kill(process.pid, signal_number) == 0;
}

}  // namespace nsa
