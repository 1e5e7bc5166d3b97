#include "nsa/gate/caches.hpp"

#include <fmt/format.h>
#include <fmt/ostream.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

#include "kernels/diagnostics/error.hpp"
#include "nsa/gate/evidence.hpp"
#include "nsa/report/metrics.hpp"

namespace nsa {
namespace {

bool is_fp8(const PointRecord& point) { return caches_text(point) != "same"; }

/// Whether two points differ in their caches alone.
bool is_pair(const PointRecord& fp8, const PointRecord& same) {
  const auto rest = [](const PointRecord& point) {
    std::map<std::string, decltype(Parameter::second)> parameters;
    for (const auto& [key, value] : point.parameters)
      if (key != "model.kv_precision" && key != "model.cmp_precision" && !key.starts_with("output."))
        parameters.emplace(key, value);
    return parameters;
  };
  return !is_fp8(same) && same.heads == fp8.heads && same.kv == fp8.kv && rest(fp8) == rest(same);
}

Condition condition(std::string name, double value, double threshold, bool at_least) {
  Condition c;
  c.name = std::move(name), c.threshold = threshold, c.at_least = at_least;
  c.measured = {value, value, value};
  if (value < 0)
    c.why = "not known";
  else
    c.outcome = (value >= threshold) == at_least || value == threshold ? Outcome::met : Outcome::not_met;
  return c;
}

/// Of steps of mode "total"; they ran in other processes, so that either median has its own interval.
Condition speed(const PointRecord& fp8, const PointRecord* same) {
  Condition c;
  c.name = "speed over unquantised caches", c.unit = Unit::ratio, c.threshold = caches_speedup;
  c.measured = {NAN, NAN, NAN};
  if (!same) {
    c.why = "no file has this point with unquantised caches";
    return c;
  }
  const Ratio ratio =
      median_ratio(slowest_samples(fp8, "total", Stage::step), slowest_samples(*same, "total", Stage::step), 0.05, 0.0);
  c.measured = {ratio.value, ratio.low, ratio.high};
  const bool rounded = std::ranges::any_of(
      fp8.route_reasons, [](const std::string& why) { return why.find("FP8 values in ") != std::string::npos; });
  if (rounded)
    c.why = "the caches held FP8 values in storage type";
  else if (!fp8.noisy.empty() || !same->noisy.empty())
    c.why = "NOISY";
  else if (ratio.low >= c.threshold)
    c.outcome = Outcome::met;
  else if (ratio.high < c.threshold)
    c.outcome = Outcome::not_met;
  return c;
}

CachesPoint judge_point(const PointRecord& fp8, const PointRecord* same) {
  const QuantisationRecord& q = fp8.quantisation;
  CachesPoint point;
  point.name = fmt::format("context {}, batch {}", integer_parameter(fp8, "run.context", 0),
                           integer_parameter(fp8, "run.batch", 1));
  point.caches = caches_text(fp8);
  point.bytes = same && busiest_bytes(*same) > 0 ? busiest_bytes(fp8) / busiest_bytes(*same) : NAN;
  // Where every block is chosen ranking decides nothing.
  const bool chooses = q.o_change < 0 || q.selection_agreement >= 0;
  point.conditions = {speed(fp8, same),
                      condition("blocks as chosen", chooses ? q.selection_agreement : 1, caches_agreement, true),
                      condition("importance lost", chooses ? q.importance_lost : 0, caches_lost, false),
                      condition("change of o", q.o_change, caches_change, false)};
  const auto has = [&](Outcome outcome) { return std::ranges::find(point.conditions, outcome, &Condition::outcome); };
  if (const auto failed = has(Outcome::not_met); failed != point.conditions.end())
    point.verdict = Verdict::stay, point.why = failed->name;
  else if (const auto open = has(Outcome::open); open != point.conditions.end())
    point.verdict = Verdict::inconclusive, point.why = open->name + (open->why.empty() ? "" : ": " + open->why);
  else
    point.verdict = Verdict::proceed, point.why = "all conditions are met";
  return point;
}

std::string share_text(double share) {
  return share < 0 || std::isnan(share) ? "-" : fmt::format("{:.2f}%", 100 * share);
}

}  // namespace

bool has_fp8_caches(const GateFile& file) { return std::ranges::any_of(file.result.points, is_fp8); }

std::vector<CachesVerdict> judge_caches(const std::vector<GateFile>& files) {
  std::map<std::pair<std::string, std::string>, std::vector<const GateFile*>> devices;
  for (const GateFile& file : files) devices[{file.result.run.backend, device_of(file)}].push_back(&file);
  std::vector<CachesVerdict> verdicts;
  for (const auto& [key, of_device] : devices) {
    CachesVerdict verdict;
    verdict.device = key.second, verdict.backend = key.first;
    verdict.git_commit = of_device[0]->result.run.git_commit;
    std::vector<const PointRecord*> points;
    for (const GateFile* file : of_device) {
      if (file->result.run.git_commit != verdict.git_commit)
        throw UserError(fmt::format("{} and {} are of different commits ({} and {}); judge the files of one program",
                                    of_device[0]->path, file->path, verdict.git_commit, file->result.run.git_commit));
      for (const PointRecord& point : file->result.points)
        if (point.valid && text_parameter(point, "task.kind") == "decode") points.push_back(&point);
    }
    for (const PointRecord* fp8 : points) {
      if (!is_fp8(*fp8)) continue;
      const auto same = std::ranges::find_if(points, [&](const PointRecord* p) { return is_pair(*fp8, *p); });
      verdict.points.push_back(judge_point(*fp8, same == points.end() ? nullptr : *same));
      verdict.precision = text_parameter(*fp8, "model.precision");
    }
    if (verdict.points.empty()) continue;
    const auto has = [&](Verdict one) { return std::ranges::count(verdict.points, one, &CachesPoint::verdict) > 0; };
    verdict.verdict = has(Verdict::proceed)        ? Verdict::proceed
                      : has(Verdict::inconclusive) ? Verdict::inconclusive
                                                   : Verdict::stay;
    verdicts.push_back(std::move(verdict));
  }
  return verdicts;
}

void print_caches(std::ostream& out, const CachesVerdict& v) {
  fmt::print(out, "FP8 caches on {} ({} backend, {}, commit {}): {}\n", v.device, v.backend, v.precision, v.git_commit,
             word_of(v.verdict));
  for (const CachesPoint& point : v.points) {
    const Measured& speed = point.conditions[0].measured;
    fmt::print(out, "\n{}, {}: {} ({})\n  bytes of a step {}", point.name, point.caches, word_of(point.verdict),
               point.why, share_text(point.bytes));
    if (!std::isnan(speed.value))
      fmt::print(out, ", speed {:.3f} ({:.3f} to {:.3f}), at least {}: {}\n", speed.value, speed.low, speed.high,
                 caches_speedup, word_of(point.conditions[0].outcome));
    else
      fmt::print(out, ", speed not measured: {}\n", word_of(point.conditions[0].outcome));
    for (std::size_t i = 1; i < point.conditions.size(); ++i) {
      const Condition& c = point.conditions[i];
      fmt::print(out, "  {} {}, {} {}: {}\n", c.name, share_text(c.measured.value), c.at_least ? "at least" : "at most",
                 share_text(c.threshold), word_of(c.outcome));
    }
  }
}

}  // namespace nsa
