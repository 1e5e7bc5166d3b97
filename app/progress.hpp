#pragma once
// How far a long run is: one line that is redrawn on a terminal, a line every half minute in a log. On stderr.

#include <chrono>
#include <string>

namespace nsa {

class ProgressLine {
 public:
  ProgressLine();
  ~ProgressLine() { clear(); }
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;

  /// `point` of `points` has done `done` of `total`, and is at `what`. Draws only when it is time to.
  void update(std::size_t point, std::size_t points, double done, double total, const std::string& what);
  /// Takes the line away, so that other output can follow.
  void clear();

 private:
  using Clock = std::chrono::steady_clock;
  const bool terminal_;
  Clock::time_point next_;
  bool drawn_ = false;
};

}  // namespace nsa
