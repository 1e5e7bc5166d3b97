#include "app/stop_request.hpp"

#include <atomic>
#include <cmath>
#include <csignal>
#include <cstdio>

#include "kernels/diagnostics/error.hpp"

namespace nsa {
namespace {

std::atomic<bool> signalled{false};
static_assert(std::atomic<bool>::is_always_lock_free);  // a signal handler sets it

void set_flag(int) { signalled = true; }

}  // namespace

double parse_duration(const std::string& text) {
  if (text.empty()) return no_limit;
  double value = 0;
  int hours = 0, minutes = 0, seconds = 0, end = 0;
  const int size = static_cast<int>(text.size());
  if (std::sscanf(text.c_str(), "%d:%2d:%2d%n", &hours, &minutes, &seconds, &end) == 3 && end == size) {
    if (hours >= 0 && minutes >= 0 && minutes < 60 && seconds >= 0 && seconds < 60)
      return 3600.0 * hours + 60.0 * minutes + seconds;
  } else if (std::sscanf(text.c_str(), "%lf%n", &value, &end) == 1 && value >= 0 && std::isfinite(value)) {
    const std::string unit = text.substr(static_cast<std::size_t>(end));
    if (unit.empty() || unit == "s") return value;
    if (unit == "m") return 60 * value;
    if (unit == "h") return 3600 * value;
  }
  throw UserError("--max-time " + text + " (not a duration); give seconds, or 90s, 10m, 1.5h, 01:30:00");
}

void install_stop_signal_handlers() {
  struct sigaction action {};
  action.sa_handler = set_flag;
  action.sa_flags = SA_RESTART;
  sigaction(SIGUSR1, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  action.sa_flags |= SA_RESETHAND;
  sigaction(SIGINT, &action, nullptr);
}

bool stop_requested(std::chrono::steady_clock::time_point start, double limit) {
  return signalled || std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() >= limit;
}

}  // namespace nsa
