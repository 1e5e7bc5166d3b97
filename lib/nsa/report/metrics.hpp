#pragma once
// Computes the numbers that are reported of a point from its raw samples. docs/METRICS.md defines them.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "nsa/report/statistics.hpp"
#include "nsa/results/records.hpp"

namespace nsa {

/// Seconds of a stage in a mode: for each repetition after warm-up the value of the slowest rank. Empty: not timed.
std::vector<double> slowest_samples(const PointRecord& point, std::string_view mode, Stage stage);

/// The same of one rank.
std::vector<double> rank_samples(const PointRecord& point, std::string_view mode, Stage stage, std::int64_t rank);

/// kind = "kernels": seconds of one execution of an implementation, for each repetition after warm-up the value of the
/// slowest rank. Empty: not measured.
std::vector<double> kernel_samples(const PointRecord& point, std::string_view implementation);

/// Ratio of the time of one implementation to that of another, for each repetition; the interval misses the median with
/// probability `alpha` at most. NaN where one was not measured.
Summary kernel_ratio(const PointRecord& point, std::string_view of, std::string_view to, double alpha = 0.05);

/// The backend's kernel that the implementation ran; "" where the file does not say (before schema 1.3) or lacks it.
std::string kernel_variant(const PointRecord& point, std::string_view implementation);

/// "sdpa_packed" or "flash_packed": the one with the smaller median.
const char* fastest_packed(const PointRecord& point);

/// Summary of slowest_samples; NaN where not timed.
Summary stage_time(const PointRecord& point, std::string_view mode, Stage stage);

/// The whole step in seconds: of mode "total", or of "branches" where "total" was not run.
Summary step_time(const PointRecord& point);

/// Seconds that a launch adds to a step: `total` minus `device`, and that pass between two steps that are queued
/// without a wait: `queued` minus `device`; differences of medians. NaN without these modes.
double launch_overhead(const PointRecord& point);
double launch_gap(const PointRecord& point);

/// (rank + attend_sel) / all stages, by their medians in mode "branches"; NaN without it.
double selection_share(const PointRecord& point);

/// Seconds of every rank's own work: the median over repetitions of the sum of all stages but comm in mode "branches",
/// or of the step in mode "total" where "branches" was not run.
std::vector<double> rank_work(const PointRecord& point);

/// Modelled bytes of a step of one rank without comm: of mode "total" by what ran, of "branches" where "total" was not
/// run. A fused step reads q once, keeps the outputs of the branches on chip and hands fewer numbers than raw scores to
/// rank (docs/METRICS.md).
double step_bytes(const PointRecord& point, std::size_t rank);

/// step_bytes of a decode step that runs sharded in several launches, whatever ran.
double sharded_step_bytes(const PointRecord& point, std::size_t rank);

/// step_bytes of a decode step that runs fused, or sharded in one launch, whatever ran. Needs parameters, heads, kv,
/// bytes. With kv > 1 the ranks' outputs of the branches arrive as exchanges, and a rank has o, and reads W_O, of 1 /
/// kv of its heads.
double fused_step_bytes(const PointRecord& point, std::size_t rank);

/// step_bytes of the rank with most; 0 when unknown.
double busiest_bytes(const PointRecord& point);

/// busiest_bytes per second of a step, as a fraction of the copy bandwidth; NaN when unknown.
double copy_rate_fraction(const PointRecord& point);

/// Tokens read at the last step (in prefill: by all queries) for one sequence and group in one layer, summed over
/// branches and ranks; NaN when not counted. nsa-vibe's formula is for one query, so that a prefill has none.
struct ReadCounts {
  double counted, expected, nsa_vibe;
};
ReadCounts last_reads(const PointRecord& point);

/// A parameter of the point as integer, real number or text; `fallback` where the point does not have it.
std::int64_t integer_parameter(const PointRecord& point, std::string_view key, std::int64_t fallback);
double real_parameter(const PointRecord& point, std::string_view key, double fallback);
std::string text_parameter(const PointRecord& point, std::string_view key, const std::string& fallback = "");

/// What the caches hold: "same"; "fp8", all of them; "fp8 kv", those of sel and win; "fp8 cmp".
std::string caches_text(const PointRecord& point);

/// "1.23 us", "45.6 ms": three digits and a suitable unit; "-" for NaN.
std::string time_text(double seconds);

/// "12.5 MB": three digits, powers of 1000.
std::string bytes_text(double bytes);

}  // namespace nsa
