#pragma once
// Where the sequences of a decode are at each step. Several query tokens a step, of which a step may reject some
// (kernels/shared/acceptance.hpp), move sequences on by different numbers of tokens.

#include <cstdint>
#include <vector>

#include "kernels/shared/acceptance.hpp"
#include "nsa/config/config.hpp"

namespace nsa {

Acceptance acceptance_of(const Config& config, const Point& point);

class StepPositions {
 public:
  StepPositions(const Config& config, const Point& point);
  /// Position of the first query token of sequence b in a step; of step `steps`: its end after the last step.
  std::int64_t operator()(std::int64_t step, std::int64_t b) const;
  /// Query tokens of sequence b that the step keeps.
  std::int64_t kept(std::int64_t step, std::int64_t b) const;
  /// The end of every sequence after the last step.
  std::vector<std::int64_t> ends() const;

 private:
  const Point& point_;
  Acceptance acceptance_;
  std::int64_t steps_;
  std::vector<std::int64_t> moved_;  ///< [steps + 1][batch] tokens kept before the step; empty: all are kept
};

}  // namespace nsa
