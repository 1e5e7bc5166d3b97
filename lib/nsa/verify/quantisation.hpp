#pragma once
// What FP8 caches change in the recorded pass of a decode point, against unquantised caches of the same input
// (docs/METRICS.md, "FP8 caches").

#include <cstdint>
#include <vector>

#include "nsa/forward/stages.hpp"
#include "nsa/results/records.hpp"
#include "nsa/verify/repeat_check.hpp"

namespace nsa {

/// What a step of a recorded pass chose in its last layer, and its o and y.
StepOutput recorded_step(const StepContext& ctx);

/// Sums over the recorded queries of this rank.
struct QuantisationSums {
  double same = 0, free = 0;     ///< blocks that ranking chose, the forced ones aside: by both; by unquantised caches
  double lost = 0, queries = 0;  ///< share of the importance that is lost, summed over queries with a choice
  double o_error = 0, o_norm = 0, y_error = 0, y_norm = 0;  ///< squares, of the difference and of the unquantised value

  /// A step that has just run, recorded, on unquantised caches, the positions of its rows, and the same step on FP8
  /// caches. Collective over the kv ranks.
  void add(const StepContext& unquantised, const std::vector<std::int64_t>& positions, const StepOutput& quantised);
  /// Of all ranks, on rank 0. Collective.
  QuantisationRecord reduce(const ControlComm& world) const;
};

}  // namespace nsa
