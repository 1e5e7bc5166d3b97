#include "nsa/tasks/task.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

namespace nsa {

void gather_problems(const ControlComm& world, const std::string& problem, PointRecord& record) {
  const std::vector<std::string> problems = world.gather(problem);
  for (std::size_t r = 0; r < problems.size(); ++r)
    if (!problems[r].empty()) record.fail("rank " + std::to_string(r) + ": " + problems[r]);
}

double keep_records(const ControlComm& world, ModelShard& shard, const TensorSource& source, const CheckResult& checked,
                    StepTensors* tensors, const std::vector<std::int64_t>& ends, PointRecord& record) {
  if (shard.config.run.check) {
    record.max_abs_err = std::max(record.max_abs_err, world.max(checked.max_abs_err));
    for (const std::string& problem : world.gather(checked.problem)) record.fail(problem);
  }
  const double scale = shard.config.run.check ? world.max(checked.scale) : 0;
  if (!tensors) return scale;
  const bool all = shard.config.output.tensors;
  const auto keep = [&](std::vector<TensorRecord> list) {
    std::ranges::move(list, std::back_inserter(record.tensors));
  };
  if (all) keep(input_tensors(shard, source, world.rank() == 0));
  keep(tensors->reduce(world));
  if (all) keep(compressed_tensors(shard, ends, world));
  return scale;
}

void record_shared(const ControlComm& world, const SharedBlocks& shared, PointRecord& record) {
  SharedBlocks all;
  const std::vector<double> ranks = world.gather(std::vector{shared.shares, shared.pairs});
  for (std::size_t i = 0; i < ranks.size(); i += 2) all.shares += ranks[i], all.pairs += ranks[i + 1];
  if (all.pairs > 0) record.blocks_shared = all.mean();
}

void record_reads(const ControlComm& world, const RankReads& reads, const std::vector<std::int64_t>& totals,
                  PointRecord& record) {
  record.reads = gather_reads(world, reads);
  if (world.rank() == 0) record.fail(read_problem(record.reads, totals));
}

namespace {

PageRecord gather_pages(const ControlComm& world, const ModelShard& shard) {
  const LayerShape& s = shard.shape();
  const std::int64_t row_bytes = (s.d_k + s.d_v) * static_cast<std::int64_t>(size_of(s.dtype));
  PageRecord record;
  record.caches = {"sel", "cmp"};
  record.ranks = world.size();
  const auto column = [&](const auto& value_of) {
    const std::vector<std::int64_t> ranks =
        world.gather(std::vector<std::int64_t>{value_of(shard.pages->sel), value_of(shard.pages->cmp)});
    std::vector<std::int64_t> values(ranks.size());
    for (std::size_t i = 0; i < ranks.size(); ++i) values[i % 2 * ranks.size() / 2 + i / 2] = ranks[i];
    return values;
  };
  record.rows = column([](const PageLayout& p) { return std::int64_t{p.rows}; });
  record.pages = column([](const PageLayout& p) { return p.count; });
  record.entries = column([](const PageLayout& p) { return p.used(); });
  record.shared = column([](const PageLayout& p) { return p.shared; });
  record.bytes = column([&](const PageLayout& p) { return p.count * p.rows * s.groups * row_bytes; });
  return record;
}

}  // namespace

RouteRecord agreed_routes(const ControlComm& world, ModelShard& shard, Phase phase) {
  shard.routes.agree(world);
  shard.routes.count(world);
  RouteRecord record;
  for (const Branch c : kv_column_order) {
    const Route& route = shard.routes.of(phase, c);
    record.routes[c] = route.kernel->name;
    record.reasons[c] = route.reason;
    if (shard.shape().precision_of(c) == KvPrecision::fp8_rounded)
      record.reasons[c] += fmt::format("; FP8 values in {} rows, which more kernels read than FP8 rows (ROUTES.md)",
                                       name_of(shard.shape().dtype));
    record.kernels[c] = fmt::format("{}", fmt::join(route.ran, ", "));
  }
  return record;
}

void finish_point(const ControlComm& world, ModelShard& shard, const Samples& samples, PointRecord& record) {
  record.warmup_reps = shard.config.run.warmup;
  record.time = gather_times(world, samples);
  record.noise = gather_noise(world, shard.device(), samples.modes, samples.noise);
  const Phase phase = shard.config.kind == TaskKind::prefill ? Phase::prefill : Phase::decode;
  RouteRecord ran = agreed_routes(world, shard, phase);
  record.routes = std::move(ran.routes);
  record.route_reasons = std::move(ran.reasons);
  record.route_kernels = std::move(ran.kernels);
  record.exchange = (shard.partition.kv > 1 ? shard.comms->kv : shard.comms->heads).transport();
  record.fallbacks = shard.routes.fallbacks(phase);
  if (shard.pages) record.pages = gather_pages(world, shard);
}

}  // namespace nsa
