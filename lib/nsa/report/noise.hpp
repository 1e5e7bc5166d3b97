#pragma once
// When a point is NOISY: something else than its own work decided its times. docs/METRICS.md, "Noise", gives the rule
// and the reason of each threshold.

#include <vector>

#include "nsa/results/records.hpp"

namespace nsa {

/// An outlier is a sample above this multiple of the median: a step that also compresses takes up to 2.1 times.
constexpr double outlier_factor = 3.0;
/// Largest share of the time that outliers may take beyond the median: the mean then is that much above the median.
constexpr double most_outlier_share = 0.10;
/// Largest change of the median from the first half of the samples to the second.
constexpr double most_drift = 0.10;
/// Largest share of its cores' time that a rank may lose to other machines and the CPU quota.
constexpr double most_steal = 0.02;
/// Smallest mean SM clock, of the device's maximum: nvbench's throttle threshold.
constexpr double least_clock = 0.75;
/// Largest copy rate: of a step whose bytes no cache holds, and of any other. Reads alone are faster than a copy.
constexpr double most_copy_rate = 1.5, most_cached_copy_rate = 20.0;

/// Time that outliers took beyond the median, as a share of the time of all samples; NaN without samples.
double outlier_share(const std::vector<double>& samples);

/// Fills in cv and outlier_share of `noise`, and `noisy`. On the rank that has the samples of all.
void judge_noise(PointRecord& point);

}  // namespace nsa
