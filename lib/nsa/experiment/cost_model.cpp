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

/// How a step runs attention. fused: one launch, which over kv ranks exchanges by itself; sharded: several.
enum class Plan { staged, fused, sharded };

/// Given selections are attended stage by stage. One launch over kv ranks is priced where one was measured, or nothing
/// else was.
Plan plan_of(const PhaseCost& cost, const Config& config, const Partition& partition) {
  if (!cost.fused || config.kind != TaskKind::decode || replays(config)) return Plan::staged;
  if (partition.kv == 1) return Plan::fused;
  const bool priced = cost.exchange.known() || !cost.launches.known();
  return priced && may_run_in_one_launch(partition.kv) ? Plan::fused : Plan::sharded;
}

/// Modelled bytes of the first rank without exchanges.
double own_bytes(Plan plan, const Config& config, const Partition& partition, const Point& point) {
  PointRecord record;
  record.parameters = parameters(config, point);
  record.heads = partition.heads;
  record.kv = partition.kv;
  record.bytes = modelled_bytes(config, partition, point);
  if (plan == Plan::fused) return fused_step_bytes(record, 0);
  if (plan == Plan::sharded) return sharded_step_bytes(record, 0);
  return static_cast<double>(record.bytes[static_cast<std::size_t>(Stage::step)] -
                             record.bytes[static_cast<std::size_t>(Stage::comm)]);
}

/// One exchange of one layer. An all-reduce is a reduce-scatter and an all-gather. Between nodes each node receives
/// what other nodes hold through one link a rank, and waits one latency for each doubling of nodes.
double exchange_time(const Machine& machine, const ExchangeCost& cost, const Exchange& e, const Partition& partition) {
  const std::int64_t stride = e.name == "outputs" ? partition.kv : 1;  // between the ranks that exchange
  const bool one_node = std::int64_t{partition.heads} * partition.kv <= machine.node;
  const double ranks = e.ranks, bytes = static_cast<double>(e.bytes), passes = e.collective == "all_reduce" ? 2 : 1;
  const double inside =
      one_node ? ranks : static_cast<double>(std::clamp<std::int64_t>(machine.node / stride, 1, e.ranks));
  const double received = passes == 2 ? 2 * bytes * (ranks - 1) / ranks : bytes * (ranks - 1);
  const double time = cost.fixed + passes * (inside - 1) * cost.rank + per(received, cost.bandwidth);
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
  const Plan plan = plan_of(cost, config, partition);
  const ExchangeCost& exchange = plan == Plan::sharded && cost.launches.known() ? cost.launches : cost.exchange;
  double exchanged = 0;
  for (const Exchange& e : exchanges(config, partition, point, plan == Plan::fused))
    exchanged += exchange_time(machine, exchange, e, partition);
  const std::int64_t last = total_positions(config, point) - 1;
  const double blocks =
      plan == Plan::staged ? 0 : static_cast<double>(eligible_blocks(partition.shape.rules, last)) / partition.kv;
  return {{layers * cost.fixed, per(own_bytes(plan, config, partition, point), cost.bandwidth),
           per(modelled_flops(config, partition, point), cost.arithmetic), layers * blocks * cost.block,
           layers * exchanged}};
}

}  // namespace nsa
