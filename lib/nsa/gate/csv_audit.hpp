#pragma once
// Audits a benchmark CSV in nsa-vibe's format (S, ms_total, ms_cmp, ms_sel, ms_win, reads_actual, reads_expected):
// whether its numbers can support a conclusion about the share of selection. The rules are in docs/METRICS.md.

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
  std::vector<std::string> findings;  ///< each one disqualifies the file
  std::vector<std::string> notes;
  bool evidence() const { return findings.empty(); }
};

/// Throws UserError(file) that names file, line and column when a column is missing or a cell is not a time or count.
CsvAudit audit_csv(const Csv& csv);

void print_audit(std::ostream& out, const CsvAudit& audit);

}  // namespace nsa
