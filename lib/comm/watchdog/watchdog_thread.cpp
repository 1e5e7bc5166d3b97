#include "comm/watchdog/watchdog_thread.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "comm/watchdog/emergency_exit.hpp"
#include "comm/watchdog/operation_dump.hpp"
#include "comm/watchdog/protocol.hpp"
#include "kernels/diagnostics/operation_log.hpp"

namespace nsa {

namespace {

constexpr std::int64_t s = ns_a_second;
constexpr std::int64_t lost_grace = 3 * s;  // the launcher usually ends the job before
constexpr std::int64_t second_hub_waits = 3 * s;
constexpr std::int64_t alone_waits = 8 * s;  // a rank that no hub tells anything
constexpr std::int64_t end_waits = 3 * s;    // for the others' reports
constexpr std::int64_t abort_waits = 10 * s;
constexpr std::int64_t pause = 5 * s;  // a thread that wakes so late was stopped with its process
static_assert(lost_grace + alone_waits + s < failure_ends_job_within);

}  // namespace

WatchdogThread::WatchdogThread(double deadline) {
  shared_.deadline = static_cast<std::int64_t>(deadline * s);
  news_ = true;
  alone_.host = own_place().host;
  if (pipe2(wake_.data(), O_NONBLOCK | O_CLOEXEC) != 0) throw InternalError("pipe2 failed");
  sigset_t all, before;  // signals are for the threads that have handlers in mind
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  thread_ = std::thread([this] { run(); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

WatchdogThread::~WatchdogThread() {
  change([](WatchSettings& settings, WatchJob&) { settings.leaving = true; });
  thread_.join();
  for (const int end_of_pipe : wake_) ::close(end_of_pipe);
}

void WatchdogThread::wake_up() { (void)!::write(wake_[1], "!", 1); }

std::int64_t WatchdogThread::beat_every() const { return std::clamp(set_.deadline / 10, s / 10, s); }
WatchTimes WatchdogThread::times() const { return {set_.deadline, 0, 7 * beat_every() / 2, lost_grace}; }

void WatchdogThread::run() {
  for (std::int64_t before = coarse_now();;) {
    wait(next_beat_ - before);
    const std::int64_t now = coarse_now();
    if (now - before > s + pause) go_on_after_stop(now);
    before = now;
    take_news();
    listen(now);
    if (set_.leaving) return leave();
    if (set_.abort_at > 0 && now - set_.abort_at > abort_waits) _exit(static_cast<int>(set_.abort_code));
    if (now < next_beat_) continue;
    next_beat_ = now + beat_every();
    tell(now);
    if (set_.deadline == 0 || set_.abort_at > 0) continue;
    if (job_.hub) judge_all(now);
    judge_alone(now);
  }
}

void WatchdogThread::wait(std::int64_t ns) {
  std::vector<pollfd> list{{wake_[0], POLLIN, 0}};
  if (job_.hub) job_.hub->add_waiting(list);
  for (const Link& link : job_.hubs) list.push_back(link.waiting());
  const std::int64_t milliseconds = std::clamp<std::int64_t>(ns / 1'000'000 + 1, 1, 1000);
  poll(list.data(), list.size(), static_cast<int>(milliseconds));
  char drain[64];
  while (::read(wake_[0], drain, sizeof drain) > 0) {
  }
}

// Whoever stopped the whole job did not hang it: ages count from here.
void WatchdogThread::go_on_after_stop(std::int64_t now) {
  resumed_ = now;
  if (!job_.hub) return;
  for (RankView& view : job_.hub->views()) view.heard = std::max(view.heard, now);
}

void WatchdogThread::take_news() {
  const std::lock_guard guard(lock_);
  if (!std::exchange(news_, false)) return;
  set_ = shared_;
  next_beat_ = 0;
  if (!arrived_.places.empty()) {
    job_.rank = alone_.rank = arrived_.rank;
    job_.places = std::exchange(arrived_.places, {});
    job_.hub = std::move(arrived_.hub);
    told_index_ = 0;
  }
  if (!arrived_.hubs.empty()) told_index_ = 0;  // a new listener has heard nothing yet
  for (Link& link : arrived_.hubs) job_.hubs.push_back(std::move(link));
  arrived_.hubs.clear();
  if (set_.all_joined && job_.hub) job_.hub->stop_accepting();
}

void WatchdogThread::listen(std::int64_t now) {
  if (job_.hub) job_.hub->listen(now);
  for (Link& link : job_.hubs) {
    link.pump();
    while (const auto message = link.next())
      if (!message->empty() && kind_of(*message) == MessageKind::end) obey(read_end(*message), link);
  }
  std::erase_if(job_.hubs, [](const Link& link) { return !link.open(); });
}

void WatchdogThread::tell(std::int64_t now) {
  std::vector<OperationRecord> recent = recent_operations(told_index_ > 0 ? told_index_ - 1 : 0);
  if (!recent.empty()) told_index_ = recent.back().index;
  if (!recent.empty() && recent.back().end == 0) recent.back().begin = std::max(recent.back().begin, resumed_);
  RankView& view = own_view();
  view.take(recent);
  view.told = view.heard = now;
  view.place = current_activity();
  view.device = set_.device;
  if (view.failure.empty() && !set_.failure.empty()) view.failure = set_.failure, view.changed = now;
  const std::string message = beat_message(view, recent);
  for (Link& link : job_.hubs)
    if (!link.has_output()) link.send(message);  // a hub that reads nothing gets no more
}

void WatchdogThread::leave() {
  for (Link& link : job_.hubs) link.send(bye_message());
}

// --- the end

// The second hub leaves it to the first for a while: one of them speaks.
void WatchdogThread::judge_all(std::int64_t now) {
  const auto verdict = judge(job_.hub->views(), now, times(), compared_);
  if (!verdict) return;
  if (suspected_ == 0) suspected_ = now;
  if (job_.rank == 0 || now - suspected_ > second_hub_waits) end_job(*verdict);
}

// What this rank knows of itself. A hub that lives would have decided by now.
void WatchdogThread::judge_alone(std::int64_t now) {
  const bool connected = !job_.hubs.empty() || job_.hub;
  WatchTimes t = times();
  t.patience = connected ? alone_waits : 0;
  t.grace = connected ? lost_grace + alone_waits : 0;
  std::uint64_t nothing_compared = 0;
  if (const auto verdict = judge({own_view()}, now, t, nothing_compared)) end_job(*verdict);
}

void WatchdogThread::end_job(const Verdict& verdict) {
  if (job_.hub) job_.hub->tell_all(end_message(verdict));
  signal_ranks(verdict.silent, SIGCONT);
  std::string text = "nsa: error: " + verdict.message;
  if (!set_.path.empty()) text += fmt::format("; last operations: {}.rank*.ops.json", set_.path);
  run_beside([text, path = set_.path, rank = job_.rank, json = own_json(verdict.message)] {
    write_to_stderr(text + "\n");
    save_operations(path, rank, json);
  });
  for (const std::int64_t until = coarse_now() + end_waits;
       job_.hub && job_.hub->hears_anyone() && coarse_now() < until;) {
    wait(s / 10);
    job_.hub->listen(coarse_now());
  }
  save_for_others(verdict.message);
  std::vector<int> stuck = verdict.silent;  // whoever has said goodbye ends by itself, with the right code
  std::erase_if(stuck, [&](int r) {
    return job_.hub && job_.hub->views()[static_cast<std::size_t>(r)].state == RankView::State::left;
  });
  signal_ranks(stuck, SIGKILL);
  _exit(static_cast<int>(ExitCode::communication));
}

void WatchdogThread::obey(const Verdict& verdict, Link& judge) {
  signal_ranks(verdict.silent, SIGCONT);
  run_beside(
      [path = set_.path, rank = job_.rank, json = own_json(verdict.message)] { save_operations(path, rank, json); });
  leave();
  // The one that judged goes first: the launcher may end all at the first that goes, and it has to say why.
  for (const std::int64_t until = coarse_now() + end_waits + s; judge.open() && coarse_now() < until;) {
    wait_readable(judge, 0.1);
    judge.pump();
  }
  if (signal_ranks(verdict.silent, 0)) usleep(500'000);  // it ends by itself if it can
  signal_ranks(verdict.silent, SIGKILL);
  _exit(static_cast<int>(ExitCode::communication));
}

std::string WatchdogThread::own_json(const std::string& verdict) {
  RankView view = own_view();
  view.take(recent_operations());
  return operations_json(view, coarse_now(), verdict);
}

// What those that cannot report have told before.
void WatchdogThread::save_for_others(const std::string& verdict) {
  if (!job_.hub) return;
  std::vector<std::pair<int, std::string>> list;
  for (const RankView& view : job_.hub->views())
    if (view.rank != job_.rank && view.state != RankView::State::left)
      list.emplace_back(view.rank, operations_json(view, view.told + coarse_now() - view.heard, verdict));
  run_beside([path = set_.path, list] {
    for (const auto& [rank, json] : list) save_operations(path, rank, json);
  });
}

// Those of this machine. Whether any was there.
bool WatchdogThread::signal_ranks(const std::vector<int>& ranks, int which) const {
  bool any = false;
  for (const int r : ranks)
    if (r >= 0 && r < std::ssize(job_.places) && r != job_.rank)
      any |= signal_process(job_.places[static_cast<std::size_t>(r)], which);
  return any;
}

}  // namespace nsa
