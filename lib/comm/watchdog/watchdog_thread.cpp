#include "comm/watchdog/watchdog_thread.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>

#include "comm/watchdog/emergency_exit.hpp"
#include "comm/watchdog/operation_dump.hpp"
#include "comm/watchdog/protocol.hpp"
#include "kernels/diagnostics/operation_log.hpp"

namespace nsa {

namespace {

constexpr std::int64_t second = ns_per_second;
constexpr std::int64_t lost_rank_grace = 3 * second;       // the launcher usually ends the job earlier
constexpr std::int64_t second_monitor_delay = 3 * second;  // the monitor of rank 0 speaks first
constexpr std::int64_t self_diagnosis_delay = 8 * second;  // of a connected rank: a monitor would act earlier
constexpr std::int64_t report_timeout = 3 * second;        // for the reports of the other ranks
constexpr int launcher_timeout = 10;  // s from the end of a rank: mpirun has ended by then, unless a host is lost
constexpr std::int64_t abort_timeout = 10 * second;
constexpr std::int64_t max_wakeup_delay = 5 * second;  // a thread that wakes up later was stopped with its process
static_assert(lost_rank_grace + self_diagnosis_delay + second < failure_timeout);

}  // namespace

WatchdogThread::WatchdogThread(double deadline, double startup_deadline) {
  pending_settings_.deadline = static_cast<std::int64_t>(deadline * second);
  pending_settings_.startup_deadline = static_cast<std::int64_t>(startup_deadline * second);
  has_update_ = true;
  own_status_.host = host_name();
  own_status_.rank = job_.rank = launched_rank().value_or(0);
  if (pipe2(wake_pipe_.data(), O_NONBLOCK | O_CLOEXEC) != 0)
    throw std::system_error(errno, std::generic_category(), "a pipe");
  sigset_t all, before;  // the watchdog thread blocks all signals: the handlers run in the other threads
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  thread_ = std::thread([this] { run(); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

WatchdogThread::~WatchdogThread() {
  update([](WatchdogSettings& settings, WatchdogJob&) { settings.leaving = true; });
  thread_.join();
  for (const int pipe_end : wake_pipe_) ::close(pipe_end);
}

void WatchdogThread::wake_up() { (void)!::write(wake_pipe_[1], "!", 1); }

std::int64_t WatchdogThread::deadline() const {
  const bool own_of_start = !settings_.all_joined && settings_.startup_deadline > 0;
  return own_of_start ? std::min(settings_.deadline, settings_.startup_deadline) : settings_.deadline;
}
std::int64_t WatchdogThread::heartbeat_interval() const { return std::clamp(deadline() / 10, second / 10, second); }
Timeouts WatchdogThread::timeouts() const {
  return {deadline(), 0, 7 * heartbeat_interval() / 2, lost_rank_grace, !settings_.all_joined};
}

void WatchdogThread::run() {
  for (std::int64_t before = coarse_now();;) {
    wait(next_heartbeat_ - before);
    const std::int64_t now = coarse_now();
    if (now - before > second + max_wakeup_delay) resume_after_stop(now);
    before = now;
    apply_updates();
    receive_messages(now);
    if (settings_.leaving) return send_goodbye();
    if (settings_.abort_at > 0 && now - settings_.abort_at > abort_timeout)
      _exit(static_cast<int>(settings_.abort_code));
    if (now < next_heartbeat_) continue;
    next_heartbeat_ = now + heartbeat_interval();
    send_heartbeat(now);
    if (settings_.deadline == 0 || settings_.abort_at > 0) continue;
    if (job_.monitor) diagnose_job(now);
    diagnose_self(now);
  }
}

void WatchdogThread::wait(std::int64_t ns) {
  std::vector<pollfd> entries{{wake_pipe_[0], POLLIN, 0}};
  if (job_.monitor) job_.monitor->append_poll_entries(entries);
  for (const Connection& connection : job_.connections) entries.push_back(connection.poll_entry());
  const std::int64_t milliseconds = std::clamp<std::int64_t>(ns / 1'000'000 + 1, 1, 1000);
  poll(entries.data(), entries.size(), static_cast<int>(milliseconds));
  char drain[64];
  while (::read(wake_pipe_[0], drain, sizeof drain) > 0) {
  }
}

// A job that was stopped as a whole did not hang: ages count from the moment it continues.
void WatchdogThread::resume_after_stop(std::int64_t now) {
  resumed_at_ = now;
  if (!job_.monitor) return;
  for (RankStatus& status : job_.monitor->ranks()) status.received_at = std::max(status.received_at, now);
}

void WatchdogThread::apply_updates() {
  const std::lock_guard guard(lock_);
  if (!std::exchange(has_update_, false)) return;
  settings_ = pending_settings_;
  next_heartbeat_ = 0;
  if (!pending_job_.processes.empty()) {
    job_.rank = own_status_.rank = pending_job_.rank;
    job_.processes = std::exchange(pending_job_.processes, {});
    job_.monitor = std::move(pending_job_.monitor);
    last_sent_ = 0;
  }
  if (!pending_job_.connections.empty()) last_sent_ = 0;  // a new connection has received nothing yet
  for (Connection& connection : pending_job_.connections) job_.connections.push_back(std::move(connection));
  pending_job_.connections.clear();
  if (settings_.all_joined && job_.monitor) job_.monitor->stop_accepting();
}

void WatchdogThread::receive_messages(std::int64_t now) {
  if (job_.monitor) job_.monitor->progress(now);
  for (Connection& connection : job_.connections) {
    connection.progress();
    while (const auto message = connection.next_message())
      if (!message->empty() && type_of(*message) == MessageType::end_job) follow(decode_end_job(*message), connection);
  }
  std::erase_if(job_.connections, [](const Connection& connection) { return !connection.is_open(); });
}

void WatchdogThread::send_heartbeat(std::int64_t now) {
  std::vector<OperationRecord> recent = recent_operations(last_sent_ > 0 ? last_sent_ - 1 : 0);
  if (!recent.empty()) last_sent_ = recent.back().index;
  if (!recent.empty() && recent.back().end == 0) recent.back().begin = std::max(recent.back().begin, resumed_at_);
  RankStatus& status = own_status();
  status.merge_operations(recent);
  status.sent_at = status.received_at = now;
  status.location = current_activity();
  status.device = settings_.device;
  if (status.failure.empty() && !settings_.failure.empty()) status.failure = settings_.failure, status.failed_at = now;
  const std::string message = encode_heartbeat(status, recent);
  for (Connection& connection : job_.connections)
    if (!connection.has_unsent()) connection.send(message);  // a monitor that does not read gets no more
}

void WatchdogThread::send_goodbye() {
  for (Connection& connection : job_.connections) connection.send(encode_goodbye());
}

// The second monitor waits for the first: one of them prints the message.
void WatchdogThread::diagnose_job(std::int64_t now) {
  const auto diagnosis = diagnose(job_.monitor->ranks(), now, timeouts(), last_compared_);
  if (!diagnosis) return;
  if (diagnosed_at_ == 0) diagnosed_at_ = now;
  if (job_.rank == 0 || now - diagnosed_at_ > second_monitor_delay) end_job(*diagnosis);
}

// Diagnoses from this rank's own operations. A connected rank waits longer, so that a monitor that runs acts first.
void WatchdogThread::diagnose_self(std::int64_t now) {
  const bool connected = !job_.connections.empty() || job_.monitor;
  Timeouts later = timeouts();
  later.deadline_margin = connected ? self_diagnosis_delay : 0;
  later.grace_period = connected ? lost_rank_grace + self_diagnosis_delay : 0;
  std::uint64_t last_compared = 0;
  const auto diagnosis = diagnose({own_status()}, now, later, last_compared);
  if (!diagnosis) return;
  without_monitor_ = !job_.monitor;
  end_job(*diagnosis);
}

void WatchdogThread::end_job(const HangDiagnosis& diagnosis) {
  if (job_.monitor) job_.monitor->send_to_all(encode_end_job(diagnosis));
  signal_ranks(diagnosis.silent_ranks, SIGCONT);
  std::string text = "nsa: error: " + diagnosis.message;
  if (!settings_.result_path.empty())
    text += fmt::format("; last operations: {}.rank*.ops.json", settings_.result_path);
  run_detached([text, path = settings_.result_path, rank = job_.rank, json = own_operations_json(diagnosis.message)] {
    write_to_stderr(text + "\n");
    save_operations(path, rank, json);
  });
  for (const std::int64_t until = coarse_now() + report_timeout;
       job_.monitor && job_.monitor->has_running_ranks() && coarse_now() < until;) {
    wait(second / 10);
    job_.monitor->progress(coarse_now());
  }
  save_remote_operations(diagnosis.message);
  std::vector<int> stuck = diagnosis.silent_ranks;  // a rank that sent goodbye ends by itself, with its own exit code
  std::erase_if(stuck, [&](int r) {
    return job_.monitor && job_.monitor->ranks()[static_cast<std::size_t>(r)].state == RankStatus::State::finished;
  });
  signal_ranks(stuck, SIGKILL);
  leave(diagnosis);
}

void WatchdogThread::follow(const HangDiagnosis& diagnosis, Connection& monitor) {
  signal_ranks(diagnosis.silent_ranks, SIGCONT);
  run_detached([path = settings_.result_path, rank = job_.rank, json = own_operations_json(diagnosis.message)] {
    save_operations(path, rank, json);
  });
  send_goodbye();
  // The monitor that made the diagnosis ends first: the launcher may end all ranks when the first one ends, and that
  // rank has to print the reason.
  for (const std::int64_t until = coarse_now() + report_timeout + second; monitor.is_open() && coarse_now() < until;) {
    wait_readable(monitor, 0.1);
    monitor.progress();
  }
  if (signal_ranks(diagnosis.silent_ranks, 0)) usleep(500'000);  // time to end by themselves
  signal_ranks(diagnosis.silent_ranks, SIGKILL);
  leave(diagnosis);
}

void WatchdogThread::leave(const HangDiagnosis& diagnosis) const {
  const auto is_remote = [&, &all = job_.processes](int r) {
    return r >= 0 && r < std::ssize(all) &&
           all[static_cast<std::size_t>(r)].machine != all[static_cast<std::size_t>(job_.rank)].machine;
  };
  // A rank that has to end the job by itself hears no monitor: those of ranks 0 and last may be cut off.
  const bool cut_off =
      without_monitor_ && (is_remote(0) || is_remote(static_cast<int>(std::ssize(job_.processes)) - 1));
  if (cut_off || std::ranges::any_of(diagnosis.silent_ranks, is_remote)) kill_stuck_launcher_after(launcher_timeout);
  _exit(static_cast<int>(ExitCode::communication));
}

std::string WatchdogThread::own_operations_json(const std::string& diagnosis) {
  RankStatus status = own_status();
  status.merge_operations(recent_operations());
  return operations_json(status, coarse_now(), diagnosis);
}

// Dumps what the ranks that cannot write their own reports had sent before.
void WatchdogThread::save_remote_operations(const std::string& diagnosis) {
  if (!job_.monitor) return;
  std::vector<std::pair<int, std::string>> dumps;
  for (const RankStatus& status : job_.monitor->ranks())
    if (status.rank != job_.rank && status.state != RankStatus::State::finished)
      dumps.emplace_back(status.rank,
                         operations_json(status, status.sent_at + coarse_now() - status.received_at, diagnosis));
  run_detached([path = settings_.result_path, dumps] {
    for (const auto& [rank, json] : dumps) save_operations(path, rank, json);
  });
}

// Signals those of the ranks that run on this machine. Returns whether there was any.
bool WatchdogThread::signal_ranks(const std::vector<int>& ranks, int signal_number) const {
  bool any = false;
  for (const int r : ranks)
    if (r >= 0 && r < std::ssize(job_.processes) && r != job_.rank)
      any |= signal_process(job_.processes[static_cast<std::size_t>(r)], signal_number);
  return any;
}

}  // namespace nsa
