#pragma once
// Notes on each rank what may have disturbed its timed work: counters of the operating system and the GPU's clock.

#include "kernels/diagnostics/process_counters.hpp"
#include "kernels/interface/backend.hpp"

namespace nsa {

/// What was noted of a mode, over its whole passes.
struct ModeNoise {
  double seconds = 0;  ///< of its passes, with what they do between the timed steps
  ProcessCounters counters;
  double sm_clock_mhz = 0;             ///< mean while its steps ran; 0: unknown
  std::int64_t throttle_reasons = -1;  ///< at its end, NVML's bits; -1: unknown
};

class NoiseMeter {
 public:
  NoiseMeter(const DeviceOps& device, Stream* stream) : device_(device), stream_(stream) {}

  /// A pass begins. It ends with `end`; one that does not is not noted.
  void begin();
  /// After each timed step of the pass. The clock is read after the first one, and at the end.
  void stepped();
  void end();
  /// What was noted since the last call.
  ModeNoise take();

 private:
  ClockReading read_clock() const { return device_.read_clock ? device_.read_clock(stream_) : ClockReading{}; }

  const DeviceOps& device_;
  Stream* stream_;
  double begun_ = 0;
  ProcessCounters counters_;
  ClockReading clock_;     ///< after the first step of the pass
  ClockReading measured_;  ///< nanoseconds and cycles of the passes so far
  bool stepped_ = false;
  ModeNoise noted_;
};

}  // namespace nsa
