#pragma once
// Requests to stop a run: a signal, or --max-time.

#include <chrono>
#include <limits>
#include <string>

namespace nsa {

constexpr double no_limit = std::numeric_limits<double>::infinity();

/// Seconds of "90", "90s", "10m", "1.5h" or Slurm's forms "30:00", "01:30:00", "1-12", "1-12:00", "1-12:00:00";
/// no_limit for "". Throws UserError.
double parse_duration(const std::string& text);

/// From now on SIGUSR1, SIGUSR2, SIGTERM, SIGHUP, SIGXCPU and the first SIGINT only set a flag. A second SIGINT ends
/// the process. A signal that is ignored, as by nohup, stays ignored.
void install_stop_signal_handlers();

/// Whether this process has received one of these signals, or `limit` seconds have passed since `start`.
bool stop_requested(std::chrono::steady_clock::time_point start, double limit);

}  // namespace nsa
