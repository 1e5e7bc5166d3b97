#include "nsa/gate/csv_audit.hpp"

#include <fmt/format.h>
#include <fmt/ostream.h>

#include <algorithm>
#include <cmath>

#include "kernels/diagnostics/error.hpp"
#include "kernels/shared/block_rules.hpp"
#include "nsa/model/partition.hpp"

namespace nsa {
namespace {

// Stages timed one by one neither overlap nor share a launch, so that their correct sum may exceed the step, most of
// all where a step takes microseconds. Three whole steps reach 300%.
constexpr double max_branch_sum = 2.0;
constexpr double whole_step_share = 0.9;  ///< a column of at least this share in every row holds whole steps

std::string range_text(double low, double high, int decimals = 0) {
  const std::string first = fmt::format("{:.{}f}", low, decimals), last = fmt::format("{:.{}f}", high, decimals);
  return first == last ? first : first + " to " + last;
}

std::vector<CsvAuditRow> audit_rows(const Csv& csv) {
  const auto column = [&](const char* name, double least) {
    std::vector<double> values = csv.numbers(name);
    for (std::size_t i = 0; i < values.size(); ++i)
      if (values[i] < least)
        throw UserError(fmt::format("cannot read {}:{} (column {} holds {}); give {}", csv.path, csv.rows[i].line, name,
                                    values[i], least > 0 ? "a positive number" : "a number that is not negative"),
                        ExitCode::file);
    return values;
  };
  constexpr double positive = 1e-300;
  const auto context = column("S", positive), total = column("ms_total", positive), cmp_ms = column("ms_cmp", 0),
             sel_ms = column("ms_sel", 0), win_ms = column("ms_win", 0), actual = column("reads_actual", 0),
             expected = column("reads_expected", 0);
  std::vector<CsvAuditRow> rows;
  for (std::size_t i = 0; i < context.size(); ++i) {
    if (std::isnan(context[i]))
      throw UserError(
          fmt::format("cannot read {}:{} (column S is empty); give the row's context", csv.path, csv.rows[i].line),
          ExitCode::file);
    rows.push_back({context[i], total[i], {cmp_ms[i], sel_ms[i], win_ms[i]}, actual[i], expected[i]});
  }
  return rows;
}

/// The context for which nsa-vibe's formula at the paper's block sizes gives `reads`; 0: none up to `max_context`.
std::int64_t formula_context(double reads, double max_context) {
  const BlockRules paper;
  const auto limit = static_cast<std::int64_t>(std::min(max_context, 1e7));
  for (std::int64_t tokens = 1; tokens <= limit; ++tokens)
    if (static_cast<double>(nsa_vibe_reads(paper, tokens - 1)) == reads) return tokens;
  return 0;
}

void find_additivity(CsvAudit& audit) {
  double low = INFINITY, high = 0, mean = 0, rows = 0, least_part = INFINITY;
  for (const CsvAuditRow& row : audit.rows) {
    const double share = row.sum() / row.total;
    if (std::isnan(share)) continue;
    low = std::min(low, share), high = std::max(high, share), mean += share, ++rows;
    for (const double part : row.branch) least_part = std::min(least_part, part / row.total);
  }
  if (rows == 0) {
    audit.findings.push_back("no row has ms_total, ms_cmp, ms_sel and ms_win: there is no share to see");
    return;
  }
  if (high <= max_branch_sum) return;
  std::string text =
      fmt::format("cmp + sel + win add up to {:.0f}% of the total ({}%): parts of a step cannot exceed it",
                  100 * mean / rows, range_text(100 * low, 100 * high, 1));
  if (least_part >= whole_step_share)
    text +=
        ". Every branch column is a whole step: that is what one-hot gates give, which force a gate and skip no work. "
        "Their difference from the total is noise, not a branch's overhead";
  audit.findings.push_back(text);
}

void find_constant_reads(CsvAudit& audit) {
  std::vector<CsvAuditRow> counted;
  std::ranges::copy_if(audit.rows, std::back_inserter(counted), [](const CsvAuditRow& row) {
    return std::isfinite(row.reads_actual) && std::isfinite(row.reads_expected);
  });
  if (counted.empty()) return;
  const auto spread = [&](double CsvAuditRow::*field) {
    const auto [low, high] = std::ranges::minmax_element(counted, {}, field);
    return std::pair((*low).*field, (*high).*field);
  };
  const auto [first, last] = spread(&CsvAuditRow::context);
  const auto [least, most] = spread(&CsvAuditRow::reads_actual);
  const auto [expected_least, expected_most] = spread(&CsvAuditRow::reads_expected);
  if (first == last || least != most || !(expected_least < expected_most)) return;
  std::string text = fmt::format(
      "reads_actual is {:.0f} at every S from {:.0f} to {:.0f}, while reads_expected goes from {:.0f} to {:.0f}: the "
      "counter does not see the context",
      least, first, last, expected_least, expected_most);
  if (const std::int64_t tokens = formula_context(least, last); tokens > 0)
    text += fmt::format(
        ". {:.0f} is what cmp + n*l' + min(w, S) gives for a sequence of {} tokens (l=32 d=16 l'=64 n=16 w=512)", least,
        tokens);
  audit.findings.push_back(text);
}

void find_read_mismatch(CsvAudit& audit) {
  const auto differs = [](const CsvAuditRow& row) {
    return std::isfinite(row.reads_actual) && std::isfinite(row.reads_expected) &&
           row.reads_actual != row.reads_expected;
  };
  const auto count = std::count_if(audit.rows.begin(), audit.rows.end(), differs);
  if (count == 0) return;
  const CsvAuditRow& row = *std::find_if(audit.rows.begin(), audit.rows.end(), differs);
  audit.findings.push_back(fmt::format(
      "reads_actual is not reads_expected in {} of {} rows (S = {:.0f}: {:.0f}, {:.0f}): what was counted is "
      "not the work that was planned",
      count, audit.rows.size(), row.context, row.reads_actual, row.reads_expected));
}

void note_formula(CsvAudit& audit) {
  const CsvAuditRow& row = audit.rows.front();
  const std::int64_t tokens = formula_context(row.reads_expected, 2 * row.context);
  if (tokens == 0 || row.reads_expected <= 2.0 * static_cast<double>(tokens)) return;
  audit.notes.push_back(
      fmt::format("reads_expected at S = {:.0f} is {:.0f}: the same formula for {} tokens. It charges n whole blocks "
                  "where {} tokens have fewer",
                  row.context, row.reads_expected, tokens, tokens));
}

std::string percent(double part, double whole) {
  const double share = 100 * part / whole;
  return std::isnan(share) ? "-" : fmt::format("{:.1f}%", share);
}

std::string number(double value, int decimals) {
  return std::isnan(value) ? "-" : fmt::format("{:.{}f}", value, decimals);
}

}  // namespace

CsvAudit audit_csv(const Csv& csv) {
  CsvAudit audit{csv.path, audit_rows(csv), {}, {}};
  find_additivity(audit);
  find_constant_reads(audit);
  find_read_mismatch(audit);
  note_formula(audit);
  audit.notes.push_back("a CSV has no repetitions, so nothing in it has an interval");
  return audit;
}

void print_audit(std::ostream& out, const CsvAudit& audit) {
  fmt::print(out, "{}: audit of {} rows\n\n{:>8} {:>10} {:>8} {:>8} {:>8} {:>8} {:>15}\n", audit.path,
             audit.rows.size(), "S", "total ms", "cmp", "sel", "win", "sum", "reads");
  for (const CsvAuditRow& row : audit.rows)
    fmt::print(out, "{:>8} {:>10} {:>8} {:>8} {:>8} {:>8} {:>15}\n", number(row.context, 0), number(row.total, 3),
               percent(row.branch[0], row.total), percent(row.branch[1], row.total), percent(row.branch[2], row.total),
               percent(row.sum(), row.total), number(row.reads_actual, 0) + "/" + number(row.reads_expected, 0));
  fmt::print(out, "\n");
  for (std::size_t i = 0; i < audit.findings.size(); ++i) fmt::print(out, "finding {}: {}\n", i + 1, audit.findings[i]);
  for (const std::string& note : audit.notes) fmt::print(out, "note: {}\n", note);
  if (audit.evidence()) {
    fmt::print(out,
               "\nVERDICT: CONSISTENT ({}: nothing in the numbers contradicts them)\n"
               "For a verdict on a kernel give the result files: nsa gate FILE.h5...\n",
               audit.path);
    return;
  }
  fmt::print(out,
             "\nVERDICT: NOT EVIDENCE ({}: it says nothing about the share of selection)\n"
             "Measure instead, on that machine:\n"
             "  nsa run inputs/gate/m4_decode.toml     stages timed apart, and steps with one branch really left out\n"
             "  nsa run inputs/gate/m4_kernels.toml    custom against packed SDPA, errors against float64\n"
             "  nsa gate m4_decode.h5 m4_kernels.h5\n",
             audit.path);
}

}  // namespace nsa
