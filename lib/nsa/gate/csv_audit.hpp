#pragma once
// What the numbers of a benchmark CSV in nsa-vibe's format (S, ms_total, ms_cmp, ms_sel, ms_win, reads_actual,
// reads_expected) can and cannot say about the share of selection. From the numbers alone: docs/METRICS.md.

#include <ostream>
#include <string>
#include <vector>

#include "nsa/gate/csv.hpp"

namespace nsa {

struct CsvAuditRow {
  double context, total, branch[3], reads_actual, reads_expected;  ///< ms in cmp, sel, win order; NaN: empty cell
  double sum() const { return branch[0] + branch[1] + branch[2]; }
};

struct CsvAudit {
  std::string path;
  std::vector<CsvAuditRow> rows;
  std::vector<std::string> findings;  ///< each by itself disqualifies the file
  std::vector<std::string> notes;
  bool evidence() const { return findings.empty(); }
};

/// Throws UserError(file) naming file, line and column when a column is missing or holds what is no time or count.
CsvAudit audit_csv(const Csv& csv);

void print_audit(std::ostream& out, const CsvAudit& audit);

}  // namespace nsa
