#pragma once
// Order statistics of samples: definitions in docs/METRICS.md.

#include <cstdint>
#include <vector>

namespace nsa {

struct Summary {
  std::int64_t n = 0;
  double median = 0, low = 0, high = 0;  ///< 95% order-statistic interval of the median; NaN below n = 6
  double min = 0, p95 = 0, p99 = 0;      ///< percentiles by nearest rank
  double cv = 0;                         ///< sample standard deviation / mean; NaN below n = 2
};

/// NaN samples are left out. All fields NaN when none is left. `miss`: the interval misses the median with at most
/// this probability.
Summary summarise(std::vector<double> samples, double miss = 0.05);

/// 1-based ranks (low, high) of the order statistics that bound the median with probability >= 1 - miss; {0, 0} where n
/// is too small (at 95% below 6). At 95%: n=10 (2,9), 20 (6,15), 30 (10,21), 50 (18,33), 100 (40,61).
struct IntervalRanks {
  std::int64_t low, high;
};
IntervalRanks median_interval(std::int64_t n, double miss = 0.05);

/// Smallest n that has such an interval.
std::int64_t samples_needed(double miss);

/// z with P(|Z| > z) = miss for a standard normal Z: 1.96 at 0.05.
double normal_quantile(double miss);

}  // namespace nsa
