// Prints the gate's page of a device as text, as a decision record and as JSON.

#include <fmt/format.h>
#include <fmt/ostream.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "kernels/diagnostics/json.hpp"
#include "nsa/gate/gate.hpp"
#include "nsa/report/metrics.hpp"

namespace nsa {
namespace {

std::string joined(const std::vector<std::string>& list) { return fmt::format("{}", fmt::join(list, ", ")); }

/// "31.2% [30.9, 31.5]": scaled, with its interval where there is one.
std::string with_interval(const Measured& m, double scale, int decimals, const char* unit) {
  if (std::isnan(m.value)) return "-";
  const std::string value = fmt::format("{:.{}f}{}", scale * m.value, decimals, unit);
  if (std::isnan(m.low)) return value + " [too few]";
  return fmt::format("{} [{:.{}f}, {:.{}f}]", value, scale * m.low, decimals, scale * m.high, decimals);
}

std::string share_text(const Measured& m) { return with_interval(m, 100, 1, "%"); }

std::string error_text(const Measured& m) {
  if (std::isnan(m.value)) return "-";
  return fmt::format("{:.1e} [{:.1e}, {:.1e}]", m.value, m.low, m.high);
}

void print_shares(std::ostream& out, const DeviceVerdict& device) {
  fmt::print(out,
             "1. selection (rank + attend_sel, by packed SDPA) as a share of a decode step, threshold 25% (and 30%)\n");
  if (device.contexts.empty()) {
    fmt::print(out, "   no valid decode point\n");
    return;
  }
  fmt::print(out, "{:>9} {:>5}  {:<22} {:<8} {:<8} {:<22} {:<22}\n", "context", "batch", "by its stages", ">= 25%",
             ">= 30%", "left out, saves", "of attention alone");
  for (const ContextVerdict& v : device.contexts)
    fmt::print(out, "{:>9} {:>5}  {:<22} {:<8} {:<8} {:<22} {:<22}\n", v.context, v.batch, share_text(v.share.measured),
               word_of(v.share.outcome), word_of(v.share_high.outcome), share_text(v.share_ablation),
               share_text(v.share_attention));
  std::string one_hot;
  for (const ContextVerdict& v : device.contexts)
    if (!std::isnan(v.one_hot.value))
      one_hot += fmt::format("{}{}: {:.0f}%", one_hot.empty() ? "" : ", ", v.context, 100 * v.one_hot.value);
  if (!one_hot.empty())
    fmt::print(out, "   nsa-vibe's way, a step with gates forced to sel over a step (nothing is left out): {}\n",
               one_hot);
  for (const ContextVerdict& v : device.contexts)
    if (!v.share.why.empty()) fmt::print(out, "   at {}: {}\n", v.context, v.share.why);
}

std::vector<std::string> baseline_programs(const DeviceVerdict& device) {
  std::vector<std::string> programs{"this program"};
  programs.insert(programs.end(), device.peers.begin(), device.peers.end());
  return programs;
}

void print_shapes(std::ostream& out, const DeviceVerdict& device) {
  const auto line = [&](const char* name, const Condition& c, const std::string& value, const char* sign) {
    fmt::print(out, "   {:<20} {:<30} {} {:<7} {:<8} {}\n", name, value, sign, c.threshold, word_of(c.outcome), c.why);
  };
  fmt::print(out,
             "2. custom kernel (fused) against the fastest packed SDPA of {}; each of {} shapes has to meet it; with "
             "the gather "
             "decides\n",
             joined(baseline_programs(device)), device.shapes.size());
  line("with the gather", device.speedup, with_interval(device.speedup.measured, 1, 2, "x"), ">=");
  line("without the gather", device.speedup_packed, with_interval(device.speedup_packed.measured, 1, 2, "x"), ">=");
  fmt::print(out, "3. mean absolute error of the custom kernel against float64, each of {} shapes\n",
             device.shapes.size());
  line("error", device.error, error_text(device.error.measured), "<=");
}

std::string cost_cell(const CostBreakdown& a) {
  if (std::isnan(a.stages.value) || std::isnan(a.step.value)) return "-";
  return fmt::format("{}, {}{}", time_text(a.stages.value), time_text(a.step.value), a.agree ? "" : " *");
}

std::string signed_time(double seconds) { return (seconds < 0 ? "-" : "+") + time_text(std::abs(seconds)); }

/// The contexts in which two measurements of a cost differ for one reason, and by how much.
struct Disagreement {
  double least = INFINITY, most = -INFINITY;
  std::vector<std::string> contexts;

