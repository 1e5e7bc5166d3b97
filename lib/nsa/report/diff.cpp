#include "nsa/report/diff.hpp"

#include <fmt/format.h>
#include <fmt/ostream.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <set>
#include <span>
#include <tuple>
#include <utility>

#include "kernels/diagnostics/error.hpp"
#include "nsa/report/metrics.hpp"
#include "nsa/report/report.hpp"
#include "nsa/results/error_bound.hpp"
#include "nsa/results/files.hpp"
#include "nsa/results/result_file.hpp"
#include "nsa/results/temporary_file.hpp"

namespace nsa {
namespace {

/// Parameters that say how a run was made and measured, not what it computes.
bool decides_result(const std::string& key) {
  for (const char* prefix :
       {"input.", "parallel.", "route.", "runtime.", "output.", "run.backend", "run.modes", "run.warmup", "run.min_",
        "run.interval_time", "run.throttle_", "run.recovery_delay", "run.steps_per_graph", "run.deadline", "run.check",
        "run.copy_bytes", "cache.layout", "cache.page", "cache.order"}) {
    if (key.starts_with(prefix)) return false;
  }
  return true;
}

bool is_kernels(const PointRecord& p) { return text_parameter(p, "task.kind") == "kernels"; }

/// Whether the blocks of a step were given, so that it did not rank.
bool replays(const PointRecord& p) { return !is_kernels(p) && !text_parameter(p, "input.selection").empty(); }

/// Why the steps of two points are different work; "" where they are not.
const char* other_work(const PointRecord& a, const PointRecord& b) {
  if (replays(a) == replays(b)) return "";
  return replays(a) ? "only B ranks" : "only A ranks";
}

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
    const bool missing = at_a == of_a.end() || at_b == of_b.end();
    if (missing && key.starts_with("batch.")) continue;  // a file of schema 1.5 or earlier; its sequences are equal
    if (missing && key.starts_with("cache.")) continue;  // 1.6 or earlier: contiguous
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

/// The samples of a stage, or of an implementation, in both files.
struct Series {
  std::string point, mode, what;
  std::vector<double> a, b;
  const char* why = "";  ///< why its times cannot be compared
};

/// The series that both points have.
std::vector<Series> common_series(const std::string& point, const PointRecord& a, const PointRecord& b) {
  std::vector<Series> list;
  const auto add = [&](const std::string& mode, const std::string& what, std::vector<double> of_a,
                       std::vector<double> of_b) {
    if (of_a.empty() || of_b.empty()) return;
    const bool noisy = !a.noisy.empty() || !b.noisy.empty();
    const char* work = what == "step" ? other_work(a, b) : "";
    list.push_back({point, mode, what, std::move(of_a), std::move(of_b), work[0] != 0 ? work : noisy ? "NOISY" : ""});
  };
  const auto add_stage = [&](const char* mode, Stage stage) {
    add(mode, stage_names[static_cast<std::size_t>(stage)], slowest_samples(a, mode, stage),
        slowest_samples(b, mode, stage));
  };
  add_stage("total", Stage::step);
  for (int stage = 0; stage < stage_count; ++stage) add_stage("branches", static_cast<Stage>(stage));
  for (const std::string& name : a.kernels.implementations)
    add("kernels", name, kernel_samples(a, name), kernel_samples(b, name));
  return list;
}

struct Comparison {
  Summary a, b;
  Ratio ratio;
  Difference difference = Difference::unclear;
  const char* why = "";  ///< where it is unclear for another reason than the width of the interval
};

/// `series`: how many are compared; their intervals hold together.
Comparison compare(const Series& s, std::size_t series, bool cuda) {
  const RunVariation& variation = s.mode == "branches" ? stage_variation : cuda ? cuda_variation : host_variation;
  const double alpha = family_error / static_cast<double>(series);
  Comparison c{summarise(s.a), summarise(s.b), median_ratio(s.a, s.b, alpha, variation.between_runs)};
  c.why = s.why;
  if (c.why[0] == 0 && std::isnan(c.ratio.low)) c.why = "too few samples";
  c.difference = c.why[0] != 0 ? Difference::unclear : judge_ratio(c.ratio, variation.same_margin);
  return c;
}

void print_times_header(std::ostream& out, const PointRecord& p) {
  fmt::print(out, "  {:<9} {:<12} {:>32} {:>32} {:>22}\n", "mode", is_kernels(p) ? "by" : "stage", "A median [95%]",
             "B median [95%]", "B/A [99% all]");
}

void print_times_row(std::ostream& out, const Series& s, const Comparison& c) {
  const std::string ratio = std::isnan(c.ratio.low)
                                ? fmt::format("{:.3f}", c.ratio.value)
                                : fmt::format("{:.3f} [{:.3f}, {:.3f}]", c.ratio.value, c.ratio.low, c.ratio.high);
  fmt::print(out, "  {:<9} {:<12} {:>32} {:>32} {:>22}  {}{}\n", s.mode, s.what, interval_text(c.a), interval_text(c.b),
             ratio, word_of(c.difference), c.why[0] == 0 ? "" : fmt::format(" ({})", c.why));
}

std::string csv_row(const Series& s, const Comparison& c) {
  const auto number = [](double value) { return std::isnan(value) ? "" : fmt::format("{:.9g}", value); };
  const auto side = [&](const Summary& of) {
    return fmt::format("{},{},{},{}", of.n, number(of.median), number(of.low), number(of.high));
  };
  return fmt::format("\"{}\",{},{},{},{},{},{},{},{},{}\n", s.point, s.mode, s.what, side(c.a), side(c.b),
                     number(c.ratio.value), number(c.ratio.low), number(c.ratio.high), word_of(c.difference), c.why);
}

/// Collects the verdicts of all series: what the last lines, the CSV and the exit code say.
class Verdicts {
 public:
  Verdicts(std::size_t series, bool cuda, double fail_above) : series_(series), cuda_(cuda), fail_above_(fail_above) {}

