#include "nsa/routing/router.hpp"

#include <fmt/format.h>
#include <fmt/ostream.h>

#include <algorithm>
#include <cstdlib>
#include <limits>

#include "kernels/diagnostics/error.hpp"
#include "kernels/diagnostics/fault_injection.hpp"
#include "nsa/config/keys.hpp"
#include "nsa/config/reference.hpp"

namespace nsa {
namespace {

constexpr const char* environment_variables[branches] = {"NSA_ROUTE_CMP", "NSA_ROUTE_SEL", "NSA_ROUTE_WIN"};

[[maybe_unused]] void maybe_refuse_launch(Branch branch, const DeviceOps& device, Stream* stream) {
  if (branch == cmp)
    fault::refuse_launch("attend.cmp", device, stream);
  else if (branch == sel)
    fault::refuse_launch("attend.sel", device, stream);
  else
    fault::refuse_launch("attend.win", device, stream);
}

bool accepts(const AttendKernel& kernel, Branch branch, const LayerShape& shape, const QueryTile& tile) {
  const fault::Fault fault = branch == cmp   ? fault::at("accepts.cmp")
                             : branch == sel ? fault::at("accepts.sel")
                                             : fault::at("accepts.win");
  return !fault.is(fault::Action::fail) && kernel.accepts(shape, tile);
}

std::string environment_value(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

/// Names that [route] accepts for the branch, including "auto".
std::vector<std::string> known_names(Branch branch) {
  std::vector<std::string> names;
  const auto add = [&](const auto& choices) {
    for (const Choice<std::string>& choice : choices) names.push_back(choice.value);
  };
  if (branch == cmp)
    add(cmp_routes);
  else if (branch == sel)
    add(sel_routes);
  else
    add(win_routes);
  return names;
}

/// The choice of the threshold; its name is "" where the threshold decides nothing.
RouteChoice by_threshold(const RouteKey& q, const char* key, std::int64_t threshold) {
  if (threshold == 0) return {};
  const bool reached = threshold > 0 && q.length >= threshold;
  const std::string rows = threshold < 0 ? fmt::format("runtime.{} = -1: never", key)
                                         : fmt::format("{} rows {} runtime.{} = {}", q.length,
                                                       reached ? "reach" : "are fewer than", key, threshold);
  const RouteChoice default_choice = default_route(q);
  if (q.branch == sel) return reached ? RouteChoice{} : RouteChoice{"sdpa", rows};
  if (reached) {
    const std::string why_not = guard(q, "flash");
    return why_not.empty() ? RouteChoice{"flash", rows} : RouteChoice{default_choice.name, rows + ", but " + why_not};
  }
  return default_choice.name == "flash" ? RouteChoice{"sdpa", rows} : RouteChoice{};
}

const AttendKernel* find(std::span<const AttendKernel> list, const std::string& name) {
  const auto at = std::find_if(list.begin(), list.end(), [&](const AttendKernel& k) { return k.name == name; });
  return at == list.end() ? nullptr : &*at;
}

RouteKey route_key(const Backend& backend, const LayerShape& s, Phase phase, Branch branch, std::int64_t positions) {
  return {backend.kind, backend.capability,
          phase,        branch,
          s.dtype,      s.d_k,
          s.d_v,        attended_rows(s.rules, branch, positions)};
}

}  // namespace

std::string route_environment_text() {
  std::string text;
  for (const char* name :
       {environment_variables[cmp], environment_variables[sel], environment_variables[win], "NSA_FORCE"})
    text += fmt::format("{}={} ", name, environment_value(name));
  return text;
}

RouteEnvironment route_environment() {
  RouteEnvironment environment;
  for (const Branch branch : {cmp, sel, win}) {
    const std::string value = environment_value(environment_variables[branch]);
    const std::vector<std::string> known = known_names(branch);
    if (!value.empty() && std::find(known.begin(), known.end(), value) == known.end())
      throw UserError(fmt::format("{}={} in the environment (no such implementation of {}); set one of {}, or unset it",
                                  environment_variables[branch], value, branch_names[branch], fmt::join(known, ", ")));
    environment.implementation[branch] = value;
  }
  check_environment();
  environment.force = environment_value("NSA_FORCE") == "1";
  return environment;
}

RouteChoice choose_route(const RouteKey& q, const Config& config, const RouteEnvironment& environment) {
  const std::string& set = environment.implementation[q.branch];
  const std::string& input = config.route.implementation[q.branch];
  const std::string where =
      set.empty() ? fmt::format("route.{}", branch_names[q.branch]) : environment_variables[q.branch];
  const std::string& requested = set.empty() ? input : set;
  if (requested != "auto") {
    const std::string why_not = guard(q, requested);
    if (!why_not.empty() && !environment.force)
      throw UserError(fmt::format("{} = \"{}\" ({}); set NSA_FORCE=1 to run it all the same, or \"auto\"", where,
                                  requested, why_not));
    return {requested, why_not.empty() ? "asked for by " + where : "asked for by " + where + ", forced: " + why_not,
            true};
  }
  const RuntimeConfig& r = config.runtime;
  const RouteChoice limit = q.branch == win   ? by_threshold(q, "fa2_min_len_win", r.fa2_min_len_win)
                            : q.branch == cmp ? by_threshold(q, "fa2_min_len_cmp", r.fa2_min_len_cmp)
                                              : by_threshold(q, "sel_triton_min_L", r.sel_triton_min_l);
  return limit.name.empty() ? default_route(q) : limit;
}

std::int64_t attended_rows(const BlockRules& rules, Branch branch, std::int64_t positions) {
  if (branch == cmp) return compressed_tokens(rules, positions - 1);
  return std::min<std::int64_t>(positions, branch == win ? rules.w : std::int64_t{rules.n_sel} * rules.l_sel);
}

void Route::record_kernel(const char* name) {
  if (std::find(ran.begin(), ran.end(), name) == ran.end()) ran.push_back(name);
}

void Route::run(Branch branch, const AttendArgs& args, Stream* stream) {
  if (!fallback.empty()) ++fallbacks;
  if (kernel != sdpa) {
    try {
      if constexpr (fault::built) maybe_refuse_launch(branch, *device, stream);
      kernel->run(args, stream);
      return record_kernel(kernel->variant_name(args));
    } catch (const LaunchError& error) {
      fallback = error.what();
      ++fallbacks;
      kernel = sdpa;
    }
  }
  kernel->run(args, stream);
  record_kernel(kernel->variant_name(args));
}

void Routes::choose(const Backend& backend, const Config& config, Phase phase, const LayerShape& shape,
                    const QueryTile& tile) {
  const RouteEnvironment environment = route_environment();
  for (const Branch branch : {cmp, sel, win}) {
    Route& route = of(phase, branch);
    const auto list = backend.kernels->attend[branch];
    const RouteChoice wanted =
        choose_route(route_key(backend, shape, phase, branch, tile.max_positions), config, environment);
    route = {find(list, wanted.name), find(list, "sdpa"), wanted.name, wanted.reason, "", 0, backend.device};
    agreed_[static_cast<int>(phase)][branch] = false;
    if (!route.kernel && wanted.requested) {
      std::vector<std::string> names;
      for (const AttendKernel& kernel : list) names.push_back(kernel.name);
      throw UserError(fmt::format("route.{} = \"{}\" (this backend has {}); choose one of these or \"auto\"",
                                  branch_names[branch], wanted.name, fmt::join(names, ", ")));
    }
    if (route.kernel && (route.kernel == route.sdpa || accepts(*route.kernel, branch, shape, tile))) continue;
    const bool exists = route.kernel != nullptr;
    route.kernel = route.sdpa;
    if (exists)
      route.fallback = fmt::format("refuses this shape (Dk = {}, Dv = {}, {}, {} positions)", shape.d_k, shape.d_v,
                                   name_of(shape.dtype), tile.max_positions);
    else
      route.chosen = "sdpa", route.reason = wanted.name + " is not in this backend";
  }
}

std::size_t Routes::scratch_bytes(const KernelTable& kernels, Phase phase, const LayerShape& shape,
                                  const QueryTile& tile, const AttentionPolicy& policy) const {
  std::size_t bytes = kernels.scratch_bytes(shape, tile, policy);
  for (const Branch branch : {cmp, sel, win})
    if (const auto wants = of(phase, branch).kernel->scratch) bytes = std::max(bytes, wants(shape, tile, policy));
  return bytes;
}

bool Routes::agree(const ControlComm& world) {
  bool new_failure = false;
  for (std::size_t phase = 0; phase < phase_names.size(); ++phase) {
    for (const Branch branch : {cmp, sel, win}) {
      Route& route = routes_[phase][branch];
      bool& agreed_here = agreed_[phase][branch];
      if (world.max(std::int64_t{!route.fallback.empty() && !agreed_here}) == 0) continue;
      const std::vector<std::string> reasons = world.gather(route.fallback);
      const auto first =
          std::find_if(reasons.begin(), reasons.end(), [](const std::string& text) { return !text.empty(); });
      const std::string reason =
          world.broadcast(first == reasons.end() ? "" : fmt::format("{} on rank {}", *first, first - reasons.begin()));
      if (route.fallback.empty()) route.fallback = reason;
      route.kernel = route.sdpa;
      agreed_here = true;
      new_failure = true;
    }
  }
  return new_failure;
}

void Routes::count(const ControlComm& world) {
  for (auto& phase : routes_)
    for (Route& route : phase) route.fallbacks = world.max(route.fallbacks);
}

std::vector<std::string> Routes::fallbacks(Phase main) const {
  std::vector<std::string> lines;
  for (const Phase phase : {main, main == Phase::decode ? Phase::prefill : Phase::decode})
    for (const Branch branch : {cmp, sel, win}) {
      const Route& route = of(phase, branch);
      if (route.fallback.empty()) continue;
      lines.push_back(fmt::format("{}{}: {} -> sdpa: {} ({} {})",
                                  phase == main ? "" : std::string(phase_names[static_cast<int>(phase)]) + " ",
                                  branch_names[branch], route.chosen, route.fallback, route.fallbacks,
                                  route.fallbacks == 1 ? "call" : "calls"));
    }
  return lines;
}

}  // namespace nsa
