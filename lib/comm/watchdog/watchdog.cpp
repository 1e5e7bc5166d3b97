#include "comm/watchdog/watchdog.hpp"

#include <fmt/format.h>

#include <chrono>
#include <thread>
#include <utility>

#include "comm/watchdog/watchdog_thread.hpp"
#include "kernels/diagnostics/operation_log.hpp"

namespace nsa {

Watchdog::Watchdog(double deadline) : thread_(std::make_unique<WatchdogThread>(deadline)) {}
Watchdog::~Watchdog() = default;

std::string Watchdog::join(const ControlComm& world) {
  const int rank = world.rank(), last = world.size() - 1;
  const std::vector<Place> places = all_places(world);
  const std::string token = world.broadcast(rank == 0 ? new_token() : std::string());
  std::string address;
  WatchJob arrival{rank, places, nullptr, {}};
  if (rank == 0 || rank == last) {
    std::vector<std::string> hosts;
    for (const Place& place : places) hosts.push_back(place.host);
    Descriptor listener;
    address = open_hub(places, listener);
    arrival.hub = std::make_unique<Hub>(std::move(listener), token, rank, hosts);
  }
  thread_->change([&](WatchSettings&, WatchJob& arrived) { arrived = std::move(arrival); });
  std::string missed;
  for (const int hub : {0, last}) {
    const std::string where = world.broadcast(address, hub);
    if (hub == rank) continue;
    const Place& own = places[static_cast<std::size_t>(rank)];
    const Place& other = places[static_cast<std::size_t>(hub)];
    Link link = join_hub(where, own.machine == other.machine, token, rank);
    if (!link.open())
      missed = fmt::format("rank {} ({}) does not reach the watchdog of rank {} ({})", rank, own.host, hub, other.host);
    thread_->change([&](WatchSettings&, WatchJob& arrived) { arrived.hubs.push_back(std::move(link)); });
  }
  const bool any_missed = world.max(std::int64_t{!missed.empty()}) > 0;  // all have tried by now
  thread_->change([](WatchSettings& settings, WatchJob&) { settings.all_joined = true; });
  if (!any_missed) return {};
  for (const std::string& text : world.gather(missed))
    if (!text.empty()) return text + "; a hang will still end the job, but may be laid to the wrong rank";
  return {};
}

void Watchdog::set(double deadline, const std::string& result_path) {
  thread_->change([&](WatchSettings& settings, WatchJob&) {
    settings.deadline = static_cast<std::int64_t>(deadline * ns_a_second);
    settings.path = result_path;
  });
}

void Watchdog::set_device(const std::string& name) {
  thread_->change([&](WatchSettings& settings, WatchJob&) { settings.device = name; });
}

void Watchdog::fail(const std::string& message) {
  bool on = false;
  thread_->change([&](WatchSettings& settings, WatchJob&) {
    settings.failure = message;
    on = settings.deadline > 0;
  });
  if (on) std::this_thread::sleep_for(std::chrono::nanoseconds(failure_ends_job_within));
}

void Watchdog::aborting(ExitCode code) {
  thread_->change([&](WatchSettings& settings, WatchJob&) {
    settings.abort_at = coarse_now();
    settings.abort_code = code;
  });
}

}  // namespace nsa
