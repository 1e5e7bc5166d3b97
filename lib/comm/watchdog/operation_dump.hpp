#pragma once
// What is left beside the result of a job that hung.

#include <cstdint>
#include <string>

#include "comm/watchdog/diagnosis.hpp"

namespace nsa {

/// The operations of a rank as a JSON document; seconds are counted back from `now`, on the rank's clock.
std::string operations_json(const RankView& view, std::int64_t now, const std::string& verdict);

}  // namespace nsa
