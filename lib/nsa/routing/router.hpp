#pragma once
// The router chooses the implementation of each branch, once for each phase, before its first step. The default comes
// from a table by device, type, head sizes and length; the input and the environment override it, guards forbid it. An
// implementation that refuses the shape or cannot be launched is replaced by `sdpa`, and those calls are counted.

#include <array>
#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include "comm/session.hpp"
#include "kernels/interface/backend.hpp"
#include "nsa/config/config.hpp"

namespace nsa {

enum class Phase : int { prefill, decode };
constexpr std::array phase_names = {"prefill", "decode"};

/// The key of the default table.
struct RouteKey {
  BackendKind backend = BackendKind::host;
  int capability = 0;  ///< of the GPU, 10 * major + minor
  Phase phase = Phase::decode;
  Branch branch = cmp;
  DType dtype = DType::bf16;
  std::int32_t d_k = 64, d_v = 64;
  std::int64_t length = 0;  ///< most K/V rows that one query attends
};

/// The name of the chosen implementation, and the reason in a few words.
struct RouteChoice {
  std::string name, reason;
  bool requested = false;  ///< the user named this implementation
};

/// NSA_ROUTE_CMP, NSA_ROUTE_SEL, NSA_ROUTE_WIN ("" where not set) and NSA_FORCE.
struct RouteEnvironment {
  std::string implementation[branches];
  bool force = false;
};
/// Throws UserError where a variable has a value that is not allowed.
RouteEnvironment route_environment();

/// These variables of this rank as one line, for comparison among ranks: ranks that differ would take different routes.
std::string route_environment_text();

/// The choice of the table alone.
RouteChoice default_route(const RouteKey& key);
/// Why a guard forbids this implementation; "" where none does.
std::string guard(const RouteKey& key, const std::string& name);
/// The first of these that decides: environment, [route], [runtime], table. Throws UserError where the user requests an
/// implementation that a guard forbids, without NSA_FORCE=1.
RouteChoice choose_route(const RouteKey& key, const Config& config, const RouteEnvironment& environment);

/// Rows of K and V that a query at the last of `positions` positions attends.
std::int64_t attended_rows(const BlockRules& rules, Branch branch, std::int64_t positions);

/// The implementation of one branch in one phase.
struct Route {
  const AttendKernel* kernel = nullptr;  ///< the implementation that runs
  const AttendKernel* sdpa = nullptr;
  std::string chosen, reason;  ///< the implementation that was chosen, and why
  std::string fallback;        ///< why `sdpa` replaces it; "": it does not
  std::int64_t fallbacks = 0;  ///< calls of this rank that sdpa served instead; a captured call counts once
  const DeviceOps* device = nullptr;
  std::vector<std::string> ran = {};  ///< kernels of the implementation that this rank has run, each once, in order

  /// Runs the branch. After a LaunchError sdpa runs it, this time and every later time.
  void run(Branch branch, const AttendArgs& args, Stream* stream);
  /// Adds to `ran`.
  void record_kernel(const char* name);
};

class Routes {
 public:
  /// Throws UserError as choose_route does, and for a requested name that the backend does not have.
  void choose(const Backend& backend, const Config& config, Phase phase, const LayerShape& shape,
              const QueryTile& tile);
  Route& of(Phase phase, Branch branch) { return routes_[static_cast<int>(phase)][branch]; }
  const Route& of(Phase phase, Branch branch) const { return routes_[static_cast<int>(phase)][branch]; }
  /// Bytes of scratch that the phase's stages need.
  std::size_t scratch_bytes(const KernelTable& kernels, Phase phase, const LayerShape& shape, const QueryTile& tile,
                            const AttentionPolicy& policy) const;
  /// An implementation that failed on one rank is replaced on all ranks. Collective. Returns whether any rank had a new
  /// failure.
  bool agree(const ControlComm& world);
  /// Sets `fallbacks` of every route to the largest of all ranks. Collective.
  void count(const ControlComm& world);
  /// "sel: fused -> sdpa: reason (12 calls)", first those of `main`; those of the other phase begin with its name.
  std::vector<std::string> fallbacks(Phase main) const;

 private:
  Route routes_[phase_names.size()][branches];
  bool agreed_[phase_names.size()][branches] = {};
};

/// `nsa info --routes`: the choice and its reason by phase, branch, type and length, for every known device. Needs no
/// GPU.
void print_routes(std::ostream& out);

/// The route of one branch that a run will choose.
struct PlannedRoute {
  Phase phase = Phase::decode;
  Branch branch = cmp;
  std::string device;  ///< "compute capability 9.0" of a GPU that is not here, else ""
  std::string name, reason;
  std::string fallback;  ///< why sdpa runs instead; "": it does not
};
/// Of one point of an input, on `backend`.
std::vector<PlannedRoute> planned_routes(const Backend& backend, const Config& config, const Point& point, int ranks);
void print_routes(std::ostream& out, const std::vector<PlannedRoute>& routes);  ///< one line for each

}  // namespace nsa
