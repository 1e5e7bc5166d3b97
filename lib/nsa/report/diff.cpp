#include "nsa/report/diff.hpp"

#include <fmt/format.h>
#include <fmt/ostream.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <span>

#include "kernels/diagnostics/error.hpp"
#include "nsa/report/metrics.hpp"
#include "nsa/report/report.hpp"
#include "nsa/results/error_bound.hpp"
#include "nsa/results/result_file.hpp"

namespace nsa {
namespace {

/// Parameters that say how a run was made and measured, not what it computes.
bool decides_result(const std::string& key) {
  for (const char* prefix : {"input.", "parallel.", "route.", "runtime.", "output.", "run.backend", "run.modes",
                             "run.warmup", "run.min_time", "run.deadline", "run.check"}) {
    if (key.starts_with(prefix)) return false;
  }
  return true;
}

bool is_kernels(const PointRecord& p) { return text_parameter(p, "task.kind") == "kernels"; }

std::string text_of(const decltype(Parameter::second)& value) {
  return std::visit([](const auto& v) { return fmt::format("{}", v); }, value);
}

/// "key: a, b" for every parameter that differs; `deciding`: of those that decide the result, else of the others.
std::vector<std::string> different_parameters(const PointRecord& a, const PointRecord& b, bool deciding) {
  const std::map<std::string, decltype(Parameter::second)> of_a(a.parameters.begin(), a.parameters.end()),
      of_b(b.parameters.begin(), b.parameters.end());
  std::set<std::string> keys;
  for (const auto* side : {&of_a, &of_b}) {
    for (const auto& [key, value] : *side) keys.insert(key);
  }
  std::vector<std::string> list;
  for (const std::string& key : keys) {
    const auto at_a = of_a.find(key), at_b = of_b.find(key);
    if (at_a != of_a.end() && at_b != of_b.end() && at_a->second == at_b->second) continue;
    if (decides_result(key) != deciding) continue;
    list.push_back(fmt::format("{}: {}, {}", key, at_a == of_a.end() ? "-" : text_of(at_a->second),
                               at_b == of_b.end() ? "-" : text_of(at_b->second)));
  }
  return list;
}

/// Reads by branch and step, summed over ranks: equal for all layouts.
std::vector<std::int64_t> summed_over_ranks(const ReadTable& reads) {
  std::vector<std::int64_t> sums(static_cast<std::size_t>(branches * reads.steps), 0);
  for (std::int64_t branch = 0; branch < branches; ++branch)
    for (std::int64_t rank = 0; rank < reads.ranks; ++rank)
      for (std::int64_t step = 0; step < reads.steps; ++step)
        sums[branch * reads.steps + step] += reads.counted[(branch * reads.ranks + rank) * reads.steps + step];
  return sums;
}

/// The differences of the results; empty when they agree.
std::vector<std::string> differences(const PointRecord& a, const PointRecord& b) {
  std::vector<std::string> list = different_parameters(a, b, true);
  if (summed_over_ranks(a.reads) != summed_over_ranks(b.reads))
    list.push_back(
        fmt::format("reads: {:.10g}, {:.10g} at the last step", last_reads(a).counted, last_reads(b).counted));
  if (a.valid != b.valid)
    list.push_back(fmt::format("validity: {}, {}", a.valid ? "VALID" : "INVALID (" + a.reason + ")",
                               b.valid ? "VALID" : "INVALID (" + b.reason + ")"));
  return list;
}

DType precision_of(const PointRecord& point) {
  for (const DType type : {DType::f32, DType::f16})
    if (text_parameter(point, "model.precision") == name_of(type)) return type;
  return DType::bf16;
}

/// The difference of the outputs where both files hold them; "" where rounding explains it. It is a mean, because a
/// near tie may select another block in a few rows.
std::string output_difference(TensorFile& of_a, const PointRecord& a, TensorFile& of_b, const PointRecord& b) {
  of_a.select_point(a.index);
  of_b.select_point(b.index);
  for (const char* name : {"y", "o"}) {
    if (!of_a.has(name) || !of_b.has(name)) continue;
    const std::vector<std::int64_t> shape = of_a.shape(name), zero(shape.size(), 0);
    if (of_b.shape(name) != shape) return fmt::format("{}: of another shape", name);
    const std::vector<float> x = of_a.read(name, shape, zero, shape), y = of_b.read(name, shape, zero, shape);
    const std::size_t width = static_cast<std::size_t>(shape.empty() ? 1 : std::max<std::int64_t>(1, shape.back()));
    double difference = 0, bound = 0;
    for (std::size_t row = 0; row + width <= x.size(); row += width) {
      for (std::size_t i = row; i < row + width; ++i) difference += std::abs(double{x[i]} - y[i]);
      bound += static_cast<double>(width) *
               error_bound(precision_of(a), largest_magnitude(std::span(x).subspan(row, width)));
    }
    const double n = static_cast<double>(std::max<std::size_t>(1, x.size()));
    if (!(difference <= bound))
      return fmt::format("{}: mean difference {:.3g} (rounding: {:.3g})", name, difference / n, bound / n);
    return {};
  }
  return {};
}

std::string interval_text(const Summary& s) {
  if (std::isnan(s.low)) return time_text(s.median) + " [n < 6]";
  return fmt::format("{} [{}, {}]", time_text(s.median), time_text(s.low), time_text(s.high));
}

/// "slower" or "faster" only where the 95% intervals of the medians do not overlap.
const char* verdict(const Summary& a, const Summary& b) {
  if (std::isnan(a.low) || std::isnan(b.low)) return "too few samples";
  return b.low > a.high ? "slower" : b.high < a.low ? "faster" : "no difference shown";
}

void print_time(std::ostream& out, const char* mode, std::string_view what, const Summary& a, const Summary& b) {
  if (a.n == 0 || b.n == 0) return;
  fmt::print(out, "  {:<9} {:<12} {:>32} {:>32} {:>7}  {}\n", mode, what, interval_text(a), interval_text(b),
             a.median > 0 ? fmt::format("{:.3f}", b.median / a.median) : "-", verdict(a, b));
}

void print_times(std::ostream& out, const PointRecord& a, const PointRecord& b) {
  const bool kernels = is_kernels(a);
  fmt::print(out, "  {:<9} {:<12} {:>32} {:>32} {:>7}\n", "mode", kernels ? "by" : "stage", "A median [95%]",
             "B median [95%]", "B/A");
  const auto print_stage = [&](const char* mode, Stage stage) {
    print_time(out, mode, stage_names[static_cast<std::size_t>(stage)], stage_time(a, mode, stage),
               stage_time(b, mode, stage));
  };
  print_stage("total", Stage::step);
  for (int stage = 0; stage < stage_count; ++stage) print_stage("branches", static_cast<Stage>(stage));
  for (const std::string& name : a.kernels.implementations)
    print_time(out, "kernels", name, summarise(kernel_samples(a, name)), summarise(kernel_samples(b, name)));
}

/// The key by which points of two files are paired.
std::string sweep_key(const PointRecord& p) {
  if (is_kernels(p))
    return fmt::format("kernels, {}, batch {}", kernel_point_name(p), integer_parameter(p, "run.batch", 1));
  return fmt::format("{}, context {}, batch {}, forced branch {}", text_parameter(p, "task.kind"),
                     integer_parameter(p, "run.context", 0), integer_parameter(p, "run.batch", 1),
                     text_parameter(p, "run.force_branch", "none"));
}

/// The first point of each key.
std::map<std::string, const PointRecord*> by_sweep_key(const ResultFile& file) {
  std::map<std::string, const PointRecord*> points;
  for (const PointRecord& point : file.points) points.emplace(sweep_key(point), &point);
  return points;
}

}  // namespace

bool diff_results(std::ostream& out, const std::string& path_a, const std::string& path_b) {
  const ResultFile a = read_result(path_a), b = read_result(path_b);
  fmt::print(out, "A: {} ({})\nB: {} ({})\n", path_a, a.run.start, path_b, b.run.start);
  TensorFile tensors_a(path_a, TensorFile::OfPoints{}), tensors_b(path_b, TensorFile::OfPoints{});
  const std::map<std::string, const PointRecord*> points_a = by_sweep_key(a), points_b = by_sweep_key(b);
  bool same = true;
  std::size_t paired = 0;
  for (const PointRecord& of_a : a.points) {
    const auto found = points_b.find(sweep_key(of_a));
    if (found == points_b.end()) {
      fmt::print(out, "\n{}: only in A\n", sweep_key(of_a));
      continue;
    }
    const PointRecord* at = found->second;
    ++paired;
    std::vector<std::string> list = differences(of_a, *at);
    if (const std::string output = output_difference(tensors_a, of_a, tensors_b, *at); !output.empty())
      list.push_back(output);
    same &= list.empty();
    fmt::print(out, "\n{}: {}\n", sweep_key(of_a), list.empty() ? "the same result" : "results differ");
    for (const std::string& line : list) fmt::print(out, "  differs: {}\n", line);
    for (const std::string& line : different_parameters(of_a, *at, false))
      fmt::print(out, "  run otherwise: {}\n", line);
    if (of_a.heads != at->heads || of_a.kv != at->kv)
      fmt::print(out, "  run otherwise: heads x kv: {} x {}, {} x {}\n", of_a.heads, of_a.kv, at->heads, at->kv);
    print_times(out, of_a, *at);
  }
  for (const PointRecord& of_b : b.points) {
    if (!points_a.contains(sweep_key(of_b))) fmt::print(out, "\n{}: only in B\n", sweep_key(of_b));
  }
  if (paired == 0)
    throw UserError(
        fmt::format("{} and {} have no point in common (task, context, batch and forced branch, or shape, pair them); "
                    "compare runs of the same sweep",
                    path_a, path_b));
  fmt::print(out, "\nDIFF: {} ({} points compared)\n", same ? "SAME" : "DIFFERENT", paired);
  return same;
}

}  // namespace nsa
