#pragma once
// The plan of a run, from its input alone: owners, memory, exchanges and routes. Neighbouring ranks with the same plan
// are one range, so that a plan of many ranks stays short. Needs no MPI launch and no GPU.

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/interface/buffer.hpp"
#include "nsa/config/config.hpp"
#include "nsa/config/machine.hpp"
#include "nsa/model/traffic.hpp"
#include "nsa/routing/router.hpp"

namespace nsa {

/// Neighbouring ranks of one head shard. `blocks`: selection blocks that each of them owns, of the longest context.
struct PlannedOwners {
  std::int32_t first = 0, ranks = 1;
  std::int32_t head_shard = 0, kv_rank = 0;  ///< kv_rank: of the first
  std::int32_t group_begin = 0, groups = 1, heads_per_group = 1;
  std::int64_t blocks = 0;
};

struct PlannedMemory {
  std::int32_t first = 0, ranks = 1;
  MemoryAccount account;  ///< of each of these ranks
};

struct PlannedPoint {
  Point point;
  std::vector<PlannedMemory> memory;
  std::vector<Exchange> exchanges;  ///< of a step (prefill: of the context) and layer
  std::vector<PlannedRoute> routes;
};

struct Plan {
  std::int32_t ranks = 1, heads = 1, kv = 1;
  BackendKind backend = BackendKind::host;  ///< whose kernels say how much workspace they need
  std::string gpu;                          ///< the GPU planned for, where it is not the one here; else ""
  Point longest;                            ///< the point of the longest context
  std::int64_t positions = 0;               ///< of that point
  std::int64_t kv_chunk_blocks = 0;         ///< of that point
  std::vector<PlannedOwners> owners;
  std::string idle;  ///< which ranks own nothing and what would use them; empty: none
  std::vector<PlannedPoint> points;
};

/// The kernels that say how much scratch a step needs and which routes there are.
struct PlanningBackend {
  Backend backend;
  std::string gpu;  ///< Plan::gpu
};

/// Not for task.kind = "kernels". Throws UserError when the input's heads and kv do not multiply to `ranks`.
Plan make_plan(const Config& config, const PlanningBackend& planning, int ranks);

/// Plan::idle alone: "4031 of 4096 kv ranks own no block (...); parallel.kv_chunk_blocks = 1 would use them all".
std::string idle_ranks(const Config& config, int ranks);

/// kv ranks that own none of the `blocks` selection blocks of a point's longest sequence.
std::int64_t idle_kv_ranks(const Config& config, const Point& point, std::int64_t kv, std::int64_t blocks);

/// The points that have plans of their own: later ones repeat them for another branch alone.
std::vector<Point> planned_points(const Config& config);

/// Of run.backend. A GPU is the machine's, else the one here, else an H200; "auto" is the GPU here or the host.
PlanningBackend planning_backend(const Config& config, const Machine* machine);

/// {"ranks": ..., "owners": [...], "points": [...]} (docs/METRICS.md), and "advice", a JSON document, unless empty.
std::string plan_json(const Plan& plan, const std::string& advice);

}  // namespace nsa
