#include "kernels/host/runtime/limits.hpp"

#include <algorithm>
#include <fstream>
#include <sstream>

#include "kernels/diagnostics/out_of_memory.hpp"

namespace nsa::host {
namespace {

std::string text_of(const std::string& path) {
  std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

/// The number after `name` in a text of lines "name number"; -1 where there is none.
std::int64_t number_of(const std::string& text, const std::string& name) {
  std::istringstream lines(text);
  std::string word;
  for (std::int64_t number = 0; lines >> word;)
    if (word == name && lines >> number) return number;
  return -1;
}

/// The least of both, where -1 is none.
std::int64_t least(std::int64_t a, std::int64_t b) { return a < 0 ? b : b < 0 ? a : std::min(a, b); }

/// The files of one version of control groups.
struct GroupFiles {
  const char *limit, *usage, *cache;
};
constexpr GroupFiles version_1{"memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"},
    version_2{"memory.max", "memory.current", "inactive_file"};

std::int64_t free_in_group(const std::string& folder, const GroupFiles& files) {
  constexpr std::int64_t unlimited = std::int64_t{1} << 60;
  std::int64_t limit = 0, usage = 0;
  if (!(std::istringstream(text_of(folder + "/" + files.limit)) >> limit) || limit >= unlimited) return -1;  // "max"
  if (!(std::istringstream(text_of(folder + "/" + files.usage)) >> usage)) return -1;
  const std::int64_t cache = std::max<std::int64_t>(0, number_of(text_of(folder + "/memory.stat"), files.cache));
  return std::max<std::int64_t>(0, limit - usage + std::min(cache, usage));
}

/// A line of /proc/self/status in bytes; 0 where it is missing.
std::int64_t status_bytes(const std::string& name) {
  const std::int64_t kib = number_of(text_of("/proc/self/status"), name + ":");
  return kib < 0 ? 0 : kib * 1024;
}

/// Calls action(folder, is_version_2) for the groups of a controller in the text, and for those above them.
template <class Action>
void for_each_group(const std::string& groups, const std::string& mount, const std::string& controller,
                    Action&& action) {
  std::istringstream lines(groups);
  for (std::string line; std::getline(lines, line);) {  // "4:cpu,cpuacct:/slurm/job_7", "0::/user.slice"
    const std::size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool is_version_2 = controllers.empty();
    if (!is_version_2 && ("," + controllers + ",").find("," + controller + ",") == std::string::npos) continue;
    const std::string root = is_version_2 ? mount : mount + "/" + controller;
    for (std::string path = line.substr(second + 1);; path = path.substr(0, path.rfind('/'))) {
      if (path == "/") path.clear();
      action(root + path, is_version_2);
      if (path.find('/') == std::string::npos) break;
    }
  }
}

}  // namespace

std::int64_t free_in_groups(const std::string& groups, const std::string& mount) {
  std::int64_t free = -1;
  for_each_group(groups, mount, "memory", [&](const std::string& folder, bool is_version_2) {
    free = least(free, free_in_group(folder, is_version_2 ? version_2 : version_1));
  });
  return free;
}

int cores_in_groups(const std::string& groups, const std::string& mount) {
  std::int64_t cores = -1;
  for_each_group(groups, mount, "cpu", [&](const std::string& folder, bool is_version_2) {
    const std::string text = is_version_2
                                 ? text_of(folder + "/cpu.max")
                                 : text_of(folder + "/cpu.cfs_quota_us") + text_of(folder + "/cpu.cfs_period_us");
    std::int64_t quota = 0, period = 0;  // microseconds; "max" and -1 are no quota
    if (std::istringstream(text) >> quota >> period && quota > 0 && period > 0)
      cores = least(cores, (quota + period - 1) / period);
  });
  return static_cast<int>(std::max<std::int64_t>(0, cores));
}

std::string own_groups() { return text_of("/proc/self/cgroup"); }

std::int64_t meminfo(const std::string& name) {
  const std::int64_t kib = number_of(text_of("/proc/meminfo"), name + ":");
  return kib < 0 ? -1 : kib * 1024;
}

FreeMemory free_memory() {
  const std::int64_t limit = process_memory_limit();
  return {least(meminfo("MemAvailable"), free_in_groups(own_groups())),
          limit < 0 ? -1 : std::max<std::int64_t>(0, limit - status_bytes("VmSize"))};
}

}  // namespace nsa::host
