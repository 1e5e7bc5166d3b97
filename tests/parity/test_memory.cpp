// Memory is linear in the context, as planned, and within the stated limit.

#include "catch.hpp"
#include "nsa/experiment/experiment.hpp"

using namespace nsa;

namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr bool keeps_freed_memory = true;  // AddressSanitizer, to find uses of it
#else
constexpr bool keeps_freed_memory = false;
#endif

Config config_of(const char* kind, const std::vector<std::string>& more = {}) {
  std::vector<std::string> overrides = {"run.steps=2", "run.warmup=1", "model.n_heads=8", "run.backend=host"};
  overrides.insert(overrides.end(), more.begin(), more.end());
  return parse_config("[task]\nkind = \"" + std::string(kind) + "\"\n", "memory.toml", overrides);
}

double planned_bytes(const Config& config, std::int64_t context, int ranks) {
  const Point point{context, 1, -1};
  const Partition partition = make_partition(config, point, ranks, 0);
  return static_cast<double>(planned_memory(open_backend(BackendKind::host, 0), config, partition, point).total_peak);
}

}  // namespace

TEST_CASE("planned memory grows no faster than the context") {
  for (const char* kind : {"prefill", "decode"})
    for (const int ranks : {1, 2, 8}) {
      const Config config = config_of(kind);
      for (std::int64_t context = 1 << 16; context < 1 << 22; context *= 4) {
        CAPTURE(kind, ranks, context);
        // Twice the context: at most twice the bytes. A buffer of T^2 elements would make it four times.
        CHECK(planned_bytes(config, 2 * context, ranks) <= 2.0 * planned_bytes(config, context, ranks));
        CHECK(planned_bytes(config, 2 * context, ranks) >= 1.5 * planned_bytes(config, context, ranks));
      }
    }
}

TEST_CASE("FP8 caches take half the memory of bf16 caches") {
  for (const int ranks : {1, 2}) {
    const auto caches = [&](const std::vector<std::string>& more) {
      const Config config = config_of("decode", more);
      const Point point{1 << 20, 1, -1};
      const Partition partition = make_partition(config, point, ranks, 0);
      const MemoryAccount planned = planned_memory(open_backend(BackendKind::host, 0), config, partition, point);
      return static_cast<double>(planned.peak[static_cast<int>(MemoryKind::caches)]);
    };
    const double same = caches({}), fp8 = caches({"model.kv_precision=fp8_e4m3", "model.cmp_precision=fp8_e4m3"});
    CHECK(fp8 <= (64.0 + 1) / 128 * same * 1.01);  // 64 values and a scale
    CHECK(fp8 >= 0.5 * same);
  }
}

// Runs on any number of ranks and compares the memory of each with its plan.
TEST_CASE("64K tokens take the memory that was planned, under 4 GiB") {
  const ControlComm world = ControlComm::world();
  const std::vector<std::vector<std::string>> inputs = {
      {"prefill"}, {"decode"}, {"prefill", "run.prefix=49152", "run.prefill_chunk=4096", "run.fill=synthetic"}};
  for (const std::vector<std::string>& input : inputs) {
    std::vector<std::string> more = {"run.modes=[\"total\"]", "run.steps=1", "run.warmup=0", "run.check=false"};
    more.insert(more.end(), input.begin() + 1, input.end());
    const Config config = config_of(input[0].c_str(), more);
    CAPTURE(input[0], config.run.prefix);
    const Session session = open_session(config, world);
    const PointRecord record = run_point(session, config, {(1 << 16) - config.run.prefix, 1, -1}, 0,
                                         [](double, double, const std::string&) {});
    CHECK(record.valid);
    if (world.rank() != 0) continue;
    CHECK(record.memory.measured_peak == record.memory.planned);
    for (int rank = 0; rank < world.size(); ++rank) {
      const auto total = record.memory.planned.size() - static_cast<std::size_t>(world.size() - rank);
      const double planned = static_cast<double>(record.memory.planned.at(total));
      const double resident = static_cast<double>(record.memory.process_peak.at(static_cast<std::size_t>(rank)));
      CAPTURE(rank);
      if (!keeps_freed_memory) CHECK(resident <= 1.10 * planned);
      // kv ranks hold window and raw rows at their positions, and touch none of the prefix.
      const bool touches_all = config.run.prefix == 0 || world.size() == 1;
      if (!keeps_freed_memory && touches_all) CHECK(resident >= 0.90 * planned);
      CHECK(resident < 4.0 * (std::int64_t{1} << 30));
    }
  }
}
