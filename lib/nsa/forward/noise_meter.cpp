#include "nsa/forward/noise_meter.hpp"

#include <chrono>
#include <utility>

#include "kernels/diagnostics/fault_injection.hpp"

namespace nsa {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double mean_mhz(const ClockReading& passed) {
  return 1e3 * static_cast<double>(passed.cycles) / static_cast<double>(passed.nanoseconds);
}

}  // namespace

void NoiseMeter::begin() {
  stepped_ = false;
  counters_ = process_counters();
  begun_ = now();
}

void NoiseMeter::stepped() {
  if (!std::exchange(stepped_, true)) clock_ = read_clock();
}

double NoiseMeter::end() {
  const ClockReading last = stepped_ ? read_clock() : ClockReading{};
  seconds_ = now() - begun_;
  counters_ = process_counters() - counters_;
  const bool known = stepped_ && clock_.nanoseconds > 0 && last.nanoseconds > clock_.nanoseconds;
  clock_ = known ? ClockReading{last.nanoseconds - clock_.nanoseconds, last.cycles - clock_.cycles} : ClockReading{};
  if (const fault::Fault f = fault::at("noise.clock"); f.is(fault::Action::shorten))
    return 0.01 * static_cast<double>(f.value);
  if (known && clock_max_mhz_ < 0) clock_max_mhz_ = device_.info().clock_max_mhz;
  return known && clock_max_mhz_ > 0 ? mean_mhz(clock_) / clock_max_mhz_ : 1;
}

void NoiseMeter::keep() {
  noted_.seconds += seconds_;
  noted_.counters += counters_;
  measured_.nanoseconds += clock_.nanoseconds;
  measured_.cycles += clock_.cycles;
}

ModeNoise NoiseMeter::take() {
  if (measured_.nanoseconds > 0) noted_.sm_clock_mhz = mean_mhz(measured_);
  if (device_.read_clock) noted_.throttle_reasons = device_.info().throttle_reasons;
  measured_ = {};
  return std::exchange(noted_, {});
}

}  // namespace nsa
