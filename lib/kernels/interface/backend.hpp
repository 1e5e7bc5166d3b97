#pragma once
// A backend: its kernels and its memory, streams, events and graphs. open_backend is the only switch.

#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/interface/kernel_table.hpp"

namespace nsa {

struct Event;  // opaque
struct Graph;  // opaque

enum class BackendKind : std::int32_t { host, cuda };

struct DeviceInfo {
  std::string name, uuid, driver, runtime;         ///< uuid, driver, runtime: empty on the host
  std::string architecture;                        ///< "sm_90", or the host's SIMD level
  std::int32_t index = -1;                         ///< of the device on its host; -1: the host itself
  std::int32_t units = 0;                          ///< SMs, or threads
  std::int64_t memory_total = 0, memory_free = 0;  ///< bytes; on the host within the limits of its control groups
  std::int64_t process_free = -1;                  ///< bytes below this process's own limits; -1: no limit
  double clock_mhz = 0, memory_clock_mhz = 0;
  double clock_max_mhz = 0;            ///< of an SM; 0: unknown
  std::int64_t throttle_reasons = -1;  ///< why the clock is below its maximum now, NVML's bits; -1: unknown
  std::int64_t cache_bytes = 0;        ///< last-level cache; 0: unknown
  std::int64_t ecc_errors = -1;        ///< uncorrected, volatile; -1: unknown
};

/// Time and cycles of one SM, read together: two readings give its mean clock between them.
struct ClockReading {
  std::int64_t nanoseconds = 0, cycles = 0;  ///< 0: not read
};

/// Plain function pointers, all throwing UserError(ExitCode::device) with what the device said.
struct DeviceOps {
  void* (*allocate)(std::size_t bytes);  ///< 256-byte aligned, filled with 0xFF (NaN) so that unwritten reads show
  void (*release)(void*) noexcept;
  Stream* (*create_stream)();
  void (*destroy_stream)(Stream*) noexcept;
  void (*synchronize)(Stream*);
  void (*copy)(void* to, const void* from, std::size_t bytes, Stream*);  ///< any direction
  void (*fill)(void* to, int byte, std::size_t bytes, Stream*);
  Event* (*create_event)();
  void (*destroy_event)(Event*) noexcept;
  void (*record)(Event*, Stream*);
  void (*wait)(Stream*, Event*);              ///< the stream goes on when the event is reached
  double (*elapsed)(Event* from, Event* to);  ///< seconds; both reached
  /// Captures what `body(context)` queues on the stream; null where the backend has no graphs.
  Graph* (*capture)(Stream*, void (*body)(void*), void* context);
  void (*launch)(Graph*, Stream*);
  void (*destroy_graph)(Graph*) noexcept;
  DeviceInfo (*info)();
  /// Queues: ring[1 + ring[0]++] = the device's own clock in nanoseconds. `ring` is backend memory.
  void (*stamp)(std::int64_t* ring, Stream*);
  ClockReading (*read_clock)(Stream*);  ///< after what is queued; waits. Null where the backend has no such clock
  /// In a build with faults: queues a kernel that the device refuses, throws the LaunchError. Null elsewhere.
  void (*refused_launch)(Stream*) = nullptr;
};

struct Backend {
  BackendKind kind;
  const KernelTable* kernels;
  const DeviceOps* device;
  int capability = 0;  ///< of the GPU, 10 * major + minor; 0 on the host
};

/// Opens the backend for this rank; local_rank picks the device.
/// Throws UserError when the build has no CUDA (usage) or the machine has no such device (device).
Backend open_backend(BackendKind kind, int local_rank);

bool cuda_built() noexcept;

/// A GPU as a plan needs to know it; the defaults are those of an H200.
struct PlannedGpu {
  int capability = 90;  ///< 10 * major + minor
  int sms = 132;        ///< streaming multiprocessors
};

/// The CUDA backend of a GPU that is not here, in every build: what its kernels accept and the sizes of what they need.
/// It has neither a device nor anything that runs. A process plans for one GPU at a time.
Backend planned_backend(const PlannedGpu& gpu);

}  // namespace nsa
