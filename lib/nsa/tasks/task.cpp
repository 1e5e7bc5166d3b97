#include "nsa/tasks/task.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

namespace nsa {

void fail_where(const ControlComm& world, const std::string& problem, PointRecord& record) {
  const std::vector<std::string> problems = world.gather(problem);
  for (std::size_t r = 0; r < problems.size(); ++r)
    if (!problems[r].empty()) record.fail("rank " + std::to_string(r) + ": " + problems[r]);
}

void keep_records(const ControlComm& world, ModelShard& e, const TensorSource& source, const CheckResult& checked,
                  StepTensors* tensors, std::int64_t positions, PointRecord& record) {
  if (e.config.run.check) {
    record.max_abs_err = std::max(record.max_abs_err, world.max(checked.max_abs_err));
    for (const std::string& problem : world.gather(checked.problem)) record.fail(problem);
  }
  if (!tensors) return;
  const auto keep = [&](std::vector<TensorRecord> list) {
    std::ranges::move(list, std::back_inserter(record.tensors));
  };
  keep(input_tensors(e, source, world.rank() == 0));
  keep(tensors->reduce(world));
  keep(compressed_tensors(e, positions, world));
}

void finish_point(const ControlComm& world, ModelShard& e, const Samples& samples, PointRecord& record) {
  record.warmup_reps = e.config.run.warmup;
  record.time = gather_times(world, samples);
  const Phase phase = e.config.kind == TaskKind::prefill ? Phase::prefill : Phase::decode;
  e.routes.agree(world);
  e.routes.count(world);
  for (const Branch c : kv_column_order) {
    record.routes[c] = e.routes.of(phase, c).kernel->name;
    record.route_reasons[c] = e.routes.of(phase, c).reason;
    record.route_kernels[c] = fmt::format("{}", fmt::join(e.routes.of(phase, c).ran, ", "));
  }
  record.exchange = (e.partition.kv > 1 ? e.comms->kv : e.comms->heads).transport();
  record.fallbacks = e.routes.fallbacks(phase);
}

}  // namespace nsa
