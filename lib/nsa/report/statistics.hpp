#pragma once
// Order statistics of samples; docs/METRICS.md defines them.

#include <cstdint>
#include <vector>

namespace nsa {

struct Summary {
  std::int64_t n = 0;
  double median = 0, low = 0, high = 0;  ///< 95% order-statistic interval of the median; NaN below n = 6
  double min = 0, p95 = 0, p99 = 0;      ///< percentiles by nearest rank
  double cv = 0;                         ///< sample standard deviation / mean; NaN below n = 2
};

/// NaN samples are left out; without any other sample all fields are NaN. The interval misses the median with
/// probability `alpha` at most.
Summary summarise(std::vector<double> samples, double alpha = 0.05);

/// The interval of a median whose samples depend on their neighbours: that of as many independent samples as tell
/// equally much about the median. `n` is that number; low and high are NaN where it is too small.
struct MedianInterval {
  double median, low, high, n;
};
MedianInterval dependent_interval(const std::vector<double>& samples, double alpha);

/// median(b) / median(a) and its interval, which misses the ratio with probability `alpha`: the two intervals combined
/// by MOVER (Zou and Donner 2008) on logarithms. `between_runs`: standard deviation of the logarithm of a median from
/// run to run, which no sample of one run shows. The bounds are NaN where a side has no interval.
struct Ratio {
  double value, low, high;
};
Ratio median_ratio(const std::vector<double>& a, const std::vector<double>& b, double alpha, double between_runs);

/// 1-based ranks (low, high) of the order statistics that bound the median with probability >= 1 - alpha; {0, 0} where
/// n is too small (at 95% below 6). At 95%: n=10 (2,9), 20 (6,15), 30 (10,21), 50 (18,33), 100 (40,61).
struct IntervalRanks {
  std::int64_t low, high;
};
IntervalRanks median_interval(std::int64_t n, double alpha = 0.05);

/// Smallest n for which such an interval exists.
std::int64_t samples_needed(double alpha);

/// z with P(|Z| > z) = alpha for a standard normal Z: 1.96 at 0.05.
double normal_quantile(double alpha);

}  // namespace nsa
