#pragma once
// The time of a decode step or of a prefill on a machine, from its input alone (docs/METRICS.md, "The cost model"). The
// fit to measured points, and the same prediction, are in analysis/nsa_analysis/models/cost_model.py.

#include <array>
#include <numeric>

#include "nsa/config/machine.hpp"
#include "nsa/model/partition.hpp"

namespace nsa {

/// Seconds of all layers, by cause.
struct PredictedTime {
  static constexpr std::array<const char*, 5> names = {"fixed", "memory", "arithmetic", "scoring", "exchanges"};
  std::array<double, 5> parts{};
  double total() const { return std::accumulate(parts.begin(), parts.end(), 0.0); }
};

/// Of the first rank, which has most to do. `config` is a decode or a prefill, and the machine knows that phase.
PredictedTime predict(const Machine& machine, const Config& config, const Partition& partition, const Point& point);

/// The machine's coefficients of config.kind. Throws UserError where it has none.
const PhaseCost& phase_cost(const Machine& machine, const Config& config);

}  // namespace nsa
