#pragma once
// Ends a job that hangs: a thread a rank that looks at what the rank does (kernels/diagnostics/operation_log.hpp),
// tells it to two hubs, the first and the last rank, over TCP of its own, and hears from them when the job has to end.
// It calls no MPI, NCCL, CUDA or HDF5, so none of them can block it; what may block in a report (a file, a terminal) is
// done by yet another thread, which is not waited for long. The end is _exit: whoever is stuck cannot do it in order.
//
// Promised: an operation older than the deadline ends all ranks with exit code 4 within the deadline plus 15 s, and
// names the rank that is late. A rank that was stopped (SIGSTOP) is continued to end too, where a watchdog of its
// host can; then killed. A rank that hears from no hub ends by itself.
//
// Waits for a device need no polling: the rank may sit in cudaStreamSynchronize, the watchdog ends its process.

#include <memory>
#include <string>

#include "comm/session.hpp"

namespace nsa {

class WatchdogThread;

class Watchdog {
 public:
  /// Starts to watch, this rank alone at first: MPI's start may hang too. `deadline`: s; 0: off.
  explicit Watchdog(double deadline);
  /// Tells the others that this rank leaves in order.
  ~Watchdog();
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

  /// Collective. Makes the hubs known and joins them. Returns what stands in the way, on rank 0: "" or a warning.
  std::string join(const ControlComm& world);

  /// What the input says: the deadline, and the result file, beside which the operations are left.
  void set(double deadline, const std::string& result_path);
  void set_device(const std::string& name);  ///< "GPU 1", for messages

  /// A library failed between ranks: waits until the watchdogs have found out why and ended the job. Returns only
  /// when they cannot.
  void fail(const std::string& message);

  /// The rank is about to abort the job with `code`; when it still lives after some seconds it is ended.
  void aborting(ExitCode code);

 private:
  std::unique_ptr<WatchdogThread> thread_;
};

}  // namespace nsa
