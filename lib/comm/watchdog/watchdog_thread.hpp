#pragma once
// The watchdog thread of a rank, its settings and its view of the job. See watchdog/watchdog.hpp.

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "comm/process_id.hpp"
#include "comm/session.hpp"
#include "comm/watchdog/diagnosis.hpp"
#include "comm/watchdog/monitor.hpp"

namespace nsa {

constexpr std::int64_t ns_per_second = 1'000'000'000;
/// ns from a rank's failure until the watchdogs have ended the job, if they can.
constexpr std::int64_t failure_timeout = 21 * ns_per_second;

/// Set by the other threads of the rank. Times in ns.
struct WatchdogSettings {
  std::int64_t deadline = 0, startup_deadline = 0;
  std::string result_path, device, failure;
  bool leaving = false, all_joined = false;
  std::int64_t abort_at = 0;  ///< when the rank announced its abort; 0: it did not
  ExitCode abort_code = ExitCode::communication;
};

/// The job as the watchdog knows it.
struct WatchdogJob {
  int rank = 0;
  std::vector<ProcessId> processes;     ///< by rank; empty until join()
  std::unique_ptr<Monitor> monitor;     ///< on the first and the last rank
  std::vector<Connection> connections;  ///< to the monitors of other ranks
};

class WatchdogThread {
 public:
  WatchdogThread(double deadline, double startup_deadline);
  /// Sends goodbye to the monitors and joins the thread.
  ~WatchdogThread();
  WatchdogThread(const WatchdogThread&) = delete;
  WatchdogThread& operator=(const WatchdogThread&) = delete;

  /// Calls `apply(settings, job)` under the lock and wakes the thread. The thread then takes the settings, and adds to
  /// its job what `apply` has put into this one. May be called by any thread.
  template <class Change>
  void update(Change&& apply) {
    {
      const std::lock_guard guard(lock_);
      apply(pending_settings_, pending_job_);
      has_update_ = true;
    }
    wake_up();
  }

 private:
  void wake_up();
  void run();
  void wait(std::int64_t ns);
  void resume_after_stop(std::int64_t now);
  void apply_updates();
  void receive_messages(std::int64_t now);
  void send_heartbeat(std::int64_t now);
  void send_goodbye();
  void diagnose_job(std::int64_t now);
  void diagnose_self(std::int64_t now);
  [[noreturn]] void end_job(const HangDiagnosis& diagnosis);
  [[noreturn]] void follow(const HangDiagnosis& diagnosis, Connection& monitor);
  [[noreturn]] void leave(const HangDiagnosis& diagnosis) const;
  void save_remote_operations(const std::string& diagnosis);
  bool signal_ranks(const std::vector<int>& ranks, int signal_number) const;
  std::string own_operations_json(const std::string& diagnosis);
  RankStatus& own_status() { return job_.monitor ? job_.monitor->own_status() : own_status_; }
  std::int64_t deadline() const;
  std::int64_t heartbeat_interval() const;
  Timeouts timeouts() const;

  std::mutex lock_;  // guards the next three
  WatchdogSettings pending_settings_;
  WatchdogJob pending_job_;
  bool has_update_ = false;
  std::array<int, 2> wake_pipe_{-1, -1};

  // Used by the watchdog thread alone.
  WatchdogSettings settings_;
  WatchdogJob job_;
  RankStatus own_status_;                            // on a rank without a monitor
  std::uint64_t last_sent_ = 0, last_compared_ = 0;  // index of an operation; number of a collective
  std::int64_t next_heartbeat_ = 0;
  std::int64_t resumed_at_ = 0;    // when this process last continued after a stop
  std::int64_t diagnosed_at_ = 0;  // when this monitor first diagnosed a reason to end the job; 0: it has not
  bool without_monitor_ = false;   // this rank ends the job by its own diagnosis, and no monitor runs here

  std::thread thread_;  // the last member: it uses all of the above
};

}  // namespace nsa
