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

/// Variables of this process that change how fast it runs, sorted, one space between two.
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
  std::string place = host_name();
  place.resize(256);
  for (int core = 0; core < CPU_SETSIZE; ++core) place += CPU_ISSET(core, &set) ? '1' : '0';
  std::string all;
  for (const std::string& other : world.gather(place)) all += other;
  all = world.broadcast(all);
  int sharers = 0;
  for (std::size_t at = 0; at < all.size(); at += place.size()) sharers += all.compare(at, place.size(), place) == 0;
  return {CPU_COUNT(&set), std::max(1, sharers)};
}

void choose_host_threads(const Cores& mine) {
  if (std::getenv("OMP_NUM_THREADS") == nullptr) set_host_threads(std::max(1, mine.cores / mine.sharers));
}

void describe_threads(const ControlComm& world, const Cores& mine, RunRecord& run) {
  const std::vector<std::string> environments = world.gather(tuning_environment());
  const std::vector<double> numbers =
      world.gather(std::vector<double>{double(host_device().info().units), double(mine.cores), double(mine.sharers)});
  for (std::size_t r = 0; r < run.system.size(); ++r) {
    run.system[r].environment = environments[r];
    run.system[r].threads = static_cast<std::int64_t>(numbers[3 * r]);
    run.system[r].cores = static_cast<std::int64_t>(numbers[3 * r + 1]);
    run.system[r].sharers = static_cast<std::int64_t>(numbers[3 * r + 2]);
  }
}

std::string oversubscribed(const RunRecord& run) {
  if (run.backend != "host") {
    std::map<std::string, int> ranks;  // by GPU
    for (const RankSystem& rank : run.system)
      if (++ranks[rank.uuid] > 1)
        return fmt::format("ranks share a GPU of {}: they take turns on it, and the times are those of the turns",
                           rank.host);
    return "";
  }
  for (const RankSystem& rank : run.system) {
    if (rank.threads * rank.sharers > rank.cores)
      return fmt::format(
          "{} with {} each share {} of {}: times hold waiting for a core, or leave out a turn of the others",
          rank.sharers == 1 ? "1 rank" : fmt::format("{} ranks", rank.sharers),
          rank.threads == 1 ? "1 thread" : fmt::format("{} threads", rank.threads),
          rank.cores == 1 ? "1 core" : fmt::format("{} cores", rank.cores), rank.host);
  }
  return "";
}

}  // namespace nsa
