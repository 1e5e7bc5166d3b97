// Prints routes: `nsa info --routes` and the dry run.

#include <fmt/format.h>
#include <fmt/ostream.h>

#include <algorithm>
#include <iterator>
#include <utility>

#include "kernels/diagnostics/error.hpp"
#include "nsa/config/parts.hpp"
#include "nsa/model/buffers.hpp"
#include "nsa/model/partition.hpp"
#include "nsa/routing/router.hpp"

namespace nsa {
namespace {

constexpr std::int64_t contexts[] = {128, 1024, 8192, 65536, 1048576};
constexpr int known_capabilities[] = {80, 89, 90, 100};
constexpr DType types[] = {DType::bf16, DType::f16, DType::f32};
constexpr std::pair<std::int32_t, std::int32_t> head_sizes[] = {{64, 64}, {128, 128}, {192, 128}, {96, 96}};

/// The choice at each context; neighbouring contexts of one choice are joined: "any length: fused (why)".
std::string choices_by_context(RouteKey q, const Config& config, const RouteEnvironment& environment) {
  std::vector<std::string> choices;
  for (const std::int64_t context : contexts) {
    q.length = attended_rows(config.nsa, q.branch, context);
    try {
      const RouteChoice choice = choose_route(q, config, environment);
      choices.push_back(fmt::format("{} ({})", choice.name, choice.reason));
    } catch (const UserError& error) {
      choices.push_back(fmt::format("refused: {}", error.what()));
    }
  }
  std::string text;
  for (std::size_t first = 0, end; first < choices.size(); first = end) {
    for (end = first + 1; end < choices.size() && choices[end] == choices[first];) ++end;
    const bool all = first == 0 && end == choices.size();
    if (!text.empty()) text += "; ";
    text += all ? "any length: " : fmt::format("context {} and on: ", contexts[first]);
    text += choices[first];
  }
  return text;
}

/// Types and head sizes with the same choices: (choices, "bf16, heads 64/64 128/128; fp16").
using Lines = std::vector<std::pair<std::string, std::string>>;

void add(Lines& lines, const std::string& text, const std::string& shape, const char* separator) {
  for (auto& line : lines)
    if (line.first == text) {
      line.second += separator + shape;
      return;
    }
  lines.emplace_back(text, shape);
}

Lines lines_of(RouteKey q, const RouteEnvironment& environment) {
  const Config config;
  Lines lines;
  for (const DType type : types) {
    Lines of_type;
    for (const auto& [d_k, d_v] : head_sizes) {
      q.dtype = type;
      q.d_k = d_k;
      q.d_v = d_v;
      add(of_type, choices_by_context(q, config, environment), d_k == 96 ? "others" : fmt::format("{}/{}", d_k, d_v),
          " ");
    }
    for (const auto& [text, sizes] : of_type)
      add(lines, text, std::string(name_of(type)) + (of_type.size() == 1 ? "" : ", Dk/Dv " + sizes), "; ");
  }
  return lines;
}

void print_device_routes(std::ostream& out, BackendKind backend, int capability, const RouteEnvironment& environment) {
  for (const Phase phase : {Phase::prefill, Phase::decode}) {
    std::vector<std::pair<Lines, std::string>> groups;  // branches with the same lines
    for (const Branch branch : {cmp, sel, win}) {
      RouteKey key;
      key.backend = backend;
      key.capability = capability;
      key.phase = phase;
      key.branch = branch;
      Lines lines = lines_of(key, environment);
      if (!groups.empty() && groups.back().first == lines)
        groups.back().second += std::string(" ") + branch_names[branch];
      else
        groups.emplace_back(std::move(lines), branch_names[branch]);
    }
    for (const auto& [lines, names] : groups)
      for (const auto& [text, shapes] : lines)
        fmt::print(out, "  {} {} ({})\n    {}\n", phase_names[static_cast<int>(phase)], names, shapes, text);
  }
}

}  // namespace

void print_routes(std::ostream& out) {
  const RouteEnvironment environment = route_environment();
  fmt::print(
      out,
      "The implementation of each branch (cmp, sel, win) that a run chooses, and why: by device, phase, type, head\n"
      "sizes and context, from the built-in table and the environment. [route] and [runtime] of an input override\n"
      "it; `nsa run INPUT --dry-run` prints the routes of that input. What the names mean: docs/ROUTES.md.\n");
  if (environment.force) fmt::print(out, "NSA_FORCE=1: guards are off\n");
  fmt::print(out, "\nhost\n");
  print_device_routes(out, BackendKind::host, 0, environment);
  int here = 0;
  if (cuda_built()) {
    try {
      here = open_backend(BackendKind::cuda, 0).capability;
    } catch (const UserError&) {
      // no GPU: the tables below show what each known one would run
    }
  }
  for (const int capability : known_capabilities) {
    fmt::print(out, "\ncuda, compute capability {}.{}{}\n", capability / 10, capability % 10,
               capability == here ? ": the GPU here" : "");
    print_device_routes(out, BackendKind::cuda, capability, environment);
  }
  if (here == 0 || std::ranges::find(known_capabilities, here) != std::end(known_capabilities)) return;
  fmt::print(out, "\ncuda, compute capability {}.{}: the GPU here\n", here / 10, here % 10);
  print_device_routes(out, BackendKind::cuda, here, environment);
}

std::vector<PlannedRoute> planned_routes(const Backend& backend, const Config& config, const Point& point, int ranks) {
  const std::vector<Part> parts = parts_of(config, point);
  const std::string device =
      backend.device ? "" : fmt::format("compute capability {}.{}", backend.capability / 10, backend.capability % 10);
  std::vector<PlannedRoute> planned;
  for (const Phase phase : {Phase::prefill, Phase::decode}) {
    if (phase == Phase::decode && config.kind == TaskKind::prefill) continue;
    const Part& part = phase == Phase::prefill ? parts.back() : parts.front();  // those of a fill are not listed apart
    if (phase == Phase::prefill && part.config.kind != TaskKind::prefill && config.run.fill == CacheFill::synthetic)
      continue;
    const LayerShape shape = make_partition(part.config, part.point, ranks, 0).shape;
    const std::int64_t positions = total_positions(part.config, part.point);
    QueryTile tile{0, static_cast<std::int32_t>(point.batch), 1, nullptr, positions};
    if (phase == Phase::prefill)
      tile = {0, 1, static_cast<std::int32_t>(std::min<std::int64_t>(256, positions)), nullptr, positions};
    Routes routes;
    routes.choose(backend, part.config, phase, shape, tile);
    for (const Branch branch : {cmp, sel, win}) {
      const Route& route = routes.of(phase, branch);
      const std::string fallback = route.fallback.empty() ? "" : route.chosen + " " + route.fallback;
      planned.push_back({phase, branch, device, route.kernel->name, route.reason, fallback});
    }
  }
  return planned;
}

void print_routes(std::ostream& out, const std::vector<PlannedRoute>& routes) {
  for (const PlannedRoute& route : routes) {
    fmt::print(out, "route of {} {}{}: {}", phase_names[static_cast<int>(route.phase)], branch_names[route.branch],
               route.device.empty() ? "" : ", " + route.device, route.name);
    if (route.fallback.empty())
      fmt::print(out, " ({})\n", route.reason);
    else
      fmt::print(out, ", every call falls back: {} ({})\n", route.fallback, route.reason);
  }
}

}  // namespace nsa
