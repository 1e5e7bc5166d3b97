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
#include "nsa/report/metrics.hpp"
#include "nsa/report/report.hpp"

namespace nsa {
namespace {

constexpr double none = std::numeric_limits<double>::quiet_NaN();
constexpr double family_alpha = 0.05;  ///< all intervals of a condition hold together with 95% (Bonferroni)
constexpr const char* decode_run = "nsa run inputs/m4_decode.toml";
constexpr const char* kernels_run = "nsa run inputs/m4_kernels.toml";
constexpr const char* peers_run = "python3 scripts/bench_gpu.py --selection --output peers.h5";

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

/// A value without a finite interval decides nothing.
bool has_interval(const Measured& m) { return std::isfinite(m.value) && std::isfinite(m.low) && std::isfinite(m.high); }

Outcome outcome_of(const Measured& m, double threshold, bool at_least) {
  if (!has_interval(m)) return Outcome::open;
  const bool above = m.low >= threshold, below = m.high < threshold;
  if (at_least) return above ? Outcome::met : below ? Outcome::not_met : Outcome::open;
  return m.high <= threshold ? Outcome::met : m.low > threshold ? Outcome::not_met : Outcome::open;
}

std::string too_few(std::int64_t n, double alpha) {
  return fmt::format("{} samples give no interval here, {} do; raise run.steps", n, samples_needed(alpha));
}

// Condition 1

/// Why the share cannot be judged by this point; empty when it can.
std::string share_gap(const PointRecord& point) {
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

// Conditions 2 and 3

std::int64_t find_implementation(const KernelRecord& k, const char* name) {
  const auto at = std::find(k.implementations.begin(), k.implementations.end(), name);
  return at == k.implementations.end() ? -1 : at - k.implementations.begin();
}

/// One time of a shape that `fused` is compared with.
struct Baseline {
  std::string name;
  Measured speed;  ///< of `fused` over it
};

/// Repetition by repetition: both were measured in alternation.
Measured paired_ratio(const PointRecord& point, const std::string& of, double alpha) {
  const Summary s = kernel_ratio(point, of, "fused", alpha);
  return {s.median, s.low, s.high, s.n};
}

/// Of two runs: the ratio of the medians, between the ratios of their bounds, each of which misses with half of alpha.
Measured unpaired_ratio(const PointRecord& peer, const std::string& of, const PointRecord& point, double alpha) {
  const Summary base = summarise(kernel_samples(peer, of), alpha / 2);
  const Summary fused = summarise(kernel_samples(point, "fused"), alpha / 2);
  return {base.median / fused.median, base.low / fused.high, base.high / fused.low, std::min(base.n, fused.n)};
}

/// The baselines whose names end in one of `endings`: of this program, and of peers. "sdpa" gathers first.
std::vector<Baseline> baselines(const KernelEvidence& evidence, std::initializer_list<const char*> endings,
                                double alpha) {
  const auto is_one = [&](const std::string& name) {
    return std::any_of(endings.begin(), endings.end(), [&](const char* ending) { return name.ends_with(ending); });
  };
  std::vector<Baseline> list;
  for (const std::string& name : evidence.point->kernels.implementations)
    if (is_one(name)) list.push_back({name, paired_ratio(*evidence.point, name, alpha)});
  for (const PeerPoint& peer : evidence.peers)
    for (const std::string& name : peer.point->kernels.implementations)
      if (is_one(name)) list.push_back({name, unpaired_ratio(*peer.point, name, *evidence.point, alpha)});
  return list;
}

/// Speed over the fastest: the smallest value, and the smallest bounds, of all baselines. Without an interval where one
/// of them has none.
Speed over_fastest(const std::vector<Baseline>& list) {
  Speed speed{{none, none, none, 0}, {}};
  for (const Baseline& b : list) {
    Measured& m = speed.measured;
    if (!has_interval(b.speed)) return {b.speed, b.name};
    if (speed.baseline.empty()) m = b.speed;
    if (speed.baseline.empty() || b.speed.value < m.value) speed.baseline = b.name;
    m = {std::min(m.value, b.speed.value), std::min(m.low, b.speed.low), std::min(m.high, b.speed.high),
         std::min(m.n, b.speed.n)};
  }
  return speed;
}

Measured mean_error(const KernelRecord& k, double alpha) {
  const std::int64_t at = find_implementation(k, "fused");
  if (at < 0) return {none, none, none, 0};
  const double mean = k.mean_abs_err[static_cast<std::size_t>(at)];
  if (std::isnan(mean)) return {none, none, none, 0};  // run.check was off
  const double half = normal_quantile(alpha) * k.mean_abs_err_se[static_cast<std::size_t>(at)];
  return {mean, std::max(0.0, mean - half), mean + half, 1};
}

std::vector<ShapeResult> shape_results(const DevicePoints& points) {
  const double alpha = family_alpha / static_cast<double>(std::max<std::size_t>(1, points.kernels.size()));
  std::vector<ShapeResult> shapes;
  for (const KernelEvidence& evidence : points.kernels)
    shapes.push_back({shape_name(*evidence.point), kernel_variant(*evidence.point, "fused"),
                      over_fastest(baselines(evidence, {"sdpa"}, alpha)),
                      over_fastest(baselines(evidence, {"sdpa_packed", "flash_packed"}, alpha)),
                      mean_error(evidence.point->kernels, alpha)});
  return shapes;
}

/// "N=256 H=4 D=64 n=8 scattered and 46 more: not in k.h5 ...": the points that are missing, and why the first is.
std::string gap_text(const std::vector<Gap>& gaps) {
  return fmt::format("{}{}: {}", gaps.front().what,
                     gaps.size() == 1 ? "" : fmt::format(" and {} more", gaps.size() - 1), gaps.front().why);
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

/// A value of each shape, and the baseline that it is over; that of an error is empty.
using ShapeValue = std::function<Speed(const ShapeResult&)>;

/// Why the value of the shape has no interval.
std::string unknown_text(const std::string& shape, const Speed& value, double alpha) {
  const std::string of = value.baseline.empty() ? shape : fmt::format("{} against {}", shape, value.baseline);
  const Measured& m = value.measured;
  return m.n == 0 || std::isfinite(m.low) ? of + " lacks an implementation, or was not checked"
                                          : fmt::format("{}: {}", of, too_few(m.n, alpha));
}

/// A condition that every shape has to meet: the worst value of all shapes, and the worst bounds. `gaps`: the shapes
/// that leave it open.
Condition over_shapes(const std::vector<Gap>& gaps, const std::vector<ShapeResult>& shapes, const ShapeValue& value_of,
                      Condition c) {
  c.measured = {none, none, none, 0};
  if (shapes.empty()) {
    c.why = gaps.empty() ? fmt::format("not measured: {}", kernels_run) : gap_text(gaps);
    return c;
  }
  std::string worst, unknown;
  for (const ShapeResult& shape : shapes) {
    const Speed value = value_of(shape);
    const Measured& m = value.measured;
    if (!has_interval(m)) {
      if (unknown.empty()) unknown = unknown_text(shape.name, value, family_alpha / static_cast<double>(shapes.size()));
      continue;
    }
    if (worst.empty() || (c.at_least ? m.value < c.measured.value : m.value > c.measured.value))
      worst = shape.name + (value.baseline.empty() ? "" : " against " + value.baseline);
    if (std::isnan(c.measured.low)) c.measured = m;
    const auto pick = [&](double a, double b) { return c.at_least ? std::min(a, b) : std::max(a, b); };
    c.measured = {pick(c.measured.value, m.value), pick(c.measured.low, m.low), pick(c.measured.high, m.high),
                  std::min(c.measured.n, m.n)};
  }
  c.outcome = outcome_of(c.measured, c.threshold, c.at_least);
  if (!worst.empty()) c.why = "worst: " + worst;
  if (c.outcome == Outcome::not_met) return c;
  if (unknown.empty() && !gaps.empty()) unknown = gap_text(gaps);
  if (!unknown.empty()) {
    c.outcome = Outcome::open;
    c.why = unknown;
  } else if (c.outcome == Outcome::open) {
    c.why += fmt::format("; the interval holds {}, raise run.steps", c.threshold);
  }
  return c;
}

// Verdicts

std::string number_of(const Condition& c) {
  const bool share = c.threshold < 1 && c.at_least;
  return share        ? fmt::format("{:.1f}%", 100 * c.measured.value)
         : c.at_least ? fmt::format("{:.2f}x", c.measured.value)
                      : fmt::format("{:.1e}", c.measured.value);
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
  device.shapes = shape_results(points);
  const auto shapes = [&](const std::vector<Gap>& gaps, const ShapeValue& value_of, const char* name, double threshold,
                          bool at_least) {
    return over_shapes(gaps, device.shapes, value_of, {name, threshold, at_least, {}, Outcome::open, {}});
  };
  std::vector<Gap> speed_gaps = points.kernel_gaps;
  speed_gaps.insert(speed_gaps.end(), points.peer_gaps.begin(), points.peer_gaps.end());
  device.speedup = shapes(
      speed_gaps, [](const ShapeResult& s) { return s.with_gather; }, "speed over packed SDPA with its gather >= 1.2x",
      gate_speedup, true);
  device.speedup_packed = shapes(
      speed_gaps, [](const ShapeResult& s) { return s.packed; }, "speed over packed SDPA without the gather >= 1.2x",
      gate_speedup, true);
  device.error = shapes(
      points.kernel_gaps,
      [](const ShapeResult& s) {
        return Speed{s.error, {}};
      },
      "mean absolute error <= 1e-3", gate_error, false);
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
