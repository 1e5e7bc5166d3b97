#include "app/threads.hpp"

#include <fmt/format.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <latch>
#include <map>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <vector>

#include "comm/process_id.hpp"
#include "kernels/host/runtime/host.hpp"
#include "kernels/host/runtime/limits.hpp"

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

/// Throws UserError unless so many threads can run at a time: OpenMP ends the process where it cannot start one.
void check_threads(int count) {
  std::latch all_started(1);
  std::vector<std::thread> others;
  std::string problem;
  try {
    for (int i = 1; i < count; ++i) others.emplace_back([&] { all_started.wait(); });
  } catch (const std::system_error& error) {
    problem = fmt::format(
        "cannot start {} threads ({}); set a smaller OMP_NUM_THREADS, or raise the limits of the process "
        "(ulimit -u, -v)",
        count, error.code().message());
  }
  all_started.count_down();
  for (std::thread& other : others) other.join();
  if (!problem.empty()) throw UserError(problem, ExitCode::device);
}

}  // namespace

Cores cores_of_rank(const ControlComm& world) {
  cpu_set_t set, launcher;
  CPU_ZERO(&set);
  CPU_ZERO(&launcher);
  if (sched_getaffinity(0, sizeof set, &set) != 0) return {};
  std::string own = machine_id();  // and a character for each core of the affinity mask
  own.resize(256);
  for (int core = 0; core < CPU_SETSIZE; ++core) own += CPU_ISSET(core, &set) ? '1' : '0';
  std::string all;
  for (const std::string& other : world.gather(own)) all += other;
  all = world.broadcast(all);
  int sharers = 0;
  for (std::size_t offset = 0; offset < all.size(); offset += own.size()) {
    sharers += all.compare(offset, own.size(), own) == 0;
    if (all.compare(offset, 256, own, 0, 256) != 0) continue;
    for (int core = 0; core < CPU_SETSIZE; ++core)
      if (all[offset + 256 + static_cast<std::size_t>(core)] == '1') CPU_SET(core, &launcher);
  }
  Cores cores{CPU_COUNT(&set), std::max(1, sharers), CPU_COUNT(&launcher), 0};
  if (const int quota = host::cores_in_groups(host::own_groups()); quota > 0)
    cores.cores = std::min(cores.cores, quota);
  // mpirun binds each rank by default and has the cores of the job itself.
  if (std::getenv("OMPI_COMM_WORLD_SIZE") && sched_getaffinity(getppid(), sizeof launcher, &launcher) == 0)
    cores.of_launcher = CPU_COUNT(&launcher);
  return cores;
}

void check_launch(const ControlComm& world) {
  if (world.size() > 1) return;
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"}) {
    const char* value = std::getenv(name);
    if (!value) continue;
    if (const int processes = std::atoi(value); processes > 1)
      throw AgreedError(
          fmt::format("the launcher has started {0} processes and MPI sees one ({1}={0}; each would do the whole run); "
                      "use the mpirun "
                      "of {2}, or srun --mpi=pmix, or unset {1} to run it {0} times",
                      processes, name, MpiSession::library_version()));
    return;  // the nearest launcher has started one
  }
}

int requested_threads() {
  const char* text = std::getenv("OMP_NUM_THREADS");
  if (!text) return 0;
  char* end = nullptr;
  const long threads = std::strtol(text, &end, 10);  // of a list, the outermost level
  while (*end == ' ') ++end;
  return end != text && (*end == 0 || *end == ',') && threads > 0 ? static_cast<int>(std::min(threads, 1L << 16)) : 0;
}

void set_default_host_threads(const Cores& own) {
  const int requested = requested_threads();
  set_host_threads(requested > 0 ? requested : std::max(1, own.cores / own.sharers));
  check_threads(host_device().info().units);
}

std::vector<std::string> launch_notes(const RunRecord& run, const Cores& own) {
  std::vector<std::string> notes;
  const char* text = std::getenv("OMP_NUM_THREADS");
  if (text && *text != 0 && requested_threads() == 0)
    notes.push_back(
        fmt::format("OMP_NUM_THREADS={} is no number of threads: each rank takes its share of the cores", text));
  if (run.backend == "host" && own.on_machine < own.of_launcher)
    notes.push_back(fmt::format("mpirun has bound the ranks of {} to {} of its {} cores; --bind-to none gives them all",
                                host_name(), own.on_machine, own.of_launcher));
  if (const std::string note = oversubscribed(run); !note.empty()) notes.push_back(note);
  return notes;
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
