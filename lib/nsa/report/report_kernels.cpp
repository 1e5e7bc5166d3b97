// Prints points of kind = "kernels".

#include <fmt/format.h>
#include <fmt/ostream.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "nsa/report/metrics.hpp"
#include "nsa/report/report.hpp"

namespace nsa {
namespace {

constexpr double guard_speedup = 1.2;   ///< nsa-vibe's production threshold for FA-2
constexpr std::int64_t never = 999999;  ///< nsa-vibe's value for "not at any length"
constexpr const char* columns[] = {"fused", "sdpa", "sdpa_packed", "flash_packed", "masked", "flash"};

/// The implementations that have no column: kernels of fused where the input names them, those of peers.
std::vector<std::string> others(const PointRecord& p) {
  std::vector<std::string> names;
  for (const std::string& name : p.kernels.implementations)
    if (std::find(std::begin(columns), std::end(columns), name) == std::end(columns)) names.push_back(name);
  return names;
}

std::string branch_of(const PointRecord& p) { return text_parameter(p, "kernels.branch", "sel"); }

/// The custom implementation: `fused` for sel; `flash` for cmp and win, or `fused` where the backend has no `flash`.
const char* custom_of(const PointRecord& p) {
  return branch_of(p) == "sel" || kernel_samples(p, "flash").empty() ? "fused" : "flash";
}

std::string ratio_text(const Summary& s) {
  if (std::isnan(s.median)) return "-";
  if (std::isnan(s.low)) return fmt::format("{:.2f}x [n < 6]", s.median);
  return fmt::format("{:.2f}x [{:.2f}, {:.2f}]", s.median, s.low, s.high);
}

std::string error_text(const PointRecord& p, std::vector<double> KernelRecord::*errors) {
  const KernelRecord& k = p.kernels;
  const auto at = std::find(k.implementations.begin(), k.implementations.end(), custom_of(p));
  if (at == k.implementations.end()) return "-";
  const double error = (k.*errors)[static_cast<std::size_t>(at - k.implementations.begin())];
  return std::isnan(error) ? "-" : fmt::format("{:.1e}", error);
}

/// Context -> the smallest ratio of the time of sdpa to that of flash, for one branch.
std::map<std::int64_t, Summary> flash_ratios(const std::vector<const PointRecord*>& points, const std::string& branch) {
  std::map<std::int64_t, Summary> worst;
  for (const PointRecord* p : points) {
    if (branch_of(*p) != branch || !p->valid || !p->noisy.empty()) continue;
    const Summary ratio = kernel_ratio(*p, "sdpa", custom_of(*p));
    if (std::isnan(ratio.low)) continue;
    const auto [entry, inserted] = worst.emplace(integer_parameter(*p, "run.context", 0), ratio);
    if (!inserted && ratio.low < entry->second.low) entry->second = ratio;
  }
  return worst;
}

}  // namespace

std::string kernel_point_name(const PointRecord& p) {
  std::string name = branch_of(p);
  if (const std::int64_t rows = integer_parameter(p, "kernels.rows", 0); rows > 0) name += fmt::format("_N{}", rows);
  name +=
      fmt::format("_H{}_D{}", integer_parameter(p, "kernels.heads", 0), integer_parameter(p, "kernels.head_size", 0));
  if (branch_of(p) == "sel")
    name += fmt::format("_n{}_{}", integer_parameter(p, "kernels.blocks", 0), text_parameter(p, "kernels.spans"));
  return name + fmt::format("_context_{}", integer_parameter(p, "run.context", 0));
}

std::vector<Metric> kernel_metrics(const PointRecord& p) {
  const std::string name = kernel_point_name(p), custom = custom_of(p);
  std::vector<Metric> metrics;
  const auto add = [&](const std::string& what, double value, int decimals, const char* unit) {
    if (!std::isnan(value)) metrics.push_back({what + "_" + name, fmt::format("{:.{}f}", value, decimals), unit});
  };
  const auto add_time = [&](const std::string& implementation) {
    add(fmt::format("kernels_{}_time", implementation), 1e6 * summarise(kernel_samples(p, implementation)).median, 3,
        "us");
  };
  std::for_each(std::begin(columns), std::end(columns), add_time);
  for (const std::string& name : others(p)) add_time(name);
  add("kernels_speedup", kernel_ratio(p, "sdpa", custom).median, 3, "1");
  add("kernels_speedup_packed", kernel_ratio(p, fastest_packed(p), custom).median, 3, "1");
  if (const std::string error = error_text(p, &KernelRecord::mean_abs_err); error != "-")
    metrics.push_back({"kernels_mean_abs_err_" + name, error, "1"});
  return metrics;
}

void print_kernels_header(std::ostream& out) {
  fmt::print(out, "{:<3} {:>7} {:>6} {:>3} {:>4} {:>3} {:<10}", "", "context", "N", "H", "D", "n", "spans");
  for (const char* name : columns) fmt::print(out, " {:>11}", name);
  fmt::print(out, " {:<22} {:<22} {:>8} {:>8}  {}\n", "  sdpa/custom", "  packed/custom", "mean err", "max err",
             "ran as");
}

void print_kernels_row(std::ostream& out, const PointRecord& p) {
  const bool selects = branch_of(p) == "sel";
  const std::int64_t context = integer_parameter(p, "run.context", 0), rows = integer_parameter(p, "kernels.rows", 0);
  fmt::print(out, "{:<3} {:>7} {:>6} {:>3} {:>4} {:>3} {:<10}", branch_of(p), context, rows == 0 ? context : rows,
             integer_parameter(p, "kernels.heads", 0), integer_parameter(p, "kernels.head_size", 0),
             selects ? fmt::format("{}", integer_parameter(p, "kernels.blocks", 0)) : "",
             selects ? text_parameter(p, "kernels.spans") : "");
  for (const char* name : columns) fmt::print(out, " {:>11}", time_text(summarise(kernel_samples(p, name)).median));
  std::string ran = kernel_variant(p, custom_of(p));
  for (const std::string& name : others(p))
    ran += fmt::format("{}{} {}", ran.empty() ? "" : ", ", name, time_text(summarise(kernel_samples(p, name)).median));
  fmt::print(out, "   {:<20}   {:<20} {:>8} {:>8}  {}{}{}\n", ratio_text(kernel_ratio(p, "sdpa", custom_of(p))),
             ratio_text(kernel_ratio(p, fastest_packed(p), custom_of(p))), error_text(p, &KernelRecord::mean_abs_err),
             error_text(p, &KernelRecord::max_abs_err), ran, p.noisy.empty() ? "" : "  NOISY",
             p.valid ? "" : "  INVALID");
}

void print_kernels_notes(std::ostream& out, const std::vector<PointRecord>& points) {
  fmt::print(
      out,
      "N: query rows   H: heads that share one K and V   D: head size   n: selected blocks   spans: their "
      "positions\n"
      "fused to flash: time of each implementation, median of the slowest rank\n"
      "  sdpa: gather, then SDPA   sdpa_packed, flash_packed: K and V packed before; the faster one counts\n"
      "custom: fused for sel, else flash (fused where there is no flash)   ran as: its kernel in the backend, then the "
      "implementations without a column\n"
      "mean err, max err: of the custom implementation, against float64\n");
  std::vector<const PointRecord*> all;
  for (const PointRecord& point : points) all.push_back(&point);
  print_guards(out, all);
}

void print_guards(std::ostream& out, const std::vector<const PointRecord*>& points) {
  for (const char* branch : {"win", "cmp"}) {
    const std::map<std::int64_t, Summary> ratios = flash_ratios(points, branch);
    std::set<std::int64_t> noisy;
    for (const PointRecord* p : points)
      if (branch_of(*p) == branch && !p->noisy.empty()) noisy.insert(integer_parameter(*p, "run.context", 0));
    if (!noisy.empty())
      fmt::print(out, "flash over sdpa, {}: NOISY, and left out: {}\n", branch, fmt::join(noisy, ", "));
    if (ratios.empty()) continue;
    std::int64_t from = never;
    for (auto at = ratios.rbegin(); at != ratios.rend() && at->second.low >= guard_speedup; ++at) from = at->first;
    fmt::print(out, "flash over sdpa, {}:", branch);
    for (const auto& [context, ratio] : ratios) fmt::print(out, " {}: {}", context, ratio_text(ratio));
    fmt::print(out, "\n[runtime] fa2_min_len_{} = {}{}\n", branch, from,
               from == never
                   ? fmt::format("  # below {}x at {}, the longest measured", guard_speedup, ratios.rbegin()->first)
                   : fmt::format("  # at least {}x from {} to {}", guard_speedup, from, ratios.rbegin()->first));
  }
}

}  // namespace nsa
