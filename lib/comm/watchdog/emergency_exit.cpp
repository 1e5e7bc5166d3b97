#include "comm/watchdog/emergency_exit.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <memory>
#include <system_error>
#include <thread>
#include <utility>

#include "comm/process_id.hpp"
#include "comm/watchdog/connection.hpp"
#include "kernels/diagnostics/operation_log.hpp"

namespace nsa {

namespace {

constexpr std::int64_t detached_timeout = 4'000'000'000;  // ns

void write_all(int file, const std::string& text) {
  for (std::size_t offset = 0; offset < text.size();) {
    const ssize_t n = ::write(file, text.data() + offset, text.size() - offset);
    if (n <= 0) return;
    offset += static_cast<std::size_t>(n);
  }
}

/// What the file holds from its beginning.
std::string read_again(int file) {
  std::array<char, 1024> text{};
  const ssize_t n = pread(file, text.data(), text.size(), 0);
  return {text.data(), static_cast<std::size_t>(std::max<ssize_t>(n, 0))};
}

/// Whether it is mpirun or a daemon of it: they belong to one job. slurmstepd, a shell or a debugger is not.
bool is_launcher(const ProcessStat& process) {
  constexpr std::array names{"mpirun", "mpiexec", "orterun", "prterun", "orted", "prted"};
  return std::ranges::find(names, process.name) != names.end();
}

/// Only calls that are safe between fork and exec of a process with threads. `state`: a file of /proc that can be read
/// as long as the process lives, even if another one gets its number.
[[noreturn]] void kill_later(pid_t process, int state, int seconds) {
  setsid();  // mpirun signals the groups of its ranks
  const int files = static_cast<int>(std::clamp(sysconf(_SC_OPEN_MAX), 1024L, 65536L));
  for (int file = 0; file < files; ++file)
    if (file != state) ::close(file);  // sockets, pipes and devices of the rank
  char first = 0;
  for (int wait = 0; wait < 10 * seconds; ++wait) {
    if (pread(state, &first, 1, 0) != 1) _exit(0);
    usleep(100'000);
  }
  if (pread(state, &first, 1, 0) == 1) ::kill(process, SIGKILL);
  _exit(0);
}

}  // namespace

void write_to_stderr(const std::string& text) { write_all(STDERR_FILENO, text); }

void save_operations(const std::string& path, int rank, const std::string& json) {
  if (path.empty()) return;
  const std::string name = fmt::format("{}.rank{}.ops.json", path, rank);
  const FileDescriptor file(open(name.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
  if (file.is_open()) write_all(file.get(), json);
}

void run_detached(std::function<void()> work) {
  const auto done = std::make_shared<std::atomic<bool>>(false);
  try {
    std::thread([work = std::move(work), done] {
      work();
      std::fflush(stdout);
      *done = true;
    }).detach();
  } catch (const std::system_error&) {
    return;  // no thread is available: ending the job matters more than its report
  }
  for (const std::int64_t until = coarse_now() + detached_timeout; !*done && coarse_now() < until;) usleep(5000);
}

void kill_stuck_launcher_after(int seconds) {
  const pid_t parent = getppid();
  const FileDescriptor state(open(process_stat_path(parent).c_str(), O_RDONLY | O_CLOEXEC));
  if (!state.is_open() || !is_launcher(parse_process_stat(read_again(state.get())))) return;
  if (fork() == 0) kill_later(parent, state.get(), seconds);
}

}  // namespace nsa
