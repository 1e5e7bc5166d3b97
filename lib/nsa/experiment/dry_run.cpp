#include "nsa/experiment/dry_run.hpp"

#include <fmt/format.h>
#include <fmt/ostream.h>

#include <algorithm>

#include "kernels/diagnostics/error.hpp"
#include "nsa/config/parts.hpp"
#include "nsa/experiment/advise.hpp"
#include "nsa/experiment/experiment.hpp"
#include "nsa/experiment/plan.hpp"
#include "nsa/report/metrics.hpp"
#include "nsa/tasks/kernel_bench.hpp"
#include "nsa/tasks/measure.hpp"

namespace nsa {
namespace {

std::string span_text(std::int64_t first, std::int64_t count) {
  return count == 1 ? fmt::format("{}", first) : fmt::format("{}-{}", first, first + count - 1);
}

/// The selection blocks of the chunks that a rank owns: "0-3 8-11"; at most four chunks are listed.
std::string blocks_text(const Partition& p, std::int64_t positions) {
  const std::int64_t blocks = eligible_blocks(p.shape.rules, positions - 1);
  if (p.kv == 1) return span_text(0, blocks);
  const std::int64_t chunk_blocks = p.chunk_tokens / p.shape.rules.l_sel;
  const std::int64_t chunks = owned_chunks(p.tokens(false), positions, p.kv_rank);
  std::string text = chunks == 0 ? "none" : "";
  for (std::int64_t i = 0; i < std::min<std::int64_t>(chunks, 4); ++i) {
    const std::int64_t first = (i * p.kv + p.kv_rank) * chunk_blocks;
    if (i > 0) text += ' ';
    text += span_text(first, std::min(chunk_blocks, blocks - first));
  }
  return chunks > 4 ? text + fmt::format(" and {} chunks more", chunks - 4) : text;
}

void print_owners(std::ostream& out, const Config& config, const Plan& plan) {
  fmt::print(out, "{:>11} {:>10} {:>9} {:>10} {:>10}  {}\n", "rank", "head shard", "kv rank", "KV groups", "heads",
             fmt::format("blocks of {} tokens, of {} positions", config.nsa.l_sel, plan.positions));
  for (const PlannedOwners& o : plan.owners) {
    std::string blocks = blocks_text(make_partition(config, plan.longest, plan.ranks, o.first), plan.positions);
    if (o.ranks > 1 && o.blocks > 0) blocks = fmt::format("{} each, the first {}", o.blocks, blocks);
    fmt::print(out, "{:>11} {:>10} {:>9} {:>10} {:>10}  {}\n", span_text(o.first, o.ranks), o.head_shard,
               span_text(o.kv_rank, o.ranks), span_text(o.group_begin, o.groups),
               span_text(o.group_begin * o.heads_per_group, o.groups * o.heads_per_group), blocks);
  }
}

/// One line for neighbouring ranks that need the same amounts.
void print_memory(std::ostream& out, const PlannedPoint& point) {
  fmt::print(out, "{:>11}", "rank");
  for (const char* kind : memory_kind_names) fmt::print(out, " {:>12}", kind);
  fmt::print(out, " {:>12}\n", "peak");
  double sum = 0;
  int ranks = 0;
  for (const PlannedMemory& m : point.memory) {
    fmt::print(out, "{:>11}", span_text(m.first, m.ranks));
    for (const std::size_t bytes : m.account.peak) fmt::print(out, " {:>12}", bytes_text(static_cast<double>(bytes)));
    fmt::print(out, " {:>12}\n", bytes_text(static_cast<double>(m.account.total_peak)));
    sum += static_cast<double>(m.account.total_peak) * m.ranks;
    ranks += m.ranks;
  }
  if (ranks > 1) fmt::print(out, "{:>11} {:>64}\n", "all", bytes_text(sum));
}

void print_exchanges(std::ostream& out, const Config& config, const PlannedPoint& point) {
  const char* unit = config.kind == TaskKind::prefill ? "prefill" : "step";
  if (point.exchanges.empty()) fmt::print(out, "exchanges a {} and layer: none\n", unit);
  for (const Exchange& e : point.exchanges)
    fmt::print(out, "exchange a {} and layer: {:<14} {:<10} over {} ranks, {} from each\n", unit, e.name, e.collective,
               e.ranks, bytes_text(static_cast<double>(e.bytes)));
}

/// Ranks measure the copy rate before the points, so that its buffers are not among what a point needs.
void print_copy_rate_memory(std::ostream& out, const Config& config, int ranks) {
  const double bytes = 2.0 * static_cast<double>(copy_bytes_of(config.run.copy_bytes, 0, ranks));
  fmt::print(out, "before the points, the copy rate is measured with {} a rank where all ranks share one host\n",
             bytes_text(bytes));
}

/// Every rank measures every shape independently of the others.
void print_kernels_plan(std::ostream& out, const Config& config, const Backend& backend, int ranks) {
  const std::vector<Point> points = sweep(config);
  std::size_t most = 0;
  for (const Point& point : points)
    most = std::max(most, planned_memory(backend, config, make_partition(config, point, ranks, 0), point).total_peak);
  fmt::print(out, "plan: {} ranks, each measures {} shapes, {} at most at a time\n", ranks, points.size(),
             bytes_text(static_cast<double>(most)));
  print_copy_rate_memory(out, config, ranks);
  fmt::print(out, "result file: at most {}\n", bytes_text(static_cast<double>(planned_result_bytes(config, ranks))));
}

/// Repetitions of a mode that a point holds at most. No step is faster than 2 us.
double stored_reps(const Config& config, std::int64_t modes, std::int64_t ranks) {
  const double most = static_cast<double>(most_stored_reps(config, modes, ranks));
  return std::min(most, static_cast<double>(config.run.steps) + config.run.min_time / 2e-6);
}

/// Selections and tensors of a point.
double recorded_bytes(const Config& config, const Point& point) {
  const ModelConfig& m = config.model;
  const double positions = static_cast<double>(total_positions(config, point)),
               rows = config.kind == TaskKind::prefill ? static_cast<double>(point.context)
                                                       : static_cast<double>(config.run.steps * point.query_tokens);
  double total = 0;
  if (config.output.selection)
    total += 4.0 * (config.kind == TaskKind::kernels
                        ? static_cast<double>(kernel_rows(point) * point.kernel.blocks)
                        : static_cast<double>(point.batch * m.n_kv_groups * config.nsa.n_sel) * rows);
  if (!config.output.tensors) return total;
  const double heads = static_cast<double>(m.n_heads), groups = static_cast<double>(m.n_kv_groups);
  const double d_k = static_cast<double>(m.d_k), d_v = static_cast<double>(m.d_v), dim = static_cast<double>(m.dim);
  const double blocks = positions / config.nsa.l_sel + 1;
  const double weights = dim * (heads * (d_k + d_v) + 3 * groups * (d_k + d_v)) +
                         2.0 * static_cast<double>(config.phi_hidden + 2 * m.d_k) * config.nsa.l * (d_k + d_v);
  const double values_per_row = heads * (d_k + 4 * d_v) + dim + groups * (3 + blocks + config.nsa.n_sel) + 2;
  const double given_values = config.run.scope == Scope::layer ? dim : heads * d_k + 3 * groups * (d_k + d_v + 1);
  const double values_per_position = given_values + groups * (d_k + d_v) / config.nsa.d + 2;
  return total + 4.0 * (static_cast<double>(m.layers) * weights +
                        static_cast<double>(point.batch) * (rows * values_per_row + positions * values_per_position));
}

}  // namespace

std::size_t planned_result_bytes(const Config& config, int ranks) {
  double total = 1e5;  // attributes, the input, HDF5's metadata
  for (const Point& point : sweep(config)) {
    const auto modes = std::max<std::int64_t>(1, std::ssize(mode_runs(config, point)));
    const double reps = static_cast<double>(config.run.steps), stored = stored_reps(config, modes, ranks);
    total += 5e4 + 1e3 * ranks + 8.0 * stored +  // the coordinate rep, and samples and reads
             8.0 * ranks * (static_cast<double>(modes * stage_count) * stored + 2.0 * branches * reps);
    for (const Part& part : parts_of(config, point)) total += recorded_bytes(part.config, part.point);
  }
  return static_cast<std::size_t>(std::min(total, 9e18));
}

void print_plan(std::ostream& out, const Config& input, int ranks, const Machine* machine, std::string* json) {
  const Config config = machine ? on_machine(input, *machine) : input;
  const PlanningBackend planning = planning_backend(config, machine);
  Advice advice;  // made before anything is printed, as it may throw
  if (machine) advice = make_advice(config, *machine, planning.backend, ranks);
  if (config.kind == TaskKind::kernels) {
    factorise(config, ranks);
    route_environment();
    if (json)
      throw UserError("--json of a dry run (task.kind = \"kernels\" has no owners and exchanges); leave it out");
    return print_kernels_plan(out, config, planning.backend, ranks);
  }
  const Plan plan = make_plan(config, planning, ranks);
  fmt::print(out, "plan: {} ranks = heads {} x kv {}, memory as the {} backend lays it out\n", ranks, plan.heads,
             plan.kv, plan.backend == BackendKind::cuda ? "cuda" : "host");
  if (!plan.gpu.empty()) fmt::print(out, "workspace and routes of a GPU that is not here: {}\n", plan.gpu);
  if (!plan.idle.empty()) fmt::print(out, "warning: {}\n", plan.idle);
  if (plan.kv > 1)
    fmt::print(out, "chunks of {} blocks are dealt round-robin over the {} kv ranks\n", plan.kv_chunk_blocks, plan.kv);
  print_owners(out, config, plan);
  for (const PlannedPoint& point : plan.points) {
    fmt::print(out, "\ncontext {}, batch {}", point.point.context, point.point.batch);
    if (const std::vector<std::int64_t>& lengths = point.point.lengths; !lengths.empty())
      fmt::print(out, ", lengths {} to {}", *std::ranges::min_element(lengths), point.point.longest());
    if (config.kind == TaskKind::mixed) fmt::print(out, "; beside it a chunk of {}", config.run.prefill_chunk);
    fmt::print(out, "{}\n", config.run.prefix > 0 ? fmt::format(", onto a prefix of {}", config.run.prefix) : "");
    print_memory(out, point);
    print_exchanges(out, config, point);
    print_routes(out, point.routes);
  }
  fmt::print(out, "\n");
  print_copy_rate_memory(out, config, ranks);
  fmt::print(out, "result file: at most {}\n", bytes_text(static_cast<double>(planned_result_bytes(config, ranks))));
  if (machine) print_advice(out, advice, *machine, ranks);
  if (json) *json = plan_json(plan, machine ? advice_json(advice, *machine) : "");
}

}  // namespace nsa
