#include "comm/watchdog/emergency_exit.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <memory>
#include <system_error>
#include <thread>
#include <utility>

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

}  // namespace nsa
