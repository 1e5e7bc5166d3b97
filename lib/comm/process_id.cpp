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

// Field 22 of /proc/PID/stat. Field 2, the name, is in parentheses and may contain spaces. "?": no such process.
std::string start_time_of(int pid) {
  std::ifstream file(fmt::format("/proc/{}/stat", pid));
  std::string line;
  std::getline(file, line);
  std::istringstream words(line.substr(std::min(line.size(), line.rfind(')') + 1)));
  std::string word;
  for (int i = 0; i < 20; ++i) words >> word;
  return word.empty() ? "?" : word;
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
  return {host_name(), machine, start_time_of(getpid()), getpid()};
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
  return process.pid > 0 && process.machine == own_machine && start_time_of(process.pid) == process.start_time &&
         kill(process.pid, signal_number) == 0;
}

}  // namespace nsa
