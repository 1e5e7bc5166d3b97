#include "app/stop_request.hpp"

#include <algorithm>
#include <atomic>
#include <charconv>
#include <cmath>
#include <csignal>
#include <iterator>
#include <string_view>

#include "kernels/diagnostics/error.hpp"

namespace nsa {
namespace {

std::atomic<bool> signalled{false};
static_assert(std::atomic<bool>::is_always_lock_free);  // a signal handler sets it

void set_flag(int) { signalled = true; }

/// The signals that end a run in order; of each, whether the program was started with it ignored: by nohup, or by a
/// shell that runs it in the background.
constexpr int stop_signals[] = {SIGUSR1, SIGUSR2, SIGTERM, SIGHUP, SIGXCPU, SIGINT};
bool was_ignored[std::size(stop_signals)];

void note_ignored_signals() {
  for (std::size_t i = 0; i < std::size(stop_signals); ++i) {
    struct sigaction action {};
    sigaction(stop_signals[i], nullptr, &action);
    was_ignored[i] = action.sa_handler == SIG_IGN;
  }
}

// Libraries take signals before main: UCX, which MPI may be linked with, takes SIGHUP. What .preinit_array holds runs
// earlier, when sanitizers do not work yet.
#if defined(__ELF__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
[[gnu::section(".preinit_array"), gnu::used]] void (*const before_libraries)() = note_ignored_signals;
#else
[[maybe_unused]] const bool noted = (note_ignored_signals(), true);
#endif

/// The number at the start of `text`, without sign, which it removes; -1 where there is none.
double take_number(std::string_view& text) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || !std::isfinite(value) || text[0] == '-') return -1;
  text.remove_prefix(static_cast<std::size_t>(end - text.data()));
  return value;
}

/// Seconds of "90", "90s", "10m", "1.5h"; -1 where it is none of these.
double with_unit(std::string_view text) {
  const double value = take_number(text);
  if (text.empty() || text == "s") return value;
  return text == "m" ? 60 * value : text == "h" ? 3600 * value : -1;
}

/// The whole number of one part of a clock time; -1 where it is none below `end`.
int part_of(std::string_view text, int end) {
  int value = -1;
  const auto [rest, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && rest == text.data() + text.size() && value < end ? value : -1;
}

/// Seconds of Slurm's forms "MM:SS", "HH:MM:SS", "D-HH", "D-HH:MM", "D-HH:MM:SS"; -1 where it is none of these.
double clock_time(std::string_view text) {
  constexpr int any = 1 << 24;
  const std::size_t dash = text.find('-');
  const bool days = dash != std::string_view::npos;
  double seconds = days ? 86400.0 * part_of(text.substr(0, dash), any) : 0;
  if (seconds < 0) return -1;
  if (days) text.remove_prefix(dash + 1);
  const auto colons = std::count(text.begin(), text.end(), ':');
  if (colons > 2) return -1;
  double unit = days || colons == 2 ? 3600 : 60;
  for (bool first = true;; first = false, unit /= 60) {
    const std::size_t colon = std::min(text.find(':'), text.size());
    const int part = part_of(text.substr(0, colon), !first ? 60 : days ? 24 : any);
    if (part < 0) return -1;
    seconds += unit * part;
    if (colon == text.size()) return seconds;
    text.remove_prefix(colon + 1);
  }
}

}  // namespace

double parse_duration(const std::string& text) {
  if (text.empty()) return no_limit;
  const double seconds = text.find_first_of(":-") == std::string::npos ? with_unit(text) : clock_time(text);
  if (seconds >= 0) return seconds;
  throw UserError("--max-time " + text +
                  " (not a duration); give seconds, or 90s, 10m, 1.5h, 30:00, 01:30:00, 1-12:00");
}

void install_stop_signal_handlers() {
  struct sigaction action {};
  action.sa_handler = set_flag;
  for (std::size_t i = 0; i < std::size(stop_signals); ++i) {
    if (was_ignored[i]) {
      std::signal(stop_signals[i], SIG_IGN);  // again, where a library has taken it
      continue;
    }
    action.sa_flags = SA_RESTART | (stop_signals[i] == SIGINT ? SA_RESETHAND : 0);
    sigaction(stop_signals[i], &action, nullptr);
  }
  // A write that fails is an error of its own, after the results were stored: a pager that was closed.
  std::signal(SIGPIPE, SIG_IGN);
}

bool stop_requested(std::chrono::steady_clock::time_point start, double limit) {
  return signalled || std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() >= limit;
}

}  // namespace nsa