  void add(const CostBreakdown& a, std::int64_t context) {
    const double more = a.stages.value - a.step.value;
    least = std::min(least, more), most = std::max(most, more);
    contexts.push_back(std::to_string(context));
  }
  std::string text(std::size_t all) const {
    const std::string low = signed_time(least), high = signed_time(most);
    return fmt::format("{}{} at {}", low, low == high ? "" : " to " + high,
                       contexts.size() == all && all > 1 ? "every context" : joined(contexts));
  }
};

/// The difference of the two shares of selection, and whether it matters for the first condition.
void print_share_difference(std::ostream& out, const std::vector<ContextVerdict>& contexts) {
  double least = INFINITY, most = 0;
  int counted = 0, same_side = 0;
  for (const ContextVerdict& v : contexts) {
    const double stages = v.share.measured.value, ablation = v.share_ablation.value;
    if (std::isnan(stages) || std::isnan(ablation)) continue;
    least = std::min(least, std::abs(stages - ablation)), most = std::max(most, std::abs(stages - ablation));
    ++counted;
    same_side += (stages >= gate_share) == (ablation >= gate_share);
  }
  if (counted > 0)
    fmt::print(
        out,
        "   selection's share by its stages and by leaving it out: {:.1f} to {:.1f} points apart, on one side of "
        "{:.0f}% at {} of {} contexts\n",
        100 * least, 100 * most, 100 * gate_share, same_side, counted);
}

void print_costs(std::ostream& out, const DeviceVerdict& device) {
  if (device.contexts.empty()) return;
  fmt::print(
      out,
      "Do the parts add up? step: the sum of its stages, each timed by itself, and the step as it runs. cmp, sel, "
      "win: the\nbranch's stages, and what the step saves when the branch is left out. *: the intervals of the "
      "two do not overlap.\n");
  fmt::print(out, "{:>9} {:>5}", "context", "batch");
  for (const CostBreakdown& a : device.contexts[0].costs) fmt::print(out, "  {:<21}", a.name);
  fmt::print(out, "\n");
  std::map<std::string, Disagreement> reasons;  // by name and reason
  for (const ContextVerdict& v : device.contexts) {
    fmt::print(out, "{:>9} {:>5}", v.context, v.batch);
    for (const CostBreakdown& a : v.costs) {
      fmt::print(out, "  {:<21}", cost_cell(a));
      if (a.agree) continue;
      reasons[fmt::format("{} ({})", a.name, a.why)].add(a, v.context);
    }
    fmt::print(out, "\n");
  }
  for (const auto& [what, disagreement] : reasons)
    fmt::print(out, "   * {}: first minus second {}\n", what, disagreement.text(device.contexts.size()));
  print_share_difference(out, device.contexts);
}

// JSON. Numbers that were not measured are NaN and become null.

Json measured_json(const Measured& m) { return {{"value", m.value}, {"low", m.low}, {"high", m.high}, {"n", m.n}}; }

Json condition_json(const Condition& c) {
  return {{"name", c.name},
          {"threshold", c.threshold},
          {"measured", measured_json(c.measured)},
          {"outcome", word_of(c.outcome)},
          {"why", c.why}};
}

Json costs_json(const CostBreakdown& a) {
  return {{"name", a.name},
          {"stages", measured_json(a.stages)},
          {"step", measured_json(a.step)},
          {"agree", a.agree},
          {"why", a.why}};
}

Json context_json(const ContextVerdict& v) {
  return {{"context", v.context},
          {"batch", v.batch},
          {"verdict", word_of(v.verdict)},
          {"why", v.why},
          {"share", condition_json(v.share)},
          {"share_30", condition_json(v.share_high)},
          {"share_ablation", measured_json(v.share_ablation)},
          {"share_attention", measured_json(v.share_attention)},
          {"one_hot", measured_json(v.one_hot)},
          {"accounts", json_list(v.costs, costs_json)}};
}

Json shape_json(const ShapeResult& s) {
  return {{"name", s.name},
          {"kernel", s.kernel},
          {"with_gather", measured_json(s.with_gather.measured)},
          {"with_gather_baseline", s.with_gather.baseline},
          {"packed", measured_json(s.packed.measured)},
          {"packed_baseline", s.packed.baseline},
          {"error", measured_json(s.error)}};
}

Json device_json(const DeviceVerdict& d) {
  return {{"device", d.device},
          {"backend", d.backend},
          {"git_commit", d.git_commit},
          {"precision", d.precision},
          {"measured", d.measured},
          {"files", d.files},
          {"verdict", word_of(d.verdict)},
          {"why", d.why},
          {"speedup", condition_json(d.speedup)},
          {"speedup_packed", condition_json(d.speedup_packed)},
          {"error", condition_json(d.error)},
          {"contexts", json_list(d.contexts, context_json)},
          {"shapes", json_list(d.shapes, shape_json)},
          {"peers", d.peers},
          {"missing", d.missing},
          {"notes", d.notes}};
}

Json row_json(const CsvAuditRow& r) {
  return {{"context", r.context},
          {"total_ms", r.total},
          {"cmp_ms", r.branch[0]},
          {"sel_ms", r.branch[1]},
          {"win_ms", r.branch[2]},
          {"reads_actual", r.reads_actual},
          {"reads_expected", r.reads_expected}};
}

Json audit_json(const CsvAudit& a) {
  return {{"file", a.path},
          {"verdict", a.evidence() ? "CONSISTENT" : "NOT EVIDENCE"},
          {"findings", a.findings},
          {"notes", a.notes},
          {"rows", json_list(a.rows, row_json)}};
}

}  // namespace

void print_gate(std::ostream& out, const DeviceVerdict& device) {
  fmt::print(out, "{} ({}), {}, commit {}\nfiles: {}\n\n", device.device, device.backend, device.precision,
             device.git_commit, joined(device.files));
  print_shares(out, device);
  print_shapes(out, device);
  fmt::print(out, "Intervals: 95% for all contexts, or shapes, of a condition together.\n\n");
  print_costs(out, device);
  if (!device.guards.empty()) fmt::print(out, "\n{}", device.guards);
  for (const std::string& note : device.notes) fmt::print(out, "note: {}\n", note);
  fmt::print(out, "\nVERDICT: {} ({})\n", word_of(device.verdict), device.why);
}

void print_adr(std::ostream& out, const DeviceVerdict& device) {
  fmt::print(out, "# Selection kernel on {}: {}\n\n", device.device, word_of(device.verdict));
  fmt::print(out, "- Status: {}, by the rule in [METRICS.md](../METRICS.md#the-gate); written by `nsa gate --adr`\n",
             device.verdict == Verdict::inconclusive ? "open" : "decided");
  fmt::print(out, "- Measured: {}, commit {}, {}, {} backend\n", device.measured, device.git_commit, device.precision,
             device.backend);
  for (std::size_t i = 0; i < device.files.size(); ++i)
    fmt::print(out, "- `{}`: `{}`\n", device.files[i], device.commands[i]);
  fmt::print(out, "- Baselines: packed SDPA of {}\n", joined(baseline_programs(device)));
  fmt::print(
      out,
      "\n## Question\n\nIs a custom selection kernel (`fused`) worth shipping on this device instead of packed SDPA "
      "(`sdpa`)?\n\n## Decision\n\n**{}**: {}.\n\n## Evidence\n\n```\n",
      word_of(device.verdict), device.why);
  print_gate(out, device);
  fmt::print(out,
             "```\n\nSpeed of fused over the fastest baseline, which is named:\n\n| shape | ran as | with the gather | "
             "| packed before | | mean error |\n|---|---|---|---|---|---|---|\n");
  for (const ShapeResult& s : device.shapes)
    fmt::print(out, "| {} | {} | {} | {} | {} | {} | {} |\n", s.name, s.kernel.empty() ? "-" : s.kernel,
               with_interval(s.with_gather.measured, 1, 2, "x"), s.with_gather.baseline,
               with_interval(s.packed.measured, 1, 2, "x"), s.packed.baseline, error_text(s.error));
  fmt::print(out,
             "\n## What would change it\n\nAnother device, driver or build: run the commands above there and `nsa "
             "gate` on the "
             "files. A routing entry follows this record and names it.\n");
}

void print_gate_json(std::ostream& out, const std::vector<DeviceVerdict>& devices,
                     const std::vector<CsvAudit>& audits) {
  const Json thresholds{
      {"share", gate_share}, {"share_high", gate_share_high}, {"speedup", gate_speedup}, {"error", gate_error}};
  const Json document{{"gate", 1},
                      {"thresholds", thresholds},
                      {"devices", json_list(devices, device_json)},
                      {"audits", json_list(audits, audit_json)}};
  out << json_text(document) << '\n';
}

}  // namespace nsa
