#pragma once
// The points that the input of a run asks for, beside those that its file holds.

#include <optional>
#include <string>
#include <vector>

#include "nsa/results/records.hpp"

namespace nsa {

/// The points of the run's effective input: each with its parameters and its index, without measurements. None where
/// the file does not hold an input that this program reads (written before schema 1.1, or by another program).
std::optional<std::vector<PointRecord>> asked_points(const RunRecord& run);

}  // namespace nsa
