#pragma once
// Progress of a long run on stderr: one line redrawn on a terminal, a new line every 30 s in a log.

#include <chrono>
#include <string>

namespace nsa {

class ProgressLine {
 public:
  ProgressLine();
  ~ProgressLine() { clear(); }
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;

  /// Point `point` of `points` has completed `done` of `total` and now runs `what`. Draws at most every 0.1 s
  /// (terminal) or 30 s (log).
  void update(std::size_t point, std::size_t points, double done, double total, const std::string& what);
  /// Erases the line, so that other output can follow.
  void clear();

 private:
  using Clock = std::chrono::steady_clock;
  const bool terminal_;
  Clock::time_point next_;
  bool drawn_ = false;
};

}  // namespace nsa
