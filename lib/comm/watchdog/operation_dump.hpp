#pragma once
// The dump of the operation log (the flight recorder) that a hung job leaves next to its result file.

#include <cstdint>
#include <string>

#include "comm/watchdog/diagnosis.hpp"

namespace nsa {

/// The logged operations of a rank as a JSON document. "seconds_ago" counts back from `now`, on the clock of the rank.
std::string operations_json(const RankStatus& status, std::int64_t now, const std::string& diagnosis);

}  // namespace nsa
