#include "app/progress.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

namespace nsa {
namespace {

constexpr std::chrono::milliseconds redraw_every{100};
constexpr std::chrono::seconds first_after{1}, log_every{30};
constexpr int bar_width = 24;

}  // namespace

ProgressLine::ProgressLine()
    : terminal_(isatty(STDERR_FILENO) == 1), next_(Clock::now() + (terminal_ ? first_after : log_every)) {}

void ProgressLine::update(std::size_t point, std::size_t points, double done, double total, const std::string& what) {
  const Clock::time_point now = Clock::now();
  if (now < next_) return;
  next_ = now + (terminal_ ? Clock::duration(redraw_every) : Clock::duration(log_every));
  const double within = total > 0 ? std::clamp(done / total, 0.0, 1.0) : 0.0;
  const std::string text = fmt::format("point {}/{} {:3.0f}% {}", point + 1, points, 100 * within, what);
  if (!terminal_) {
    fmt::print(stderr, "nsa: {}\n", text);
    return;
  }
  const int full = static_cast<int>(within * bar_width);
  fmt::print(stderr, "\r[{:#<{}}{:.<{}}] {}\x1b[K", "", full, "", bar_width - full, text);
  std::fflush(stderr);
  drawn_ = true;
}

void ProgressLine::clear() {
  if (!drawn_) return;
  fmt::print(stderr, "\r\x1b[K");
  std::fflush(stderr);
  drawn_ = false;
}

}  // namespace nsa
