#include "nsa/report/report.hpp"

#include <fmt/format.h>
#include <fmt/ostream.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <set>

#include "kernels/diagnostics/json.hpp"
#include "nsa/report/metrics.hpp"

namespace nsa {
namespace {

double median_of(const PointRecord& point, Stage stage) { return stage_time(point, "branches", stage).median; }

/// Sum of the medians of the stages without a column.
double other_stages(const PointRecord& point) {
  double sum = 0;
  for (const Stage stage : {Stage::project, Stage::append, Stage::compress, Stage::combine, Stage::output}) {
    const double median = median_of(point, stage);
    if (!std::isnan(median)) sum += median;
  }
  return std::isnan(selection_share(point)) ? std::nan("") : sum;
}

std::string count_text(double count) { return std::isnan(count) ? "-" : fmt::format("{:.10g}", count); }
std::string rate_text(double rate) { return std::isnan(rate) ? "-" : fmt::format("{:.0f}", rate); }
std::string percent_text(double share) { return std::isnan(share) ? "-" : fmt::format("{:.1f}%", 100 * share); }

bool is_mixed(const PointRecord& point) { return text_parameter(point, "task.kind") == "mixed"; }

/// Tokens that a step prefills beside its decode rows.
std::int64_t chunk_tokens(const PointRecord& point) {
  return is_mixed(point) ? integer_parameter(point, "run.prefill_chunk", 0) : 0;
}

/// Tokens that a decode step keeps, of all sequences, in the mean; in a mixed step those of the chunk too.
double tokens_a_step(const PointRecord& point) {
  const std::vector<std::int64_t>& kept = point.tokens_kept;
  const double chunk = static_cast<double>(chunk_tokens(point));
  if (kept.empty()) return chunk + static_cast<double>(integer_parameter(point, "run.batch", 1));
  return chunk + static_cast<double>(std::accumulate(kept.begin(), kept.end(), std::int64_t{0})) /
                     static_cast<double>(kept.size());
}

/// Tokens a second of a decode or mixed point; NaN where it is none, or was not timed.
double decode_rate(const PointRecord& point) {
  const double seconds = step_time(point).median;
  if ((text_parameter(point, "task.kind") != "decode" && !is_mixed(point)) || !(seconds > 0)) return std::nan("");
  return tokens_a_step(point) / seconds;
}

std::int64_t query_tokens(const PointRecord& point) { return integer_parameter(point, "run.query_tokens", 1); }

/// The end of a metric's name, unique among the points of a sweep: "context_1024", "context_64_batch_4_force_sel".
std::string point_name(const PointRecord& point) {
  if (text_parameter(point, "task.kind") == "kernels") return kernel_point_name(point);
  std::string name = fmt::format("context_{}", integer_parameter(point, "run.context", 0));
  if (is_mixed(point)) name += fmt::format("_chunk_{}", chunk_tokens(point));
  if (const std::int64_t prefix = integer_parameter(point, "run.prefix", 0); prefix > 0)
    name += fmt::format("_prefix_{}", prefix);
  const std::int64_t batch = integer_parameter(point, "run.batch", 1);
  if (batch != 1) name += fmt::format("_batch_{}", batch);
  if (!point.batch.lengths.empty()) {
    const std::string distribution = text_parameter(point, "batch.distribution", "equal");
    name += "_" + (distribution == "equal" ? "listed" : distribution);
  }
  if (query_tokens(point) != 1) name += fmt::format("_query_tokens_{}", query_tokens(point));
  const std::string forced = text_parameter(point, "run.force_branch", "none");
  if (forced != "none") name += "_force_" + forced;
  return name;
}

/// Whether two points of a sweep have as many tokens in as many sequences, and the same forced branch.
bool same_tokens(const PointRecord& a, const PointRecord& b) {
  return std::ranges::all_of(
             std::array{"run.context", "run.batch"},
             [&](const char* key) { return integer_parameter(a, key, 0) == integer_parameter(b, key, 0); }) &&
         text_parameter(a, "run.force_branch") == text_parameter(b, "run.force_branch");
}

/// Time of a ragged batch over that of the same tokens in sequences of one length; NaN where `points` has no such one.
double ragged_cost(const PointRecord& point, const std::vector<PointRecord>& points) {
  if (point.batch.lengths.empty()) return std::nan("");
  for (const PointRecord& other : points)
    if (other.batch.lengths.empty() && query_tokens(other) == query_tokens(point) && same_tokens(point, other))
      return step_time(point).median / step_time(other).median;
  return std::nan("");
}

/// Time of a step of several query tokens over that of one; NaN where `points` has no such one.
double query_token_cost(const PointRecord& point, const std::vector<PointRecord>& points) {
  if (query_tokens(point) == 1) return std::nan("");
  for (const PointRecord& other : points)
    if (query_tokens(other) == 1 && other.batch.lengths == point.batch.lengths && same_tokens(point, other))
      return step_time(point).median / step_time(other).median;
  return std::nan("");
}

using Metrics = std::vector<Metric>;

void add_time_metrics(Metrics& metrics, const PointRecord& point) {
  const double seconds = step_time(point).median;
  if (!(seconds > 0)) return;  // not timed, or by a clock that did not tick
  const std::string kind = text_parameter(point, "task.kind", "step"), name = point_name(point);
  if (kind == "needle") return;  // its steps are checked, not timed
  const bool prefill = kind == "prefill";
  const double tokens =
      prefill
          ? static_cast<double>(integer_parameter(point, "run.batch", 1) * integer_parameter(point, "run.context", 0))
          : tokens_a_step(point);
  metrics.push_back(
      {kind + "_time_" + name, fmt::format("{:.3f}", seconds * (prefill ? 1e3 : 1e6)), prefill ? "ms" : "us"});
  metrics.push_back({kind + "_rate_" + name, fmt::format("{:.1f}", tokens / seconds), "tokens/s"});
  const auto add_us = [&](const char* what, double value) {
    if (!std::isnan(value)) metrics.push_back({kind + what + name, fmt::format("{:.3f}", 1e6 * value), "us"});
  };
  add_us("_device_time_", stage_time(point, "device", Stage::step).median);
  add_us("_launch_overhead_", launch_overhead(point));
  add_us("_launch_gap_", launch_gap(point));
  if (const double share = selection_share(point); !std::isnan(share))
    metrics.push_back({kind + "_selection_share_" + name, fmt::format("{:.2f}", 100 * share), "%"});
  if (const double fraction = copy_rate_fraction(point); !std::isnan(fraction))
    metrics.push_back({kind + "_copy_rate_" + name, fmt::format("{:.2f}", 100 * fraction), "%"});
}

/// The largest total over ranks. The table is [kind][rank]; "total" is the last kind.
double peak_memory(const MemoryRecord& memory) {
  if (memory.measured_peak.empty() || memory.kinds.empty()) return std::nan("");
  const std::size_t ranks = memory.measured_peak.size() / memory.kinds.size();
  return static_cast<double>(*std::max_element(memory.measured_peak.end() - ranks, memory.measured_peak.end()));
}

Metrics metrics_of(const PointRecord& point, const std::vector<PointRecord>& points) {
  const std::string kind = text_parameter(point, "task.kind", "step"), name = point_name(point);
  Metrics metrics;
  add_time_metrics(metrics, point);
  if (const double cost = ragged_cost(point, points); !std::isnan(cost))
    metrics.push_back({kind + "_ragged_cost_" + name, fmt::format("{:.3f}", cost), "1"});
  if (const double cost = query_token_cost(point, points); !std::isnan(cost))
    metrics.push_back({kind + "_query_token_cost_" + name, fmt::format("{:.3f}", cost), "1"});
  if (kind == "kernels") metrics = kernel_metrics(point);
  if (const auto found = point.needle.find("found"); found != point.needle.end() && !found->second.empty()) {
    const auto hits = std::count(found->second.begin(), found->second.end(), 1.0);
    const double share = static_cast<double>(hits) / static_cast<double>(found->second.size());
    metrics.push_back({"needle_found_" + name, fmt::format("{:.2f}", 100 * share), "%"});
  }
  if (point.max_abs_err >= 0)
    metrics.push_back({kind + "_max_abs_err_" + name, fmt::format("{:.3e}", point.max_abs_err), "1"});
  if (point.blocks_shared >= 0)
    metrics.push_back({kind + "_blocks_shared_" + name, fmt::format("{:.2f}", 100 * point.blocks_shared), "%"});
  const QuantisationRecord& fp8 = point.quantisation;
  for (const auto& [what, share] : {std::pair{"_selection_agreement_", fp8.selection_agreement},
                                    {"_importance_lost_", fp8.importance_lost},
                                    {"_o_change_", fp8.o_change},
                                    {"_y_change_", fp8.y_change}})
    if (share >= 0) metrics.push_back({kind + what + name, fmt::format("{:.3f}", 100 * share), "%"});
  if (const double peak = peak_memory(point.memory); !std::isnan(peak))
    metrics.push_back({kind + "_peak_memory_" + name, fmt::format("{:.3f}", peak / 1e6), "MB"});
  return metrics;
}

/// The number that a figure's text is; null where it is "inf" or "nan".
Json json_number(const std::string& text) {
  Json number = Json::parse(text, nullptr, false);
  return number.is_number() ? number : Json();
}

/// "point: reason" of the first invalid point; empty: all points are valid.
std::string first_invalid(const std::vector<PointRecord>& points) {
  const auto invalid = std::find_if(points.begin(), points.end(), [](const PointRecord& p) { return !p.valid; });
  return invalid == points.end() ? "" : point_name(*invalid) + ": " + invalid->reason;
}

std::string csv_time(double seconds) { return std::isnan(seconds) ? "" : fmt::format("{:.6f}", 1e3 * seconds); }
std::string csv_count(double count) { return std::isnan(count) ? "" : count_text(count); }

}  // namespace

std::string run_line(const std::string& path, const RunRecord& run) {
  const std::size_t ranks = run.system.size();
  std::set<std::string> devices, hosts;
  for (const RankSystem& rank : run.system) {
    devices.insert(rank.gpu.empty() ? rank.cpu : rank.gpu);
    hosts.insert(rank.host);
  }
  if (ranks == 0) devices.insert("unknown device");
  const std::string on =
      hosts.size() > 3 ? fmt::format("{} hosts", hosts.size()) : fmt::format("{}", fmt::join(hosts, ", "));
  return fmt::format("{}: {}, {}, {} backend, {} rank{}, commit {}, {}", path, fmt::join(devices, ", "), on,
                     run.backend, ranks, ranks == 1 ? "" : "s", run.git_commit, run.start);
}

TableColumns table_columns(const std::vector<PointRecord>& points) {
  TableColumns columns;
  for (const PointRecord& point : points) {
    columns.chunk |= is_mixed(point);
    columns.prefix |= integer_parameter(point, "run.prefix", 0) > 0;
    columns.batch |= integer_parameter(point, "run.batch", 1) != 1;
    columns.query_tokens |= query_tokens(point) != 1;
    columns.rate |= is_mixed(point) || (text_parameter(point, "task.kind") == "decode" &&
                                        (integer_parameter(point, "run.batch", 1) != 1 || query_tokens(point) != 1));
    columns.forced |= text_parameter(point, "run.force_branch", "none") != "none";
    columns.nsa_vibe |= !text_parameter(point, "output.csv").empty();
    columns.fp8 |= caches_text(point) != "same";
  }
  return columns;
}

namespace {

void print_table_header(std::ostream& out, const TableColumns& columns) {
  fmt::print(out, "{:>8}", "context");
  if (columns.chunk) fmt::print(out, " {:>8}", "chunk");
  if (columns.prefix) fmt::print(out, " {:>8}", "prefix");
  if (columns.batch) fmt::print(out, " {:>6}", "batch");
  if (columns.query_tokens) fmt::print(out, " {:>7}", "queries");
  if (columns.forced) fmt::print(out, " {:>6}", "forced");
  for (const char* name : {"total", "cmp", "rank", "sel", "win", "comm", "other"}) fmt::print(out, " {:>8}", name);
  fmt::print(out, " {:>6} {:>15}", "share", "reads");
  if (columns.rate) fmt::print(out, " {:>8}", "tokens/s");
  if (columns.nsa_vibe) fmt::print(out, " {:>8}", "nsa-vibe");
  if (columns.fp8)
    for (const char* name : {"caches", "bytes", "agree", "lost", "o change"}) fmt::print(out, " {:>8}", name);
  fmt::print(out, "\n");
}

void print_table_row(std::ostream& out, const TableColumns& columns, const PointRecord& point) {
  fmt::print(out, "{:>8}", integer_parameter(point, "run.context", 0));
  if (columns.chunk) fmt::print(out, " {:>8}", chunk_tokens(point));
  if (columns.prefix) fmt::print(out, " {:>8}", integer_parameter(point, "run.prefix", 0));
  if (columns.batch) fmt::print(out, " {:>6}", integer_parameter(point, "run.batch", 1));
  if (columns.query_tokens) fmt::print(out, " {:>7}", query_tokens(point));
  if (columns.forced) fmt::print(out, " {:>6}", text_parameter(point, "run.force_branch", "none"));
  for (const double seconds : {step_time(point).median, median_of(point, Stage::attend_cmp),
                               median_of(point, Stage::rank), median_of(point, Stage::attend_sel),
                               median_of(point, Stage::attend_win), median_of(point, Stage::comm), other_stages(point)})
    fmt::print(out, " {:>8}", time_text(seconds));
  const ReadCounts reads = last_reads(point);
  fmt::print(out, " {:>6} {:>15}", percent_text(selection_share(point)),
             count_text(reads.counted) + "/" + count_text(reads.expected));
  if (columns.rate) fmt::print(out, " {:>8}", rate_text(decode_rate(point)));
  if (columns.nsa_vibe) fmt::print(out, " {:>8}", count_text(reads.nsa_vibe));
  if (columns.fp8) {
    fmt::print(out, " {:>8} {:>8}", caches_text(point), bytes_text(busiest_bytes(point)));
    for (const double share :
         {point.quantisation.selection_agreement, point.quantisation.importance_lost, point.quantisation.o_change})
      fmt::print(out, " {:>8}", share < 0 ? "-" : fmt::format("{:.2f}%", 100 * share));
  }
  fmt::print(out, "{}{}{}\n", point.fallbacks.empty() ? "" : "  FALLBACK", point.noisy.empty() ? "" : "  NOISY",
             point.valid ? "" : "  INVALID");
}

void print_table_notes(std::ostream& out, const TableColumns& columns) {
  if (columns.chunk)
    fmt::print(out,
               "chunk: tokens of one more sequence that each step prefills beside the decode rows of the others\n");
  if (columns.prefix)
    fmt::print(out, "prefix: tokens of {} sequence that the caches held before\n", columns.chunk ? "that" : "each");
  if (columns.batch) fmt::print(out, "batch: sequences\n");
  if (columns.query_tokens) fmt::print(out, "queries: query tokens of each sequence in a step\n");
  if (columns.forced) fmt::print(out, "forced: the branch whose gate is 1 (the other gates are 0)\n");
  fmt::print(out,
             "total: the whole step as it runs; the columns to its right: stages of the step, timed one by one\n"
             "cmp: compressed attention   rank: block scoring and top-n   sel: selected attention\n"
             "win: window attention       comm: exchanges among ranks     other: all other stages\n"
             "share: (rank + sel) / all stages   reads: tokens counted/expected, last step, one {}group\n",
             columns.chunk ? "" : "sequence and ");
  if (columns.rate)
    fmt::print(out, "tokens/s: {}{} / total\n", columns.query_tokens ? "tokens that a step keeps" : "sequences",
               columns.chunk ? ", and those of its chunk," : "");
  if (columns.nsa_vibe) fmt::print(out, "nsa-vibe: tokens by the formula of that project, cmp + n*l' + min(w, S)\n");
  if (columns.fp8)
    fmt::print(
        out,
        "caches: what is FP8, \"kv\" sel and win, \"cmp\" the compressed tokens   bytes: modelled, of a step\n"
        "agree: blocks that ranking also chose on unquantised caches   lost: importance of the blocks it missed\n"
        "o change: root mean square of the output's change\n");
  fmt::print(out, "Times are medians over steps; the time of a step is that of its slowest rank.\n");
}

void print_needle_notes(std::ostream& out) {
  fmt::print(out,
             "depth: place of the needle as a fraction of the context   block: the selection block that holds it\n"
             "found: every sequence and group selected that block   abs_err: largest error of the selected branch\n");
}

void print_fallbacks(std::ostream& out, const std::vector<PointRecord>& points) {
  for (const PointRecord& point : points)
    for (const std::string& line : point.fallbacks) fmt::print(out, "fallback at {}: {}\n", point_name(point), line);
}

/// Passes that ran at a lowered clock and are in no sample. All ranks drop the same ones.
void print_recovered(std::ostream& out, const PointRecord& point) {
  const NoiseRecord& n = point.noise;
  for (std::size_t mode = 0; mode < n.modes.size() && !n.throttled_passes.empty(); ++mode)
    if (const std::int64_t passes = n.throttled_passes[mode * static_cast<std::size_t>(n.ranks)]; passes > 0)
      fmt::print(out, "measured again at {}: {}: {} passes at a lowered clock\n", point_name(point), n.modes[mode],
                 passes);
}

void print_noise(std::ostream& out, const std::vector<PointRecord>& points) {
  for (const PointRecord& point : points) print_recovered(out, point);
  for (const PointRecord& point : points)
    for (const std::string& line : point.noisy) fmt::print(out, "noisy at {}: {}\n", point_name(point), line);
}

// One line for each ragged batch beside which the same tokens ran in sequences of one length.
void print_ragged(std::ostream& out, const std::vector<PointRecord>& points) {
  for (const PointRecord& point : points)
    if (const double cost = ragged_cost(point, points); !std::isnan(cost))
      fmt::print(out, "ragged at {}: {:.3f} x the time of equal lengths, longest {:.2f} x the mean{}\n",
                 point_name(point), cost, point.batch.length_imbalance,
                 point.batch.schedule_imbalance < 0
                     ? ""
                     : fmt::format(", most work of an SM {:.2f} x the mean", point.batch.schedule_imbalance));
}

// One line for each point that ran the scalar kernel: branches, shape, and how far that is from the tensor cores.
void print_scalar(std::ostream& out, const std::vector<PointRecord>& points) {
  for (const PointRecord& point : points) {
    std::vector<std::string> which;
    for (int c = 0; c < branches; ++c)
      if (point.route_kernels[c].find("scalar") != std::string::npos) which.push_back(branch_names[c]);
    if (which.empty()) continue;
    fmt::print(
        out,
        "scalar kernel at {}: {} (no tensor-core kernel takes d_k={} d_v={} {}), {} of the copy bandwidth; other "
        "shapes are 10 to 20 times as fast (docs/ROUTES.md)\n",
        point_name(point), fmt::join(which, ", "), integer_parameter(point, "model.d_k", 0),
        integer_parameter(point, "model.d_v", 0), text_parameter(point, "model.precision", ""),
        percent_text(copy_rate_fraction(point)));
  }
}

void print_exchange(std::ostream& out, const std::vector<PointRecord>& points) {
  std::set<std::string> transports;
  for (const PointRecord& point : points)
    if (!point.exchange.empty() && point.exchange != "MPI") transports.insert(point.exchange);
  if (!transports.empty()) fmt::print(out, "small exchanges went through {}\n", fmt::join(transports, ", "));
}

void print_slowest(std::ostream& out, const std::vector<PointRecord>& points) {
  for (const PointRecord& point : points) {
    const std::vector<double> work = rank_work(point);
    if (work.size() < 2 || !(summarise(work).median > 0)) continue;
    const auto slowest = std::max_element(work.begin(), work.end());
    std::vector<double> others = work;
    others.erase(others.begin() + (slowest - work.begin()));
    fmt::print(
        out, "slowest rank at {}: {} of {} (heads={} x kv={}), {} of its own work, {:.2f} x the median of the others\n",
        point_name(point), slowest - work.begin(), work.size(), point.heads, point.kv, time_text(*slowest),
        *slowest / summarise(others).median);
  }
}

std::string kind_of(const PointRecord& point) { return text_parameter(point, "task.kind", ""); }

}  // namespace

void print_point(std::ostream& out, const TableColumns& columns, const PointRecord& point, bool first) {
  const std::string kind = kind_of(point);
  if (kind == "needle") {
    print_needles(out, {point});
  } else if (kind == "kernels") {
    if (first) print_kernels_header(out);
    print_kernels_row(out, point);
  } else {
    if (first) print_table_header(out, columns);
    print_table_row(out, columns, point);
  }
}

void print_notes(std::ostream& out, const std::vector<PointRecord>& points) {
  if (points.empty()) return;
  const std::string kind = kind_of(points.front());
  if (kind == "kernels") {
    print_kernels_notes(out, points);
  } else if (kind == "needle") {
    print_needle_notes(out);
  } else {
    print_table_notes(out, table_columns(points));
    print_ragged(out, points);
    print_slowest(out, points);
    print_exchange(out, points);
  }
  print_scalar(out, points);
  print_fallbacks(out, points);
  print_noise(out, points);
}

void print_points(std::ostream& out, const std::vector<PointRecord>& points, const std::string& interrupted) {
  const TableColumns columns = table_columns(points);
  for (const PointRecord& point : points) print_point(out, columns, point, &point == &points.front());
  print_notes(out, points);
  print_metrics(out, points, interrupted);
}

void print_metrics(std::ostream& out, const std::vector<PointRecord>& points, const std::string& interrupted) {
  for (const PointRecord& point : points)
    for (const Metric& metric : metrics_of(point, points))
      fmt::print(out, "FOM {} = {} {}\n", metric.name, metric.value, metric.unit);
  if (const auto noisy = std::ranges::count_if(points, [](const PointRecord& p) { return !p.noisy.empty(); }))
    fmt::print(out, "NOISY: {} of {} points; something else than their own work decided their times\n", noisy,
               points.size());
  const std::string why = first_invalid(points);
  if (!interrupted.empty()) {
    fmt::print(out, "RESULT: INTERRUPTED ({})\n", interrupted);
  } else {
    fmt::print(out, "RESULT: {}\n", why.empty() ? "VALID" : "INVALID (" + why + ")");
  }
}

std::string to_json(const RunRecord& run, const std::string& file, const std::vector<PointRecord>& points) {
  const std::string why = first_invalid(points);
  Json noisy = Json::array();
  Json::object_t figures;
  for (const PointRecord& point : points) {
    for (const std::string& line : point.noisy) noisy.push_back(point_name(point) + ": " + line);
    // A look-up by key would take a time that grows with the square of the figures.
    for (const Metric& metric : metrics_of(point, points))
      figures.emplace_back(metric.name, Json{{"value", json_number(metric.value)}, {"unit", metric.unit}});
  }
  const Json document{{"file", file},
                      {"run_uuid", run.run_uuid},
                      {"result", why.empty() ? "VALID" : "INVALID"},
                      {"reason", why},
                      {"backend", run.backend},
                      {"git_commit", run.git_commit},
                      {"input_sha256", run.input_sha256},
                      {"argv", run.argv},
                      {"noisy", std::move(noisy)},
                      {"ranks", run.system.size()},
                      {"heads", points.empty() ? 0 : points.front().heads},
                      {"kv", points.empty() ? 0 : points.front().kv},
                      {"figures", std::move(figures)}};
  return json_text(document, 2) + "\n";
}

void print_needles(std::ostream& out, const std::vector<PointRecord>& points) {
  for (const PointRecord& point : points) {
    const auto depths = point.needle.find("depth");
    if (depths == point.needle.end()) continue;
    const auto value = [&](const char* name, std::size_t i) {
      const auto column = point.needle.find(name);
      return column == point.needle.end() ? std::nan("") : column->second[i];
    };
    fmt::print(out, "needle, {}\n{:>8} {:>10} {:>8} {:>6} {:>10}\n", point_name(point), "depth", "position", "block",
               "found", "abs_err");
    for (std::size_t i = 0; i < depths->second.size(); ++i)
      fmt::print(out, "{:>8.3f} {:>10} {:>8} {:>6} {:>10.2e}\n", depths->second[i], count_text(value("position", i)),
                 count_text(value("block", i)), value("found", i) == 1.0 ? "yes" : "no", value("abs_err", i));
  }
}

std::string to_csv(const std::vector<PointRecord>& points) {
  std::string csv =
      "S,ms_total,ms_cmp,ms_sel,ms_win,reads_actual,reads_expected,reads_actual_decode,reads_expected_decode,"
      "reads_nsa_vibe\n";
  for (const PointRecord& point : points) {
    const ReadCounts reads = last_reads(point);
    const bool decode = text_parameter(point, "task.kind", "decode") == "decode";
    const std::string counted = csv_count(reads.counted), expected = csv_count(reads.expected);
    csv += fmt::format("{},{},{},{},{},{},{},{},{},{}\n", integer_parameter(point, "run.context", 0),
                       csv_time(step_time(point).median), csv_time(median_of(point, Stage::attend_cmp)),
                       csv_time(median_of(point, Stage::rank) + median_of(point, Stage::attend_sel)),
                       csv_time(median_of(point, Stage::attend_win)), counted, expected, decode ? counted : "",
                       decode ? expected : "", csv_count(reads.nsa_vibe));
  }
  return csv;
}

}  // namespace nsa
