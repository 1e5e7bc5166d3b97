#include "comm/watchdog/watchdog.hpp"

#include <fmt/format.h>

#include <chrono>
#include <thread>
#include <utility>

#include "comm/watchdog/watchdog_thread.hpp"
#include "kernels/diagnostics/fault_injection.hpp"
#include "kernels/diagnostics/operation_log.hpp"

namespace nsa {

Watchdog::Watchdog(double deadline, double startup_deadline)
    : thread_(std::make_unique<WatchdogThread>(deadline, startup_deadline)) {}
Watchdog::~Watchdog() = default;

std::string Watchdog::join(const ControlComm& world) {
  const int rank = world.rank(), last = world.size() - 1;
  const std::vector<ProcessId> processes = all_process_ids(world);
  const std::string token = world.broadcast(rank == 0 ? new_token() : std::string());
  fault::at("watchdog.join");
  std::string own_endpoint;
  WatchdogJob job{rank, processes, nullptr, {}};
  if (rank == 0 || rank == last) {
    std::vector<std::string> hosts;
    for (const ProcessId& process : processes) hosts.push_back(process.host);
    FileDescriptor listener;
    own_endpoint = open_monitor_port(processes, listener);
    job.monitor = std::make_unique<Monitor>(std::move(listener), token, rank, hosts);
  }
  thread_->update([&](WatchdogSettings&, WatchdogJob& pending) { pending = std::move(job); });
  std::string unreachable;
  for (const int monitor : {0, last}) {
    const std::string endpoint = world.broadcast(own_endpoint, monitor);
    if (monitor == rank) continue;
    const ProcessId& own = processes[static_cast<std::size_t>(rank)];
    const ProcessId& other = processes[static_cast<std::size_t>(monitor)];
    Connection connection = connect_to_monitor(endpoint, own.machine == other.machine, token, rank);
    if (!connection.is_open())
      unreachable =
          fmt::format("rank {} ({}) cannot reach the watchdog of rank {} ({})", rank, own.host, monitor, other.host);
    thread_->update(
        [&](WatchdogSettings&, WatchdogJob& pending) { pending.connections.push_back(std::move(connection)); });
  }
  const bool any_unreachable = world.max(std::int64_t{!unreachable.empty()}) > 0;  // all ranks have tried by now
  thread_->update([](WatchdogSettings& settings, WatchdogJob&) { settings.all_joined = true; });
  if (!any_unreachable) return {};
  for (const std::string& text : world.gather(unreachable))
    if (!text.empty()) return text + "; a hang will still end the job, but the message may name the wrong rank";
  return {};
}

void Watchdog::configure(double deadline, const std::string& result_path) {
  thread_->update([&](WatchdogSettings& settings, WatchdogJob&) {
    settings.deadline = static_cast<std::int64_t>(deadline * ns_per_second);
    settings.result_path = result_path;
  });
}

void Watchdog::set_device(const std::string& name) {
  thread_->update([&](WatchdogSettings& settings, WatchdogJob&) { settings.device = name; });
}

void Watchdog::report_failure(const std::string& message) {
  bool on = false;
  thread_->update([&](WatchdogSettings& settings, WatchdogJob&) {
    settings.failure = message;
    on = settings.deadline > 0;
  });
  if (on) std::this_thread::sleep_for(std::chrono::nanoseconds(failure_timeout));
}

void Watchdog::notify_abort(ExitCode code) {
  thread_->update([&](WatchdogSettings& settings, WatchdogJob&) {
    settings.abort_at = coarse_now();
    settings.abort_code = code;
  });
}

}  // namespace nsa
