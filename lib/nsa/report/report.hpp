#pragma once
// What a run prints: the table of points, the slowest rank, FOM lines, the result; and the CSV and JSON files.

#include <ostream>
#include <string>
#include <vector>

#include "nsa/results/records.hpp"

namespace nsa {

/// "a.h5: NVIDIA H200, node7, cuda backend, 2 ranks, commit ..., start": where and of what the run is.
std::string run_line(const std::string& path, const RunRecord& run);

/// Columns that the table has only where a point needs them. `chunk`: tokens of the prefill chunk of a mixed step.
/// `rate`: tokens/s of a mixed step, or of a decode of several sequences or query tokens.
/// `nsa_vibe`: the run writes a CSV for comparison with that project. `fp8`: some caches are FP8; then what they hold,
/// the modelled bytes of a step, and what FP8 changes.
struct TableColumns {
  bool chunk = false, prefix = false, batch = false, query_tokens = false, forced = false, rate = false,
       nsa_vibe = false, fp8 = false;
};
TableColumns table_columns(const std::vector<PointRecord>& points);

/// Prints one line of the table, with the header before the `first` point: context, total, cmp, rank, sel, win, comm,
/// other stages, share of selection, reads counted/expected. kind = "needle" and "kernels" have their own tables.
void print_point(std::ostream& out, const TableColumns& columns, const PointRecord& point, bool first);

/// Prints the notes below the table: the meaning of each column; with several ranks, the slowest rank of each point and
/// the ratio of its own work to the median over ranks; one line for each point that ran the scalar CUDA kernel, one for
/// each fallback: point, implementation, reason, calls; one for each reason why a point is NOISY.
void print_notes(std::ostream& out, const std::vector<PointRecord>& points);

/// Prints table, notes and metrics as `nsa run` does.
void print_points(std::ostream& out, const std::vector<PointRecord>& points, const std::string& interrupted = "");

/// The content of a FOM line.
struct Metric {
  std::string name, value, unit;
};

/// Prints "FOM name = value unit" lines, "NOISY: ..." where a point is, then "RESULT: VALID", "RESULT: INVALID
/// (reason)" or, for a run that was stopped before its end, "RESULT: INTERRUPTED (finished points)". Names and order
/// are stable.
void print_metrics(std::ostream& out, const std::vector<PointRecord>& points, const std::string& interrupted = "");

/// One JSON object with the content of the FOM lines: file, result, ranks, heads, kv, backend, commit and
/// figures {name: {value, unit}}; docs/METRICS.md. `file` is the path of the result file.
std::string to_json(const RunRecord& run, const std::string& file, const std::vector<PointRecord>& points);

/// kind = "needle": one line for each depth.
void print_needles(std::ostream& out, const std::vector<PointRecord>& points);

/// kind = "kernels": one line for each point: the time of each implementation, the speedup of the custom one (fused for
/// sel, else flash) over sdpa with its interval, and its errors. The notes end with print_guards.
void print_kernels_header(std::ostream& out);
void print_kernels_row(std::ostream& out, const PointRecord& point);
void print_kernels_notes(std::ostream& out, const std::vector<PointRecord>& points);

/// Prints the length from which on flash is at least 1.2 times as fast as sdpa at every measured length, for win and
/// cmp, as lines for [runtime]; prints nothing where it was not measured.
void print_guards(std::ostream& out, const std::vector<const PointRecord*>& points);

/// The FOM lines of such a point.
std::vector<Metric> kernel_metrics(const PointRecord& point);
/// "sel_N256_H4_D64_n8_scattered_context_8192": unique among the points of a sweep.
std::string kernel_point_name(const PointRecord& point);

/// nsa-vibe's columns S, ms_total, ms_cmp, ms_sel (rank + attend_sel), ms_win, reads_actual, reads_expected,
/// reads_actual_decode, reads_expected_decode, and reads_nsa_vibe. Reads are those of last_reads (report/metrics.hpp):
/// counted in the kernels at the load, and expected from the shape. reads_nsa_vibe is nsa-vibe's own formula, which its
/// CSV has under reads_expected. The _decode columns repeat the counts in decode and are empty otherwise, so that no
/// column mixes reads of a prefill with those of a step. Times of stages that were not timed are empty.
std::string to_csv(const std::vector<PointRecord>& points);

}  // namespace nsa
