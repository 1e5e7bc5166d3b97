#pragma once
// Ends a job that hangs. Every rank has a watchdog thread that reads the rank's operation log
// (kernels/diagnostics/operation_log.hpp), sends heartbeats to two monitors, on the first and the last rank, over its
// own TCP connections, and receives from them when the job has to end. The thread calls no MPI, NCCL, CUDA or HDF5, so
// none of them can block it. A report may block (on a file or a terminal), so another thread writes it, and the wait
// for that thread is limited. The job ends by _exit, because a rank that is stuck cannot end normally.
//
// Guarantees: an operation older than the deadline ends all ranks with exit code 4 within the deadline plus 15 s, and
// the message names the rank that is late. Until all ranks have connected, the start-up deadline applies instead, if it
// is shorter: a rank that ended by then is known to nobody. A stopped rank (SIGSTOP) is continued so that it can end,
// if a watchdog runs on its host, and then killed. A rank without a connection to any monitor ends by itself.
//
// Waits for a device need no polling: the rank may block in cudaStreamSynchronize, and the watchdog ends its process.

#include <memory>
#include <string>

#include "comm/session.hpp"

namespace nsa {

class WatchdogThread;

class Watchdog {
 public:
  static constexpr double default_startup_deadline = 60;  ///< s

  /// Starts the thread. Until join() it watches this rank alone, because MPI_Init may hang too. `deadline`: s; 0: off.
  /// `startup_deadline`: s, of an operation before join() has returned; 0: as `deadline`.
  explicit Watchdog(double deadline, double startup_deadline = default_startup_deadline);
  /// Sends goodbye: the rank ends normally.
  ~Watchdog();
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

  /// Starts the monitors and connects all ranks to them. Collective. Returns on rank 0 a warning if a rank could not
  /// connect, else "".
  std::string join(const ControlComm& world);

  /// Sets the values of the input: the deadline in s, and the result file, next to which the operation dumps are
  /// written.
  void configure(double deadline, const std::string& result_path);
  void set_device(const std::string& name);  ///< "GPU 1", for messages

  /// Reports that a library failed in a collective, and waits until the watchdogs have diagnosed it and ended the job.
  /// Returns only if they cannot, or if the watchdog is off.
  void report_failure(const std::string& message);

  /// Announces that the rank aborts the job with `code`. If its process still runs 10 s later, the watchdog ends it.
  void notify_abort(ExitCode code);

 private:
  std::unique_ptr<WatchdogThread> thread_;
};

}  // namespace nsa
