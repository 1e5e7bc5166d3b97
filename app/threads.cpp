#include "app/threads.hpp"

#include <fmt/format.h>
#include <sched.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "comm/process_id.hpp"
#include "kernels/host/runtime/host.hpp"

namespace nsa {
namespace {

/// Environment variables that affect the speed of this process, sorted and separated by one space.
std::string tuning_environment() {
  std::vector<std::string_view> found;
  for (char** variable = environ; *variable != nullptr; ++variable) {
    const std::string_view text = *variable;
    for (const char* prefix : {"CUDA_DEVICE_", "CUDA_LAUNCH_", "CUDA_MODULE_", "CUDA_VISIBLE_", "GOMP_", "NCCL_",
                               "NSA_", "OMP_", "OPENBLAS_"})
      if (text.starts_with(prefix)) found.push_back(text);
  }
  std::ranges::sort(found);
  return fmt::format("{}", fmt::join(found, " "));
}

}  // namespace

Cores cores_of_rank(const ControlComm& world) {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) != 0) return {};
  std::string own = host_name();  // and a character for each core of the affinity mask
  own.resize(256);
  for (int core = 0; core < CPU_SETSIZE; ++core) own += CPU_ISSET(core, &set) ? '1' : '0';
  std::string all;
  for (const std::string& other : world.gather(own)) all += other;
  all = world.broadcast(all);
  int sharers = 0;
  for (std::size_t offset = 0; offset < all.size(); offset += own.size())
    sharers += all.compare(offset, own.size(), own) == 0;
  return {CPU_COUNT(&set), std::max(1, sharers)};
}

void set_default_host_threads(const Cores& own) {
  if (std::getenv("OMP_NUM_THREADS") == nullptr) set_host_threads(std::max(1, own.cores / own.sharers));
}

void describe_threads(const ControlComm& world, const Cores& own, RunRecord& run) {
  const std::vector<std::string> environments = world.gather(tuning_environment());
  const std::vector<double> numbers =
      world.gather(std::vector<double>{double(host_device().info().units), double(own.cores), double(own.sharers)});
  for (std::size_t r = 0; r < run.system.size(); ++r) {
    run.system[r].environment = environments[r];
    run.system[r].threads = static_cast<std::int64_t>(numbers[3 * r]);
    run.system[r].cores = static_cast<std::int64_t>(numbers[3 * r + 1]);
    run.system[r].sharers = static_cast<std::int64_t>(numbers[3 * r + 2]);
  }
}

std::string oversubscribed(const RunRecord& run) {
  if (run.backend != "host") {
    std::map<std::string, int> ranks;  // by the uuid of the GPU
    for (const RankSystem& rank : run.system)
      if (++ranks[rank.uuid] > 1)
        return fmt::format(
            "ranks share a GPU of {} (it runs one rank at a time, and times include the other ranks); use a GPU a rank",
            rank.host);
    return "";
  }
  for (const RankSystem& rank : run.system) {
    if (rank.threads * rank.sharers > rank.cores)
      return fmt::format(
          "{} with {} each share {} of {} (times include waiting for a core, or miss the time slices of other ranks); "
          "use fewer ranks or threads",
          rank.sharers == 1 ? "1 rank" : fmt::format("{} ranks", rank.sharers),
          rank.threads == 1 ? "1 thread" : fmt::format("{} threads", rank.threads),
          rank.cores == 1 ? "1 core" : fmt::format("{} cores", rank.cores), rank.host);
  }
  return "";
}

}  // namespace nsa
