#include "nsa/experiment/plan.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <tuple>
#include <utility>

#include "kernels/diagnostics/error.hpp"
#include "kernels/diagnostics/json.hpp"
#include "nsa/config/parts.hpp"
#include "nsa/experiment/experiment.hpp"
#include "nsa/tasks/needle_task.hpp"

namespace nsa {
namespace {

constexpr int listed_ranks = 64;  // owners of more ranks are joined where they own equally many blocks

Point longest_point(const Config& config) {
  const std::vector<Point> points = sweep(config);
  return *std::ranges::max_element(points, {}, &Point::longest);
}

std::int64_t owned_blocks(const Partition& p, std::int64_t positions) {
  const std::int64_t blocks = eligible_blocks(p.shape.rules, positions - 1);
  if (p.kv == 1) return blocks;
  std::int64_t owned = 0;
  const std::int64_t chunk = p.chunk_tokens / p.shape.rules.l_sel,
                     chunks = owned_chunks(p.tokens(false), positions, p.kv_rank);
  for (std::int64_t i = 0; i < chunks; ++i) owned += std::min(chunk, blocks - (i * p.kv + p.kv_rank) * chunk);
  return owned;
}

std::vector<PlannedOwners> plan_owners(const Config& config, const Point& point, int ranks) {
  const std::int64_t positions = total_positions(config, point);
  std::vector<PlannedOwners> owners;
  for (int rank = 0; rank < ranks; ++rank) {
    const Partition p = make_partition(config, point, ranks, rank);
    const std::int64_t blocks = owned_blocks(p, positions);
    const bool joined = !owners.empty() && owners.back().head_shard == p.head_shard && owners.back().blocks == blocks &&
                        (ranks > listed_ranks || blocks == 0);
    if (joined)
      ++owners.back().ranks;
    else
      owners.push_back(
          {rank, 1, p.head_shard, p.kv_rank, p.group_begin, p.shape.groups, p.shape.heads_per_group, blocks});
  }
  return owners;
}

bool same(const MemoryAccount& a, const MemoryAccount& b) { return a.peak == b.peak && a.total_peak == b.total_peak; }

/// Head shards hold equally many groups, so the ranks of the first one stand for all.
std::vector<PlannedMemory> plan_memory(const Config& config, const Backend& backend, const Point& point,
                                       const Plan& plan) {
  std::vector<PlannedMemory> memory;
  std::vector<MemoryAccount> of_kv_rank;
  for (int k = 0; k < plan.kv; ++k)
    of_kv_rank.push_back(planned_memory(backend, config, make_partition(config, point, plan.ranks, k), point));
  for (int rank = 0; rank < plan.ranks; ++rank) {
    const MemoryAccount& account = of_kv_rank[static_cast<std::size_t>(rank % plan.kv)];
    if (!memory.empty() && same(memory.back().account, account))
      ++memory.back().ranks;
    else
      memory.push_back({rank, 1, account});
  }
  return memory;
}

std::vector<Exchange> plan_exchanges(const Config& config, const Point& point, int ranks) {
  std::vector<Exchange> list;
  if (config.kind != TaskKind::needle) {
    for (const Part& part : parts_of(config, point))
      std::ranges::move(exchanges(part.config, make_partition(part.config, part.point, ranks, 0), part.point),
                        std::back_inserter(list));
    return list;
  }
  const Config step = needle_config(config);
  const Point at = needle_point(point);
  return exchanges(step, make_partition(step, at, ranks, 0), at);
}

/// The setting that gives every one of `ranks` ranks a block, of `blocks` a sequence; "" if there is none.
std::string layout_for_all(const Config& config, int ranks, std::int32_t kv, std::int64_t blocks, std::int64_t chunk) {
  if (blocks >= kv) return fmt::format("parallel.kv_chunk_blocks = {}", blocks / kv);
  const std::int64_t groups = config.model.n_kv_groups;
  for (std::int64_t heads = 1; heads <= groups; ++heads) {
    if (groups % heads != 0 || ranks % heads != 0 || ranks / heads > blocks) continue;
    return fmt::format("parallel.heads = {}, parallel.kv = {}, parallel.kv_chunk_blocks = {}", heads, ranks / heads,
                       std::max<std::int64_t>(1, std::min(chunk, blocks * heads / ranks)));
  }
  return "";
}

}  // namespace

std::int64_t idle_kv_ranks(const Config& config, const Point& point, std::int64_t kv, std::int64_t blocks) {
  const std::int64_t chunk = kv_chunk_blocks(config, point);
  return std::max<std::int64_t>(0, kv - (blocks + chunk - 1) / chunk);
}

std::vector<Point> planned_points(const Config& config) {
  std::vector<Point> points = sweep(config);
  const auto is_other = [&](const Point& point) { return point.force_branch != points.front().force_branch; };
  points.erase(std::ranges::find_if(points, is_other), points.end());
  return points;
}

std::string idle_ranks(const Config& config, int ranks) {
  if (config.kind == TaskKind::kernels) return "";
  const Point point = longest_point(config);
  const std::int64_t positions = total_positions(config, point);
  const Partition p = make_partition(config, point, ranks, 0);
  const std::int64_t blocks = eligible_blocks(p.shape.rules, positions - 1), chunk = kv_chunk_blocks(config, point);
  const std::int64_t idle = idle_kv_ranks(config, point, p.kv, blocks);
  if (idle == 0) return "";
  const std::string layout = layout_for_all(config, ranks, p.kv, blocks, chunk);
  return fmt::format("{} of {} kv ranks own no block of the {} positions ({} blocks in chunks of {}); {}", idle, p.kv,
                     positions, blocks, chunk,
                     layout.empty()
                         ? fmt::format("use at most {} ranks, or a longer context", config.model.n_kv_groups * blocks)
                         : layout + " would use them all");
}

PlanningBackend planning_backend(const Config& config, const Machine* machine) {
  const bool given = machine && machine->gpu;
  if (config.run.backend != BackendChoice::host && cuda_built() && !given) {
    try {
      return {open_backend(BackendKind::cuda, 0), ""};
    } catch (const UserError&) {
      // no device here
    }
  }
  if (config.run.backend != BackendChoice::cuda) return {open_backend(BackendKind::host, 0), ""};
  const PlannedGpu gpu = given ? *machine->gpu : PlannedGpu();
  return {planned_backend(gpu),
          fmt::format("compute capability {}.{}, {} SMs ({})", gpu.capability / 10, gpu.capability % 10, gpu.sms,
                      given ? machine->path : "an H200; --advise MACHINE plans for another")};
}

Plan make_plan(const Config& config, const PlanningBackend& planning, int ranks) {
  Plan plan;
  plan.ranks = ranks;
  std::tie(plan.heads, plan.kv) = factorise(config, ranks);
  route_environment();  // throws where a variable has a value that is not allowed
  const Backend& backend = planning.backend;
  plan.backend = backend.kind;
  plan.gpu = planning.gpu;
  plan.longest = longest_point(config);
  plan.positions = total_positions(config, plan.longest);
  plan.kv_chunk_blocks = kv_chunk_blocks(config, plan.longest);
  plan.owners = plan_owners(config, plan.longest, ranks);
  plan.idle = idle_ranks(config, ranks);
  for (const Point& point : planned_points(config))
    plan.points.push_back({point, plan_memory(config, backend, point, plan), plan_exchanges(config, point, ranks),
                           planned_routes(backend, config, point, ranks)});
  return plan;
}

namespace {

Json owners_json(const PlannedOwners& o) {
  return {{"first_rank", o.first},
          {"ranks", o.ranks},
          {"head_shard", o.head_shard},
          {"first_kv_rank", o.kv_rank},
          {"first_group", o.group_begin},
          {"groups", o.groups},
          {"first_head", o.group_begin * o.heads_per_group},
          {"heads", o.groups * o.heads_per_group},
          {"blocks_each", o.blocks}};
}

Json memory_json(const PlannedMemory& m) {
  Json memory{{"first_rank", m.first}, {"ranks", m.ranks}};
  for (std::size_t kind = 0; kind < memory_kind_names.size(); ++kind)
    memory[memory_kind_names[kind]] = m.account.peak[kind];
  memory["peak"] = m.account.total_peak;
  return memory;
}

Json exchange_json(const Exchange& e) {
  return {{"name", e.name}, {"collective", e.collective}, {"ranks", e.ranks}, {"bytes", e.bytes}};
}

Json route_json(const PlannedRoute& r) {
  return {{"phase", phase_names[static_cast<int>(r.phase)]},
          {"branch", branch_names[r.branch]},
          {"device", r.device},
          {"implementation", r.name},
          {"reason", r.reason},
          {"fallback", r.fallback}};
}

Json point_json(const PlannedPoint& p) {
  return {{"context", p.point.context},
          {"batch", p.point.batch},
          {"memory", json_list(p.memory, memory_json)},
          {"exchanges", json_list(p.exchanges, exchange_json)},
          {"routes", json_list(p.routes, route_json)}};
}

}  // namespace

std::string plan_json(const Plan& plan, const std::string& advice) {
  Json document{{"ranks", plan.ranks},
                {"heads", plan.heads},
                {"kv", plan.kv},
                {"kv_chunk_blocks", plan.kv_chunk_blocks},
                {"positions", plan.positions},
                {"workspace_of", plan.backend == BackendKind::cuda ? "cuda" : "host"},
                {"gpu", plan.gpu},
                {"warning", plan.idle},
                {"owners", json_list(plan.owners, owners_json)},
                {"points", json_list(plan.points, point_json)}};
  if (!advice.empty()) document["advice"] = Json::parse(advice);
  return json_text(document, 2) + "\n";
}

}  // namespace nsa
