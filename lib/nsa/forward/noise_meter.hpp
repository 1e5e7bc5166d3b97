#pragma once
// Notes on each rank what may have disturbed its timed work: counters of the operating system and the GPU's clock.

#include "kernels/diagnostics/process_counters.hpp"
#include "kernels/interface/backend.hpp"

namespace nsa {

/// What was noted of a mode, over its whole passes that count.
struct ModeNoise {
  double seconds = 0;  ///< of its passes, with what they do between the timed steps
  ProcessCounters counters;
  double sm_clock_mhz = 0;             ///< mean while its steps ran; 0: unknown
  std::int64_t throttle_reasons = -1;  ///< at its end, NVML's bits; -1: unknown
  std::int64_t throttled_passes = 0;   ///< that were measured again, and are in nothing else
};

class NoiseMeter {
 public:
  NoiseMeter(const DeviceOps& device, Stream* stream) : device_(device), stream_(stream) {}

  /// A pass begins. It ends with `end`, then `keep` or `drop`; one that does not is not noted.
  void begin();
  /// After each timed step of the pass. The clock is read after the first one, and at the end.
  void stepped();
  /// The mean clock of the pass as a share of the device's largest one; 1 where it is unknown.
  double end();
  void keep();
  void drop() { ++noted_.throttled_passes; }
  /// What was noted since the last call.
  ModeNoise take();

 private:
  ClockReading read_clock() const { return device_.read_clock ? device_.read_clock(stream_) : ClockReading{}; }

  const DeviceOps& device_;
  Stream* stream_;
  double begun_ = 0, seconds_ = 0;  ///< of the pass: its begin, its length
  ProcessCounters counters_;        ///< at its begin, then what it added
  ClockReading clock_;              ///< after its first step, then what passed until its end
  ClockReading measured_;           ///< nanoseconds and cycles of the kept passes
  double clock_max_mhz_ = -1;       ///< of the device; below 0: not read yet
  bool stepped_ = false;
  ModeNoise noted_;
};

}  // namespace nsa
