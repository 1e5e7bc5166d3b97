#pragma once
// Which implementation attends a branch: chosen once for each phase, before its first step, from a table of defaults by
// device, type, head sizes and length; overridden by the input and the environment, held back by guards. An
// implementation that refuses the shape or cannot be launched is replaced by `sdpa`, and that is counted.

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

/// What a default is looked up by.
struct RouteKey {
  BackendKind backend = BackendKind::host;
  int capability = 0;  ///< of the GPU, 10 * major + minor
  Phase phase = Phase::decode;
  Branch branch = cmp;
  DType dtype = DType::bf16;
  std::int32_t d_k = 64, d_v = 64;
  std::int64_t length = 0;  ///< K/V rows that one query attends, at most
};

/// A chosen name, and the reason for it in a few words.
struct RouteChoice {
  std::string name, reason;
  bool asked = false;  ///< for by the user, in so many words
};

/// NSA_ROUTE_CMP, NSA_ROUTE_SEL, NSA_ROUTE_WIN ("" where not set) and NSA_FORCE.
struct RouteEnvironment {
  std::string implementation[branches];
  bool force = false;
};
/// Throws UserError where a variable holds what it may not.
RouteEnvironment route_environment();

/// All of it as it stands in this rank's environment: ranks that differ would take different routes.
std::string route_environment_text();

/// The table's answer alone.
RouteChoice default_route(const RouteKey& question);
/// Why this implementation is not to be run there; "" where nothing speaks against it.
std::string guard(const RouteKey& question, const std::string& name);
/// Environment, then [route], then [runtime], then the table. Throws UserError for what a guard forbids and the user
/// asked for without NSA_FORCE=1.
RouteChoice answer(const RouteKey& question, const Config& config, const RouteEnvironment& environment);

/// Rows of K and V that a query at the last of `positions` positions attends.
std::int64_t attended_rows(const BlockRules& rules, Branch branch, std::int64_t positions);

/// The implementation of one branch in one phase.
struct Route {
  const AttendKernel* kernel = nullptr;  ///< what runs
  const AttendKernel* sdpa = nullptr;
  std::string chosen, reason;  ///< what was to run, and why
  std::string fallback;        ///< why `sdpa` runs in its place; "": it does not
  std::int64_t fallbacks = 0;  ///< calls of this rank that sdpa served in its place; a captured one once
  const DeviceOps* device = nullptr;
  std::vector<std::string> ran = {};  ///< the kernels behind the name that this rank has run, each once, in order

  /// Runs the branch. A LaunchError makes sdpa run instead, now and from now on.
  void run(Branch branch, const AttendArgs& args, Stream* stream);
  /// Adds to `ran`.
  void note(const char* name);
};

class Routes {
 public:
  /// Throws UserError as `answer` does, and for a name that the backend does not have.
  void choose(const Backend& backend, const Config& config, Phase phase, const LayerShape& shape,
              const QueryTile& tile);
  Route& of(Phase phase, Branch branch) { return routes_[static_cast<int>(phase)][branch]; }
  const Route& of(Phase phase, Branch branch) const { return routes_[static_cast<int>(phase)][branch]; }
  /// Bytes of scratch that the phase's stages need.
  std::size_t scratch_bytes(const KernelTable& kernels, Phase phase, const LayerShape& shape, const QueryTile& tile,
                            const AttentionPolicy& policy) const;
  /// What failed on one rank is replaced on all. Collective; whether something new had failed on any.
  bool agree(const ControlComm& world);
  /// The most calls of any rank, on every rank. Collective.
  void count(const ControlComm& world);
  /// "sel: fused -> sdpa: reason (12 calls)", of `main` first; the other phase's begin with its name.
  std::vector<std::string> fallbacks(Phase main) const;

 private:
  Route routes_[phase_names.size()][branches];
  bool agreed_[phase_names.size()][branches] = {};
};

/// `nsa info --routes`: what would run, by phase, branch, type and length, and why; without a GPU for every kind known.
void print_routes(std::ostream& out);
/// The same for one point of an input, on `backend`; a line a branch.
void print_routes(std::ostream& out, const Backend& backend, const Config& config, const Point& point, int ranks);

}  // namespace nsa
