#pragma once
// Conditions 2 and 3 of the gate: speed and error of the custom kernel, which every shape has to meet. And what a
// value with an interval decides, for every condition.

#include <limits>
#include <string>

#include "nsa/gate/evidence.hpp"
#include "nsa/gate/gate.hpp"

namespace nsa {

constexpr double none = std::numeric_limits<double>::quiet_NaN();
constexpr double family_alpha = 0.05;  ///< all intervals of a condition hold together with 95% (Bonferroni)

/// A value without a finite interval decides nothing.
bool has_interval(const Measured& measured);
Outcome outcome_of(const Measured& measured, double threshold, bool at_least);
/// How many samples an interval needs, where n are too few.
std::string too_few(std::int64_t n, double alpha);

/// Why a NOISY point decides nothing.
std::string noise_gap(const PointRecord& point);

/// Fills in the shapes of the device and its conditions on them.
void judge_shapes(DeviceVerdict& device, const DevicePoints& points);

}  // namespace nsa