  void add(std::ostream& out, const Series& s) {
    const Comparison c = compare(s, series_, cuda_);
    print_times_row(out, s, c);
    csv_ += csv_row(s, c);
    ++counts_[static_cast<std::size_t>(c.difference)];
    if (c.difference == Difference::slower && c.ratio.value > 1 + fail_above_)
      too_slow_.push_back(fmt::format("{}: {} {} takes {:.3f} times as long", s.point, s.mode, s.what, c.ratio.value));
  }
  void print(std::ostream& out) const {
    for (const std::string& line : too_slow_) fmt::print(out, "\nSLOWER than allowed: {}", line);
    fmt::print(out, "\nTIMES:");
    for (const Difference d : {Difference::same, Difference::faster, Difference::slower, Difference::unclear})
      fmt::print(out, " {} {}", counts_[static_cast<std::size_t>(d)], word_of(d));
    fmt::print(out, " of {} series\n", series_);
  }
  const std::string& csv() const { return csv_; }
  bool too_slow() const { return !too_slow_.empty(); }

 private:
  std::size_t series_;
  bool cuda_;
  double fail_above_;
  std::array<int, 4> counts_{};
  std::vector<std::string> too_slow_;
  std::string csv_ =
      "point,mode,stage,a_n,a_median_s,a_low_s,a_high_s,b_n,b_median_s,b_low_s,b_high_s,ratio,ratio_low,ratio_high,"
      "verdict,why\n";
};

/// The key by which points of two files are paired.
std::string sweep_key(const PointRecord& p) {
  if (is_kernels(p))
    return fmt::format("kernels, {}, batch {}", kernel_point_name(p), integer_parameter(p, "run.batch", 1));
  const std::int64_t prefix = integer_parameter(p, "run.prefix", 0);
  const std::string lengths =
      p.batch.lengths.empty() ? "" : ", lengths " + text_parameter(p, "batch.distribution", "equal");
  const std::int64_t tokens = integer_parameter(p, "run.query_tokens", 1);
  return fmt::format("{}, context {}{}, batch {}{}{}, forced branch {}", text_parameter(p, "task.kind"),
                     integer_parameter(p, "run.context", 0), prefix > 0 ? fmt::format(" after {}", prefix) : "",
                     integer_parameter(p, "run.batch", 1), lengths,
                     tokens > 1 ? fmt::format(", {} query tokens", tokens) : "",
                     text_parameter(p, "run.force_branch", "none"));
}

/// The first point of each key.
std::map<std::string, const PointRecord*> by_sweep_key(const ResultFile& file) {
  std::map<std::string, const PointRecord*> points;
  for (const PointRecord& point : file.points) points.emplace(sweep_key(point), &point);
  return points;
}

/// The point of the same key; null without one.
const PointRecord* find_pair(const PointRecord& point, const std::map<std::string, const PointRecord*>& others) {
  const auto at = others.find(sweep_key(point));
  return at == others.end() ? nullptr : at->second;
}

/// Prints whether the results of a pair agree, and returns it.
bool print_result(std::ostream& out, TensorFile& tensors_a, const PointRecord& a, TensorFile& tensors_b,
                  const PointRecord& b) {
  std::vector<std::string> list = differences(a, b);
  if (const std::string output = output_difference(tensors_a, a, tensors_b, b); !output.empty()) list.push_back(output);
  fmt::print(out, "\n{}: {}\n", sweep_key(a), list.empty() ? "the same result" : "results differ");
  for (const std::string& line : list) fmt::print(out, "  differs: {}\n", line);
  for (const std::string& line : different_parameters(a, b, false)) fmt::print(out, "  run otherwise: {}\n", line);
  if (a.heads != b.heads || a.kv != b.kv)
    fmt::print(out, "  run otherwise: heads x kv: {} x {}, {} x {}\n", a.heads, a.kv, b.heads, b.kv);
  for (const auto& [name, p] : {std::pair("A", &a), std::pair("B", &b)})
    for (const std::string& line : p->noisy) fmt::print(out, "  {} is noisy: {}\n", name, line);
  return list.empty();
}

}  // namespace

const char* word_of(Difference difference) {
  constexpr const char* words[] = {"SAME", "FASTER", "SLOWER", "UNCLEAR"};
  return words[static_cast<std::size_t>(difference)];
}

Difference judge_ratio(const Ratio& ratio, double same_margin) {
  const bool same = ratio.low > 1 / (1 + same_margin) && ratio.high < 1 + same_margin;
  if (ratio.low <= 1 && ratio.high >= 1) return same ? Difference::same : Difference::unclear;
  if (ratio.low > 1) return Difference::slower;
  return ratio.high < 1 ? Difference::faster : Difference::unclear;  // NaN
}

DiffResult diff_results(std::ostream& out, const DiffOptions& options) {
  const std::vector<ResultFile> both = read_results({options.a, options.b});
  const ResultFile &a = both[0], &b = both[1];
  TensorFile tensors_a(options.a, TensorFile::OfPoints{}), tensors_b(options.b, TensorFile::OfPoints{});
  const auto points_a = by_sweep_key(a), points_b = by_sweep_key(b);
  std::vector<std::pair<const PointRecord*, const PointRecord*>> pairs;
  std::size_t series = 0;
  for (const PointRecord& of_a : a.points)
    if (const PointRecord* of_b = find_pair(of_a, points_b)) {
      pairs.emplace_back(&of_a, of_b);
      series += common_series("", of_a, *of_b).size();
    }
  if (pairs.empty())
    throw UserError(
        fmt::format("{} and {} have no point in common (task, context, batch and forced branch, or shape, pair them); "
                    "compare runs of the same sweep",
                    options.a, options.b));
  fmt::print(out, "A: {}\nB: {}\n", run_line(options.a, a.run), run_line(options.b, b.run));
  DiffResult result;
  const bool cuda = a.run.backend == "cuda" && b.run.backend == "cuda";
  Verdicts verdicts(series, cuda, options.fail_above);
  for (const auto& [of_a, of_b] : pairs) {
    result.same &= print_result(out, tensors_a, *of_a, tensors_b, *of_b);
    print_times_header(out, *of_a);
    for (const Series& s : common_series(sweep_key(*of_a), *of_a, *of_b)) verdicts.add(out, s);
  }
  for (const auto& [name, file, others] : {std::tuple("A", &a, &points_b), std::tuple("B", &b, &points_a)})
    for (const PointRecord& point : file->points)
      if (!find_pair(point, *others)) fmt::print(out, "\n{}: only in {}\n", sweep_key(point), name);
  write_text_file(options.csv, "--csv", verdicts.csv());
  verdicts.print(out);
  fmt::print(out, "DIFF: {} ({} points compared)\n", result.same ? "SAME" : "DIFFERENT", pairs.size());
  result.slower_than_allowed = verdicts.too_slow();
  return result;
}

namespace {

/// A series over all pairs: the medians of both sides and their ratio.
struct PairedSeries {
  std::string point, mode, what;
  std::vector<double> a, b, ratio;
};

/// Adds the medians of one pair. The first pair decides which series there are.
void add_pair(const PairedFiles& files, const ResultFile& a, const ResultFile& b, bool first,
              std::vector<PairedSeries>& series) {
  std::size_t next = 0;
  const auto points_b = by_sweep_key(b);
  for (const PointRecord& of_a : a.points) {
    const PointRecord* of_b = find_pair(of_a, points_b);
    if (!of_b) continue;
    for (const Series& s : common_series(sweep_key(of_a), of_a, *of_b)) {
      if (first) series.push_back({s.point, s.mode, s.what, {}, {}, {}});
      const bool known = next < series.size() && series[next].point == s.point && series[next].what == s.what;
      if (!known) break;
      PairedSeries& to = series[next++];
      to.a.push_back(summarise(s.a).median);
      to.b.push_back(summarise(s.b).median);
      to.ratio.push_back(to.b.back() / to.a.back());
    }
  }
  if (next != series.size() || next == 0)
    throw UserError(fmt::format("{} and {} do not hold the points of the first pair; run both programs on one input",
                                files.a, files.b),
                    ExitCode::file);
}

}  // namespace

std::int64_t pairs_needed(std::size_t series) {
  return samples_needed(family_error / static_cast<double>(std::max<std::size_t>(1, series)));
}

DiffResult compare_pairs(std::ostream& out, const std::vector<PairedFiles>& pairs, double fail_above) {
  std::vector<PairedSeries> series;
  DiffResult result;
  std::size_t noisy = 0;
  for (const PairedFiles& files : pairs) {
    const std::vector<ResultFile> both = read_results({files.a, files.b});
    const ResultFile &a = both[0], &b = both[1];
    const bool first = &files == &pairs.front();
    if (first) fmt::print(out, "A: {}\nB: {}\n", run_line(files.a, a.run), run_line(files.b, b.run));
    add_pair(files, a, b, first, series);
    const auto points_b = by_sweep_key(b);
    for (const PointRecord& point : a.points)
      if (const PointRecord* of_b = find_pair(point, points_b)) result.same &= differences(point, *of_b).empty();
    for (const ResultFile* file : {&a, &b})
      noisy += std::ranges::any_of(file->points, [](const PointRecord& p) { return !p.noisy.empty(); });
  }
  std::array<int, 4> counts{};
  std::string point;
  for (const PairedSeries& s : series) {
    if (std::exchange(point, s.point) != s.point)
      fmt::print(out, "\n{}\n  {:<9} {:<12} {:>10} {:>10} {:>22}\n", s.point, "mode", "stage", "A", "B",
                 "B/A [99% all]");
    const Summary r = summarise(s.ratio, family_error / static_cast<double>(series.size()));
    const Difference d = judge_ratio({r.median, r.low, r.high}, turns_same_margin);
    ++counts[static_cast<std::size_t>(d)];
    const bool too_slow = d == Difference::slower && r.median > 1 + fail_above;
    result.slower_than_allowed |= too_slow;
    fmt::print(out, "  {:<9} {:<12} {:>10} {:>10} {:>22}  {}{}\n", s.mode, s.what, time_text(summarise(s.a).median),
               time_text(summarise(s.b).median),
               std::isnan(r.low) ? fmt::format("{:.3f}", r.median)
                                 : fmt::format("{:.3f} [{:.3f}, {:.3f}]", r.median, r.low, r.high),
               word_of(d),
               too_slow            ? ", more than allowed"
               : std::isnan(r.low) ? " (too few pairs)"
                                   : "");
  }
  if (noisy > 0)
    fmt::print(out, "\n{} of {} runs are NOISY; the intervals hold what that changes\n", noisy, 2 * pairs.size());
  fmt::print(out, "\nTIMES: {} SAME {} FASTER {} SLOWER {} UNCLEAR of {} series, {} pairs\nDIFF: {}\n", counts[0],
             counts[1], counts[2], counts[3], series.size(), pairs.size(), result.same ? "SAME" : "DIFFERENT");
  return result;
}

}  // namespace nsa
