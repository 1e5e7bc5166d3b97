#include "nsa/experiment/advise.hpp"

#include <fmt/format.h>
#include <fmt/ostream.h>

#include <algorithm>
#include <utility>

#include "kernels/diagnostics/error.hpp"
#include "kernels/diagnostics/json.hpp"
#include "nsa/experiment/experiment.hpp"
#include "nsa/experiment/plan.hpp"
#include "nsa/report/metrics.hpp"

namespace nsa {
namespace {

constexpr double asked_median = 0.10, asked_worst = 0.20;  // errors that the cost model may have

std::string layout_text(const LayoutAdvice& l) { return fmt::format("{} x {}", l.heads, l.kv); }

Config with_layout(Config config, std::int64_t heads, std::int64_t kv) {
  config.parallel.heads = heads;
  config.parallel.kv = kv;
  return config;
}

std::vector<LayoutAdvice> layouts_of(const Config& config, const Machine& machine, const Backend& backend,
                                     const Point& point, int ranks) {
  std::vector<LayoutAdvice> layouts;
  for (std::int32_t heads = 1; heads <= config.model.n_kv_groups && heads <= ranks; ++heads) {
    if (config.model.n_kv_groups % heads != 0 || ranks % heads != 0) continue;
    const Config with = with_layout(config, heads, ranks / heads);
    const Partition first = make_partition(with, point, ranks, 0);
    const std::int64_t blocks = eligible_blocks(first.shape.rules, total_positions(with, point) - 1);
    layouts.push_back({heads, ranks / heads, predict(machine, with, first, point),
                       static_cast<double>(planned_memory(backend, with, first, point).total_peak),
                       static_cast<std::int32_t>(idle_kv_ranks(with, point, ranks / heads, blocks)), ""});
  }
  return layouts;
}

/// The part of the time that makes `slower` slower than `faster` most: "exchanges 14.9 us more".
std::string main_difference(const PredictedTime& faster, const PredictedTime& slower) {
  std::size_t most = 0;
  const auto difference = [&](std::size_t i) { return slower.parts[i] - faster.parts[i]; };
  for (std::size_t i = 1; i < slower.parts.size(); ++i)
    if (difference(i) > difference(most)) most = i;
  return fmt::format("{} {}", PredictedTime::names[most], time_text(std::max(0.0, difference(most))));
}

void explain(PointAdvice& advice, const PhaseCost& cost, double memory) {
  const auto idle_text = [](const LayoutAdvice& l) {
    return l.idle == 0 ? std::string() : fmt::format("; {} of {} kv ranks own no block", l.idle, l.kv);
  };
  for (std::size_t i = advice.fitting; i < advice.layouts.size(); ++i)
    advice.layouts[i].why = "does not fit: a rank has " + bytes_text(memory);
  if (advice.fitting == 0) return;
  LayoutAdvice& best = advice.layouts[0];
  best.why = advice.layouts.size() == 1 ? "the only layout"
             : advice.fitting == 1      ? "the only one that fits"
                                        : "the fastest: " + main_difference(best.time, advice.layouts[1].time) +
                                         " less than " + layout_text(advice.layouts[1]);
  best.why += idle_text(best);
  const double error = std::max(0.0, cost.error_worst);
  for (std::size_t i = 1; i < advice.fitting; ++i) {
    LayoutAdvice& l = advice.layouts[i];
    const bool equal = l.time.total() <= best.time.total() * (1 + error);
    l.why =
        main_difference(best.time, l.time) + " more" + (equal ? "; within the error of the first" : "") + idle_text(l);
  }
}

PointAdvice advise_point(const Config& config, const Machine& machine, const Backend& backend, const Point& point,
                         int ranks) {
  PointAdvice advice{point, layouts_of(config, machine, backend, point, ranks), 0};
  const auto fits = [&](const LayoutAdvice& l) { return l.memory <= machine.memory; };
  std::ranges::stable_sort(advice.layouts, [&](const LayoutAdvice& a, const LayoutAdvice& b) {
    return fits(a) != fits(b) ? fits(a) : a.time.total() < b.time.total();
  });
  advice.fitting = static_cast<std::size_t>(std::ranges::count_if(advice.layouts, fits));
  explain(advice, phase_cost(machine, config), machine.memory);
  return advice;
}

std::string value_text(const Parameter& parameter) {
  return std::visit([](const auto& value) { return fmt::format("{}", value); }, parameter.second);
}

/// "model.d_k = 64 (measured: 128), ...": what of the input differs from what the machine was measured with.
std::string differences(const Config& config, const PhaseCost& cost) {
  std::string text;
  for (const Parameter& p : parameters(config, sweep(config).front()))
    for (const Parameter& measured : cost.input)
      if (p.first == measured.first && value_text(p) != value_text(measured))
        text += fmt::format("{}{} = {} (measured: {})", text.empty() ? "" : ", ", p.first, value_text(p),
                            value_text(measured));
  return text;
}

std::string error_text(const PhaseCost& cost) {
  if (cost.error_worst < 0)
    return "warning: the error of these times is not known: no layout was predicted by a fit to others";
  const std::string error = fmt::format("{:.0f}% in the median and {:.0f}% at worst on layouts that were not fitted",
                                        100 * cost.error_median, 100 * cost.error_worst);
  if (cost.error_median <= asked_median && cost.error_worst <= asked_worst)
    return "the error of these times is " + error;
  return fmt::format("warning: the error of these times is {}, above {:.0f}% and {:.0f}%: do not rely on the order",
                     error, 100 * asked_median, 100 * asked_worst);
}

/// How decode over kv ranks is priced where it is not as it would run; "" where it is.
std::string launches_note(const Config& config, const PhaseCost& cost, int ranks) {
  if (!cost.fused || config.kind != TaskKind::decode || ranks == 1) return "";
  if (cost.launches.known() && !cost.exchange.known())
    return "one launch over kv ranks was not measured: these times are of several launches, which take longer; "
           "measured: " +
           cost.launches_measured;
  if (may_run_in_one_launch(ranks)) return "";
  if (cost.launches.known())
    return "decode with kv = 5, 7, or more than 8 runs in several launches; measured: " + cost.launches_measured;
  return "warning: decode with kv = 5, 7, or more than 8 runs in several launches and takes longer than the times "
         "here, "
         "whose exchanges are those of one";
}

std::vector<std::string> notes_of(const Config& config, const Machine& machine, int ranks) {
  const PhaseCost& cost = phase_cost(machine, config);
  std::vector<std::string> notes = {error_text(cost), "measured: " + cost.measured};
  if (const std::string text = differences(config, cost); !text.empty())
    notes.push_back("warning: the error for this input is not known: " + text);
  if (cost.ranks < ranks)
    notes.push_back(cost.ranks == 0 ? "warning: no exchange was measured, so that exchanges cost nothing here"
                                    : fmt::format("exchanges were measured among up to {} ranks; more are extrapolated",
                                                  cost.ranks));
  if (const std::string note = launches_note(config, cost, ranks); !note.empty()) notes.push_back(note);
  if (ranks > machine.node)
    notes.push_back("between nodes: " +
                    (machine.network.empty() ? "no network is given, as if it were free" : machine.network));
  if (machine.backend == BackendKind::cuda && !machine.gpu)
    notes.push_back(
        "memory is that of an H200's kernels, as the machine file has no [gpu], unless there is a GPU here");
  return notes;
}

}  // namespace

Config on_machine(Config config, const Machine& machine) {
  const bool cuda = machine.backend == BackendKind::cuda;
  const BackendChoice choice = cuda ? BackendChoice::cuda : BackendChoice::host;
  if (config.run.backend != BackendChoice::automatic && config.run.backend != choice)
    throw UserError(
        fmt::format("{} describes a machine for run.backend = \"{}\" (the input has the other one); choose another "
                    "machine file, or --set run.backend={}",
                    machine.path, cuda ? "cuda" : "host", cuda ? "cuda" : "host"));
  config.run.backend = choice;
  return config;
}

Advice make_advice(const Config& config, const Machine& machine, const Backend& backend, int ranks) {
  Advice advice{notes_of(config, machine, ranks), {}};
  for (const Point& point : planned_points(config))
    advice.points.push_back(advise_point(config, machine, backend, point, ranks));
  return advice;
}

void print_advice(std::ostream& out, const Advice& advice, const Machine& machine, int ranks) {
  fmt::print(out, "\nadvice: layouts of {} ranks on {} ({}), the fastest first\n", ranks, machine.name, machine.path);
  for (const std::string& note : advice.notes) fmt::print(out, "{}\n", note);
  for (const PointAdvice& point : advice.points) {
    fmt::print(out, "\ncontext {}, batch {}\n{:>12} {:>9}", point.point.context, point.point.batch, "heads x kv",
               "time");
    for (const char* name : PredictedTime::names) fmt::print(out, " {:>10}", name);
    fmt::print(out, " {:>13}  why\n", "memory a rank");
    for (const LayoutAdvice& l : point.layouts) {
      fmt::print(out, "{:>12} {:>9}", layout_text(l), time_text(l.time.total()));
      for (const double part : l.time.parts) fmt::print(out, " {:>10}", part > 0 ? time_text(part) : "-");
      fmt::print(out, " {:>13}  {}\n", bytes_text(l.memory), l.why);
    }
  }
}

namespace {

Json layout_json(const LayoutAdvice& l, bool fits) {
  Json parts;
  for (std::size_t i = 0; i < l.time.parts.size(); ++i) parts[PredictedTime::names[i]] = l.time.parts[i];
  return {{"heads", l.heads},   {"kv", l.kv},   {"seconds", l.time.total()}, {"parts", std::move(parts)},
          {"memory", l.memory}, {"fits", fits}, {"idle_kv_ranks", l.idle},   {"why", l.why}};
}

Json point_json(const PointAdvice& point) {
  Json layouts = Json::array();
  for (std::size_t i = 0; i < point.layouts.size(); ++i)
    layouts.push_back(layout_json(point.layouts[i], i < point.fitting));
  return {{"context", point.point.context}, {"batch", point.point.batch}, {"layouts", std::move(layouts)}};
}

}  // namespace

std::string advice_json(const Advice& advice, const Machine& machine) {
  return json_text(
      Json{{"machine", machine.name}, {"notes", advice.notes}, {"points", json_list(advice.points, point_json)}});
}

}  // namespace nsa
