#include "nsa/experiment/cost_model.hpp"

#include <algorithm>
#include <cmath>

#include "kernels/diagnostics/error.hpp"
#include "nsa/model/selections.hpp"
#include "nsa/model/traffic.hpp"
#include "nsa/report/metrics.hpp"

namespace nsa {
namespace {

double per(double amount, double rate) { return rate > 0 ? amount / rate : 0; }

/// Given selections are attended stage by stage.
bool runs_fused(const PhaseCost& cost, const Config& config) {
  return cost.fused && config.kind == TaskKind::decode && !replays(config);
}

/// Modelled bytes of the first rank without exchanges.
double own_bytes(const PhaseCost& cost, const Config& config, const Partition& partition, const Point& point) {
  PointRecord record;
  record.parameters = parameters(config, point);
  record.heads = partition.heads;
  record.kv = partition.kv;
  record.bytes = modelled_bytes(config, partition, point);
  if (runs_fused(cost, config)) return fused_step_bytes(record, 0);
  return static_cast<double>(record.bytes[static_cast<std::size_t>(Stage::step)] -
                             record.bytes[static_cast<std::size_t>(Stage::comm)]);
}

/// One exchange of one layer. An all-reduce is a reduce-scatter and an all-gather. Between nodes each node receives
/// what other nodes hold through one link a rank, and waits one latency for each doubling of nodes.
double exchange_time(const Machine& machine, const PhaseCost& cost, const Exchange& e, const Partition& partition) {
  const std::int64_t stride = e.name == "outputs" ? partition.kv : 1;  // between the ranks that exchange
  const bool one_node = std::int64_t{partition.heads} * partition.kv <= machine.node;
  const double ranks = e.ranks, bytes = static_cast<double>(e.bytes), passes = e.collective == "all_reduce" ? 2 : 1;
  const double inside =
      one_node ? ranks : static_cast<double>(std::clamp<std::int64_t>(machine.node / stride, 1, e.ranks));
  const double received = passes == 2 ? 2 * bytes * (ranks - 1) / ranks : bytes * (ranks - 1);
  const double time =
      cost.exchange + passes * (inside - 1) * cost.exchange_rank + per(received, cost.exchange_bandwidth);
  const double nodes = std::ceil(ranks / inside);
  if (nodes == 1) return time;
  const double from_others = bytes * (passes == 2 ? 2 * (nodes - 1) / nodes : ranks - inside);
  return time + passes * std::ceil(std::log2(nodes)) * machine.network_latency +
         per(from_others / inside, machine.network_bandwidth);
}

}  // namespace

const PhaseCost& phase_cost(const Machine& machine, const Config& config) {
  const bool decode = config.kind == TaskKind::decode;
  if (!decode && config.kind != TaskKind::prefill)
    throw UserError("--advise is for task.kind = \"decode\" and \"prefill\" (others have no cost model); leave it out");
  const std::optional<PhaseCost>& cost = decode ? machine.decode : machine.prefill;
  const std::string name = decode ? "decode" : "prefill";
  if (!cost)
    throw UserError(machine.path + " says nothing of " + name + "; add [" + name +
                    "], which `nsa-analysis model RESULTS --machine FILE` writes");
  return *cost;
}

PredictedTime predict(const Machine& machine, const Config& config, const Partition& partition, const Point& point) {
  const PhaseCost& cost = phase_cost(machine, config);
  const double layers = static_cast<double>(config.model.layers);
  double exchanged = 0;
  for (const Exchange& e : exchanges(config, partition, point)) exchanged += exchange_time(machine, cost, e, partition);
  const std::int64_t last = total_positions(config, point) - 1;
  const double blocks =
      runs_fused(cost, config) ? static_cast<double>(eligible_blocks(partition.shape.rules, last)) / partition.kv : 0;
  return {{layers * cost.fixed, per(own_bytes(cost, config, partition, point), cost.bandwidth),
           per(modelled_flops(config, partition, point), cost.arithmetic), layers * blocks * cost.block,
           layers * exchanged}};
}

}  // namespace nsa
