#pragma once
// The thread of a rank that watches it, and what it is told. See watchdog/watchdog.hpp.

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

constexpr std::int64_t ns_a_second = 1'000'000'000;
/// ns from a rank's failure until the watchdogs have ended the job, if they can.
constexpr std::int64_t failure_ends_job_within = 21 * ns_a_second;

/// What the rank has told its watchdog; times in ns.
struct WatchSettings {
  std::int64_t deadline = 0;
  std::string path, device, failure;
  bool leaving = false, all_joined = false;
  std::int64_t abort_at = 0;
  ExitCode abort_code = ExitCode::communication;
};

/// The job as the watchdog knows it.
struct WatchJob {
  int rank = 0;
  std::vector<Place> places;  ///< of all ranks; empty until they have joined
  std::unique_ptr<Hub> hub;   ///< where the rank is one
  std::vector<Link> hubs;     ///< its connections to the others
};

class WatchdogThread {
 public:
  explicit WatchdogThread(double deadline);
  /// Leaves in order.
  ~WatchdogThread();
  WatchdogThread(const WatchdogThread&) = delete;
  WatchdogThread& operator=(const WatchdogThread&) = delete;

  /// Any thread: `apply(settings, arrived)`; what has arrived is added to what the thread knows of its job.
  template <class Change>
  void change(Change&& apply) {
    {
      const std::lock_guard guard(lock_);
      apply(shared_, arrived_);
      news_ = true;
    }
    wake_up();
  }

 private:
  void wake_up();
  void run();
  void wait(std::int64_t ns);
  void go_on_after_stop(std::int64_t now);
  void take_news();
  void listen(std::int64_t now);
  void tell(std::int64_t now);
  void leave();
  void judge_all(std::int64_t now);
  void judge_alone(std::int64_t now);
  [[noreturn]] void end_job(const Verdict& verdict);
  [[noreturn]] void obey(const Verdict& verdict, Link& judge);
  void save_for_others(const std::string& verdict);
  bool signal_ranks(const std::vector<int>& ranks, int which) const;
  std::string own_json(const std::string& verdict);
  RankView& own_view() { return job_.hub ? job_.hub->own_view() : alone_; }
  std::int64_t beat_every() const;
  WatchTimes times() const;

  std::mutex lock_;  // of the next three
  WatchSettings shared_;
  WatchJob arrived_;
  bool news_ = false;
  std::array<int, 2> wake_{-1, -1};  // a pipe

  // The thread's own.
  WatchSettings set_;
  WatchJob job_;
  RankView alone_;  // of this rank, where it is no hub
  std::uint64_t told_index_ = 0, compared_ = 0;
  std::int64_t next_beat_ = 0;
  std::int64_t resumed_ = 0;    // when this process last went on after a stop
  std::int64_t suspected_ = 0;  // when the second hub first saw a reason to end the job

  std::thread thread_;  // last: it uses all of the above
};

}  // namespace nsa
