#include <optional>

#include "kernels/diagnostics/operation_log.hpp"
#include "nsa/tasks/measure.hpp"
#include "nsa/tasks/prefill_passes.hpp"
#include "nsa/tasks/task.hpp"

namespace nsa {

MemoryAccount run_prefill(const Session& session, const Config& config, const Point& point, const TensorSource& source,
                          PointRecord& record, const Progress& progress) {
  const ControlComm& world = session.world;
  const PhaseScope phase("prefill");
  const bool records = config.records();
  std::optional<ModelShard> shard;
  agreed(world, [&] { shard.emplace(session.backend, world, config, point, source); });
  if (config.run.prefix > 0) fill_caches(session, *shard, source, config.run.prefix, progress);
  std::optional<PrefillRunner> prefill;
  std::optional<PrefillPasses> passes;
  agreed(world, [&] {
    prefill.emplace(*shard, prefill_range(config, point), records);
    passes.emplace(session, *shard, *prefill, source, record);
    passes->load();
  });
  if (config.run.prefix == 0) shard->connect(*session.grid);
  prefill->snapshot();
  prefill->watch([&](double done) { progress(done, 1, "checking"); });
  if (records) passes->recorded();
  prefill->watch(nullptr);  // no callbacks within timed work

  const MeasuredTask task{
      [] {},
      [&](const ModeRun& run, StageTimer& timer, const TakeSample& take) { return passes->measured(run, timer, take); },
      [&] { return shard->routes.agree(world); }};
  const Samples samples = measure_point(session, *shard, task, record, progress);
  record.reads.nsa_vibe.push_back(nsa_vibe_reads(config.nsa, total_positions(config, point) - 1));
  record.first_position = config.run.prefix;
  finish_point(world, *shard, samples, record);
  return shard->account;
}

}  // namespace nsa
