#include "nsa/forward/noise_meter.hpp"

#include <chrono>
#include <utility>

namespace nsa {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

void NoiseMeter::begin() {
  stepped_ = false;
  counters_ = process_counters();
  begun_ = now();
}

void NoiseMeter::stepped() {
  if (!std::exchange(stepped_, true)) clock_ = read_clock();
}

void NoiseMeter::end() {
  const ClockReading last = stepped_ ? read_clock() : ClockReading{};
  noted_.seconds += now() - begun_;
  noted_.counters += process_counters() - counters_;
  if (last.nanoseconds <= clock_.nanoseconds || clock_.nanoseconds == 0) return;
  measured_.nanoseconds += last.nanoseconds - clock_.nanoseconds;
  measured_.cycles += last.cycles - clock_.cycles;
}

ModeNoise NoiseMeter::take() {
  if (measured_.nanoseconds > 0)
    noted_.sm_clock_mhz = 1e3 * static_cast<double>(measured_.cycles) / static_cast<double>(measured_.nanoseconds);
  if (device_.read_clock) noted_.throttle_reasons = device_.info().throttle_reasons;
  measured_ = {};
  return std::exchange(noted_, {});
}

}  // namespace nsa
