// The operation log, which one thread writes and another reads, and watchdogs from their start to their end. The preset
// host-tsan builds these tests with ThreadSanitizer.

#include <atomic>
#include <cstring>
#include <thread>

#include "catch.hpp"
#include "comm/watchdog/watchdog.hpp"
#include "kernels/diagnostics/operation_log.hpp"
#include "nsa/forward/stage_timer.hpp"

namespace {

using namespace nsa;

const char* const names[] = {"zero", "one", "two"};

}  // namespace

TEST_CASE("a reader sees only complete operations while they are written", "[watchdog]") {
  const auto before = recent_operations();
  const std::uint64_t first = before.empty() ? 0 : before.back().index;
  std::atomic<bool> done = false, torn = false;
  std::atomic<std::uint64_t> seen = 0;
  std::thread reader([&] {
    while (!done) {
      for (const OperationRecord& o : recent_operations(first)) {
        const bool whole = o.bytes == o.index - first && std::strcmp(o.name, names[o.bytes % 3]) == 0 && o.begin > 0 &&
                           (o.end == 0 || o.end >= o.begin);
        if (!whole) torn = true;
        ++seen;
      }
    }
  });
  for (std::uint64_t i = 1; i <= 200000 || seen < 1000; ++i)
    const Operation operation(OperationKind::wait, names[i % 3], i, 5);
  done = true;
  reader.join();
  CHECK_FALSE(torn);
}

TEST_CASE("the log keeps the last 64 operations with phase, stage and number", "[watchdog]") {
  const PhaseScope phase("test");
  set_stage("outer");
  for (int i = 0; i < 100; ++i) {
    const Operation wait(OperationKind::wait, "device wait");
    CHECK(recent_operations().back().end == 0);
  }
  const std::uint64_t number = recent_operations().back().number;
  { const Operation gather(OperationKind::exchange, "all_gather", 96, 3, "lse"); }
  const auto kept = recent_operations();
  REQUIRE(kept.size() == operation_log_capacity);
  CHECK(std::string(kept[62].stage) == "outer");
  CHECK(kept[62].number == number);
  CHECK(kept[63].number == number + 1);
  CHECK(kept[63].bytes == 96);
  CHECK(std::string(kept[63].name) + kept[63].phase + kept[63].stage == "all_gathertestlse");
  CHECK(kept[63].end >= kept[63].begin);
  CHECK(recent_operations(kept[60].index).size() == 3);
}

TEST_CASE("a watchdog records the operations of a rank without disturbing them", "[watchdog]") {
  const ControlComm world = ControlComm::world();
  for (int round = 0; round < 3; ++round) {
    Watchdog watchdog(60);
    // No REQUIRE: a rank that ends the test alone would keep the others waiting and its message unprinted.
    CHECK(watchdog.join(world) == "");
    watchdog.configure(50, "");
    watchdog.set_device("GPU 0");
    const DeviceOps& device = *open_backend(BackendKind::host, 0).device;
    StageTimer timer(device, nullptr);
    timer.set_per_stage(true);
    for (int step = 0; step < 300; ++step) {
      double sum = 0;
      timer.step([&] { timer.time(Stage::comm, [&] { sum = world.max(static_cast<double>(world.rank())); }); });
      CHECK(sum == world.size() - 1);
      if (step % 100 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(400 * (1 + world.rank())));
    }
    world.barrier();
  }
}
