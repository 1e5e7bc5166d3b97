#include "nsa/gate/gate.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <iterator>
#include <limits>
#include <sstream>

#include "kernels/diagnostics/error.hpp"
#include "nsa/gate/evidence.hpp"
#include "nsa/gate/shape_conditions.hpp"
#include "nsa/report/metrics.hpp"
#include "nsa/report/report.hpp"

namespace nsa {
namespace {

constexpr const char* decode_run = "nsa run inputs/gate/m4_decode.toml";
constexpr const char* peers_run = "python3 scripts/bench/bench_gpu.py --selection --output peers.h5";

using Samples = std::vector<double>;

Measured measured(const Samples& samples, double alpha) {
  const Summary s = summarise(samples, alpha);
  return {s.median, s.low, s.high, s.n};
}

/// f(a[i], b[i]) for every repetition i that both have.
Samples paired(const Samples& a, const Samples& b, const std::function<double(double, double)>& f) {
  Samples result;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) result.push_back(f(a[i], b[i]));
  return result;
}

Samples step_samples(const PointRecord& point, const char* mode) { return slowest_samples(point, mode, Stage::step); }

/// Sum of stages for each repetition; stages that the mode does not time are left out.
Samples stage_sum(const PointRecord& point, std::initializer_list<Stage> stages) {
  Samples sum;
  for (const Stage stage : stages) {
    const Samples of_stage = slowest_samples(point, "branches", stage);
    if (of_stage.empty()) continue;
    sum = sum.empty() ? of_stage : paired(sum, of_stage, std::plus<>());
  }
  return sum;
}

constexpr std::initializer_list<Stage> selection = {Stage::rank, Stage::attend_sel};
constexpr std::initializer_list<Stage> attention = {Stage::attend_cmp, Stage::rank, Stage::attend_sel,
                                                    Stage::attend_win, Stage::combine};
constexpr std::initializer_list<Stage> all_stages = {
    Stage::project,    Stage::append,     Stage::compress, Stage::attend_cmp, Stage::rank,
    Stage::attend_sel, Stage::attend_win, Stage::combine,  Stage::output,     Stage::comm};

// Condition 1

/// Why the share cannot be judged by this point; empty when it can.
std::string share_gap(const PointRecord& point) {
  if (!point.noisy.empty()) return noise_gap(point);
  const std::int64_t context = integer_parameter(point, "run.context", 0);
  const auto lacks = [&](const char* mode) { return step_samples(point, mode).empty(); };
  if (point.routes[sel] != "sdpa")
    return fmt::format(
        "selection ran as {}, and the question is what it costs as packed SDPA: {} --set run.context={} "
        "(it has route.sel = \"sdpa\")",
        point.routes[sel], decode_run, context);
  std::string missing;
  for (const char* mode : {"branches", "total", "ablation_sel"})
    if (lacks(mode)) missing += (missing.empty() ? "" : ", ") + std::string(mode);
  if (missing.empty()) return {};
  return fmt::format("no {}: {} --set run.context={} --set 'run.modes=[\"branches\", \"total\", \"ablation\"]'",
                     missing, decode_run, context);
}

Condition share_of_step(double threshold) {
  return {fmt::format("selection's share of the step >= {:.0f}%", 100 * threshold),
          Unit::share,
          threshold,
          true,
          {none, none, none, 0},
          Outcome::open,
          {}};
}

Condition share_condition(const PointRecord& point, const ContextVerdict& v, double threshold, double alpha) {
  Condition c = share_of_step(threshold);
  c.measured = measured(paired(stage_sum(point, selection), stage_sum(point, all_stages), std::divides<>()), alpha);
  if (c.why = share_gap(point); !c.why.empty()) return c;
  if (std::isnan(c.measured.low)) {
    c.why = too_few(c.measured.n, alpha);
    return c;
  }
  c.outcome = outcome_of(c.measured, threshold, true);
  const Outcome other = outcome_of(v.share_ablation, threshold, true);
  const bool opposite = c.outcome != Outcome::open && other != Outcome::open && other != c.outcome;
  if (c.outcome == Outcome::open) {
    c.why = fmt::format("the interval holds {:.0f}%; raise run.steps", 100 * threshold);
  } else if (opposite) {
    c.outcome = Outcome::open;
    c.why = fmt::format("the stages say {:.1f}%, leaving selection out saves {:.1f}%: on opposite sides of {:.0f}%",
                        100 * c.measured.value, 100 * v.share_ablation.value, 100 * threshold);
  }
  return c;
}

CostBreakdown cost_breakdown(const std::string& name, const Samples& stages, const Samples& step, double alpha) {
  CostBreakdown cost{name, measured(stages, alpha), measured(step, alpha), true, {}};
  if (std::isnan(cost.stages.low) || std::isnan(cost.step.low)) return cost;
  cost.agree = cost.stages.low <= cost.step.high && cost.step.low <= cost.stages.high;
  if (cost.agree) return cost;
  const bool more = cost.stages.value > cost.step.value;
  if (name == "cmp" && more)
    cost.why = "left out, its scores are still formed, because selection needs them";
  else if (more)
    cost.why = "stages timed one by one neither overlap nor share a launch, and may wait for theirs";
  else
    cost.why = name == "step" ? "what lies between two stages is in none of them"
                              : "leaving it out also leaves more of the caches to the rest of the step";
  return cost;
}

std::vector<CostBreakdown> cost_breakdowns(const PointRecord& point, double alpha) {
  const Samples total = step_samples(point, "total");
  std::vector<CostBreakdown> list{cost_breakdown("step", stage_sum(point, all_stages), total, alpha)};
  const auto branch = [&](const char* name, std::initializer_list<Stage> stages) {
    const Samples without = step_samples(point, (std::string("ablation_") + name).c_str());
    list.push_back(cost_breakdown(name, stage_sum(point, stages), paired(total, without, std::minus<>()), alpha));
  };
  branch("cmp", {Stage::attend_cmp});
  branch("sel", selection);
  branch("win", {Stage::attend_win});
  return list;
}

// Verdicts

std::string number_of(const Condition& c) {
  switch (c.unit) {
    case Unit::share:
      return fmt::format("{:.1f}%", 100 * c.measured.value);
    case Unit::ratio:
      return fmt::format("{:.2f}x", c.measured.value);
    case Unit::error:
      break;
  }
  return fmt::format("{:.1e}", c.measured.value);
}

/// ", worst: N=... against sdpa" where the condition is about shapes.
std::string against(const Condition& c) { return c.why.starts_with("worst: ") ? ", " + c.why : ""; }

void decide(ContextVerdict& v, const Condition& speedup, const Condition& error) {
  std::string failed, open;
  const auto add = [](std::string& to, const std::string& text) { to += (to.empty() ? "" : "; ") + text; };
  for (const Condition* c : {static_cast<const Condition*>(&v.share), &speedup, &error}) {
    if (c->outcome == Outcome::not_met)
      add(failed, fmt::format("{} is not met ({}{})", c->name, number_of(*c), against(*c)));
    if (c->outcome == Outcome::open) add(open, fmt::format("{} is open ({})", c->name, c->why));
  }
  v.verdict = !failed.empty() ? Verdict::stay : !open.empty() ? Verdict::inconclusive : Verdict::proceed;
  v.why = !failed.empty() ? failed
          : !open.empty() ? open
                          : fmt::format(
                                "selection takes {}, the kernel is {} as fast as the fastest packed SDPA with its "
                                "gather on every shape ({}), mean error at most {}",
                                number_of(v.share), number_of(speedup), speedup.why, number_of(error));
}

ContextVerdict judge_context(const PointRecord& point, double alpha, const Condition& speedup, const Condition& error) {
  ContextVerdict v;
  v.context = integer_parameter(point, "run.context", 0);
  v.batch = integer_parameter(point, "run.batch", 1);
  v.share_ablation = measured(paired(step_samples(point, "ablation_sel"), step_samples(point, "total"),
                                     [](double without, double whole) { return 1 - without / whole; }),
                              alpha);
  v.one_hot =
      measured(paired(step_samples(point, "one_hot_sel"), step_samples(point, "total"), std::divides<>()), alpha);
  v.share_attention =
      measured(paired(stage_sum(point, selection), stage_sum(point, attention), std::divides<>()), alpha);
  v.share = share_condition(point, v, gate_share, alpha);
  v.share_high = share_condition(point, v, gate_share_high, alpha);
  v.costs = cost_breakdowns(point, alpha);
  decide(v, speedup, error);
  return v;
}

/// Every gap by name, those of one reason together: "context 256, context 512: not in d.h5 ...".
std::vector<std::string> gap_lines(const std::vector<Gap>& gaps) {
  std::vector<std::string> lines;
  for (std::size_t i = 0; i < gaps.size();) {
    std::string names = gaps[i].what;
    const std::string& why = gaps[i].why;
    while (++i < gaps.size() && gaps[i].why == why) names += ", " + gaps[i].what;
    lines.push_back(names + ": " + why);
  }
  return lines;
}

/// A context that the input asks for and that was not measured whole: its share is open.
ContextVerdict missing_context(const Gap& gap, const Condition& speedup, const Condition& error) {
  ContextVerdict v;
  v.context = gap.context;
  v.batch = gap.batch;
  const Measured nothing{none, none, none, 0};
  v.share = share_of_step(gate_share);
  v.share_high = share_of_step(gate_share_high);
  v.share.why = v.share_high.why = gap.why;
  v.share_ablation = v.one_hot = v.share_attention = nothing;
  for (const char* name : {"step", "cmp", "sel", "win"}) v.costs.push_back({name, nothing, nothing, true, {}});
  decide(v, speedup, error);
  return v;
}

/// The verdict of the device: a kernel is routed by length, so that one context where it pays is enough.
void decide(DeviceVerdict& device) {
  const auto with = [&](Verdict verdict) {
    std::string list;
    for (const ContextVerdict& v : device.contexts) {
      if (v.verdict != verdict) continue;
      list += fmt::format("{}{}", list.empty() ? "" : ", ", v.context);
      if (v.batch != 1) list += fmt::format(" (batch {})", v.batch);
    }
    return list;
  };
  const auto reason = [&](Verdict verdict) {
    const auto at = std::find_if(device.contexts.begin(), device.contexts.end(),
                                 [&](const ContextVerdict& v) { return v.verdict == verdict; });
    return fmt::format("at context {}: {}", at->context, at->why);
  };
  const std::string proceed = with(Verdict::proceed), stay = with(Verdict::stay), open = with(Verdict::inconclusive);
  const bool kernel_fails = device.speedup.outcome == Outcome::not_met || device.error.outcome == Outcome::not_met;
  if (!device.missing.empty() && !kernel_fails) {
    device.verdict = Verdict::inconclusive;
    device.why = fmt::format("not measured: {}{}{}", fmt::join(device.missing, "; "),
                             proceed.empty() ? "" : "; the kernel pays at contexts " + proceed,
                             stay.empty() ? "" : "; it does not at " + stay);
  } else if (device.contexts.empty()) {
    device.verdict = Verdict::inconclusive;
    device.why = fmt::format("no valid decode point, so no share of selection: {}", decode_run);
  } else if (!proceed.empty()) {
    device.verdict = Verdict::proceed;
    device.why =
        fmt::format("ship the kernel at contexts {}{}{}; {}{}", proceed,
                    stay.empty() ? "" : ", stay on sdpa at " + stay, open.empty() ? "" : ", undecided at " + open,
                    reason(Verdict::proceed), device.peers.empty() ? "; no library's SDPA is among the baselines" : "");
  } else if (!open.empty()) {
    device.verdict = Verdict::inconclusive;
    device.why = fmt::format("undecided at contexts {}{}; {}", open, stay.empty() ? "" : ", stay on sdpa at " + stay,
                             reason(Verdict::inconclusive));
  } else {
    device.verdict = Verdict::stay;
    device.why = fmt::format("stay on sdpa at every context measured; {}", reason(Verdict::stay));
  }
}

/// Condition 1 at every context that counts, and the verdict there.
void judge_contexts(DeviceVerdict& device, const DevicePoints& points, const std::vector<std::int64_t>& contexts) {
  const auto counts = [&](std::int64_t context) {
    return contexts.empty() || context == 0 || std::find(contexts.begin(), contexts.end(), context) != contexts.end();
  };
  std::vector<const PointRecord*> decode;
  for (const PointRecord* p : points.decode)
    if (counts(integer_parameter(*p, "run.context", 0))) decode.push_back(p);
  std::vector<Gap> gaps;
  std::copy_if(points.decode_gaps.begin(), points.decode_gaps.end(), std::back_inserter(gaps),
               [&](const Gap& gap) { return counts(gap.context); });
  const double alpha = family_alpha / static_cast<double>(std::max<std::size_t>(1, decode.size() + gaps.size()));
  for (const PointRecord* p : decode) device.contexts.push_back(judge_context(*p, alpha, device.speedup, device.error));
  for (const Gap& gap : gaps)
    if (gap.context > 0) device.contexts.push_back(missing_context(gap, device.speedup, device.error));
  device.missing = gap_lines(gaps);
  std::stable_sort(device.contexts.begin(), device.contexts.end(),
                   [](const ContextVerdict& a, const ContextVerdict& b) {
                     return std::pair(a.batch, a.context) < std::pair(b.batch, b.context);
                   });
}

DeviceVerdict judge_device(const DevicePoints& points, const std::vector<std::int64_t>& contexts) {
  DeviceVerdict device;
  device.device = points.device;
  device.backend = points.backend;
  device.git_commit = points.git_commit;
  device.precision = points.precision;
  device.measured = points.measured;
  device.files = points.files;
  device.commands = points.commands;
  device.notes = points.notes;
  device.peers = points.peers;
  if (points.peers.empty() && !points.kernels.empty())
    device.notes.push_back(fmt::format("no library's SDPA is among the baselines; on this device: {}", peers_run));
  std::ostringstream guards;
  print_guards(guards, points.dense);
  device.guards = guards.str();
  judge_shapes(device, points);
  judge_contexts(device, points, contexts);
  decide(device);
  return device;
}

}  // namespace

const char* word_of(Verdict verdict) {
  return verdict == Verdict::proceed ? "PROCEED" : verdict == Verdict::stay ? "STAY" : "INCONCLUSIVE";
}

const char* word_of(Outcome outcome) {
  return outcome == Outcome::met ? "met" : outcome == Outcome::not_met ? "not met" : "open";
}

std::vector<DeviceVerdict> judge(const std::vector<GateFile>& files, const std::vector<std::int64_t>& contexts) {
  std::vector<DeviceVerdict> devices;
  for (const DevicePoints& points : sort_files(files)) devices.push_back(judge_device(points, contexts));
  return devices;
}

}  // namespace nsa
