#pragma once
// What asks a run to stop: a signal, or --max-time.

#include <chrono>
#include <limits>
#include <string>

namespace nsa {

constexpr double no_limit = std::numeric_limits<double>::infinity();

/// "90", "90s", "10m", "1.5h", "01:30:00" in seconds; "" is no limit. Throws UserError.
double parse_duration(const std::string& text);

/// SIGUSR1, SIGTERM and the first SIGINT no longer end this process but are remembered; a second SIGINT ends it.
void catch_stop_signals();

/// Whether this process got one of them, or `limit` seconds have passed since `start`.
bool asked_to_stop(std::chrono::steady_clock::time_point start, double limit);

}  // namespace nsa
