#pragma once
// The numbers that are reported of a point, computed from its raw samples. Definitions: docs/METRICS.md.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "nsa/report/statistics.hpp"
#include "nsa/results/records.hpp"

namespace nsa {

/// Seconds of a stage under a mode, one value a repetition after warm-up: the slowest rank's. Empty: not timed.
std::vector<double> slowest_samples(const PointRecord& point, std::string_view mode, Stage stage);

/// kind = "kernels": seconds of one execution of an implementation, one value a repetition after warm-up: the slowest
/// rank's. Empty: not measured.
std::vector<double> kernel_samples(const PointRecord& point, std::string_view implementation);

/// Time of one implementation over that of another, repetition by repetition; the interval of the median misses with
/// probability `miss`. NaN where one was not measured.
Summary kernel_ratio(const PointRecord& point, std::string_view of, std::string_view to, double miss = 0.05);

/// The backend's kernel that the implementation ran as; "" where the file does not say (before schema 1.3) or lacks it.
std::string kernel_variant(const PointRecord& point, std::string_view implementation);

/// "sdpa_packed" or "flash_packed": whichever attended packed K and V faster, by the median.
const char* fastest_packed(const PointRecord& point);

/// Summary of slowest_samples; NaN where not timed.
Summary stage_time(const PointRecord& point, std::string_view mode, Stage stage);

/// The whole step: of mode "total", or of "branches" where total was not run. Seconds.
Summary step_time(const PointRecord& point);

/// (rank + attend_sel) / all stages, by their medians in mode "branches"; NaN without it.
double selection_share(const PointRecord& point);

/// Seconds of every rank's own work: the median over repetitions of all stages but comm in mode "branches", of the
/// step where that was not run.
std::vector<double> rank_work(const PointRecord& point);

/// Share of the measured copy rate that the modelled bytes of the busiest rank reach in a step; NaN when unknown.
double copy_rate_fraction(const PointRecord& point);

/// Tokens read at the last step (of prefill: by all its queries) for one sequence and group in one layer, over
/// branches and ranks; NaN when not counted. nsa-vibe's formula is one query's, so a prefill has none.
struct ReadFigures {
  double counted, expected, nsa_vibe;
};
ReadFigures last_reads(const PointRecord& point);

/// A parameter of the point as integer or text; the fallback where it has none such.
std::int64_t integer_parameter(const PointRecord& point, std::string_view key, std::int64_t fallback);
std::string text_parameter(const PointRecord& point, std::string_view key, const std::string& fallback = "");

/// "1.23 us", "45.6 ms": three digits and the unit that suits; "-" for NaN.
std::string time_text(double seconds);

}  // namespace nsa
