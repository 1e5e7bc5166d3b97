#pragma once
// What a run prints: the branch table, the slowest rank, FOM lines, the verdict; and the seeds' CSV and a JSON summary.

#include <ostream>
#include <string>
#include <vector>

#include "nsa/results/records.hpp"

namespace nsa {

/// Columns that a table has only where a point needs them.
struct TableColumns {
  bool batch = false, forced = false;
};
TableColumns table_columns(const std::vector<PointRecord>& points);

/// A point as it finishes, under a header before the first. A table with one line a point: context, total, cmp, rank,
/// sel, win, comm, other stages, share of selection, reads counted/expected, nsa-vibe's formula; kind = "needle" and
/// "kernels" have tables of their own.
void print_point(std::ostream& out, const TableColumns& columns, const PointRecord& point, bool first);

/// What stands below the points: what the columns are; the slowest rank of each point and by how much (max / median
/// over ranks of their own work), where there are several; a line for each fallback: where, from what, why, how often.
void print_notes(std::ostream& out, const std::vector<PointRecord>& points);

/// All of it as `nsa run` prints it, the figures included.
void print_points(std::ostream& out, const std::vector<PointRecord>& points, const std::string& interrupted = "");

/// A FOM line.
struct Figure {
  std::string name, value, unit;
};

/// "FOM name = value unit" lines, then "RESULT: VALID", "RESULT: INVALID (reason)" or, where the run was stopped before
/// its end, "RESULT: INTERRUPTED (how far it came)". Names and order are stable.
void print_figures(std::ostream& out, const std::vector<PointRecord>& points, const std::string& interrupted = "");

/// One JSON object that says what the FOM lines say: file, result, ranks, heads, kv, backend, commit and
/// figures {name: {value, unit}}; docs/METRICS.md. `file` is the result file's path.
std::string to_json(const RunRecord& run, const std::string& file, const std::vector<PointRecord>& points);

/// kind = "needle": depth x found.
void print_needles(std::ostream& out, const std::vector<PointRecord>& points);

/// kind = "kernels": one line a point, the implementations' times, the speed of the custom one (fused for sel, else
/// flash) over sdpa with its interval, and its errors. The notes end with print_guards.
void print_kernels_header(std::ostream& out);
void print_kernels_row(std::ostream& out, const PointRecord& point);
void print_kernels_notes(std::ostream& out, const std::vector<PointRecord>& points);

/// From which length on flash is at least 1.2 times as fast as sdpa at every length measured, for win and cmp, as lines
/// of [runtime]; nothing where it was not measured.
void print_guards(std::ostream& out, const std::vector<const PointRecord*>& points);

/// FOM lines of such a point.
std::vector<Figure> kernel_figures(const PointRecord& point);
/// "sel_N256_H4_D64_n8_scattered_context_8192": what tells it from the others of its sweep.
std::string kernel_point_name(const PointRecord& point);

/// nsa-vibe's columns S, ms_total, ms_cmp, ms_sel (rank + attend_sel), ms_win, reads_actual, reads_expected,
/// reads_actual_decode, reads_expected_decode, and reads_nsa_vibe. Reads are those of last_reads (report/metrics.hpp):
/// counted where the kernels load, and expected from the shape. nsa-vibe's own formula, which its CSV has under
/// reads_expected, stands in reads_nsa_vibe. The _decode pair repeats the counts in decode and is empty otherwise:
/// nothing here mixes a prefill's reads with a step's. Times of stages that were not timed are empty.
std::string to_csv(const std::vector<PointRecord>& points);

}  // namespace nsa
