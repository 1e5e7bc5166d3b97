#include "nsa/report/statistics.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace nsa {
namespace {

/// The smallest sample that at least a fraction p of the samples do not exceed.
double nearest_rank(const std::vector<double>& sorted, double p) {
  const double rank = std::ceil(p * static_cast<double>(sorted.size()) - 1e-9);  // 0.95 * 20 is 19, not 20
  return sorted[static_cast<std::size_t>(std::max(1.0, rank)) - 1];
}

double median_of(const std::vector<double>& sorted) {
  const std::size_t half = sorted.size() / 2;
  return sorted.size() % 2 == 1 ? sorted[half] : 0.5 * (sorted[half - 1] + sorted[half]);
}

double coefficient_of_variation(const std::vector<double>& samples) {
  const double n = static_cast<double>(samples.size());
  const double mean = std::accumulate(samples.begin(), samples.end(), 0.0) / n;
  double squares = 0;
  for (const double sample : samples) squares += (sample - mean) * (sample - mean);
  return std::sqrt(squares / (n - 1)) / mean;
}

}  // namespace

IntervalRanks median_interval(std::int64_t n, double alpha) {
  // The interval (k, n+1-k) misses the median with probability 2 P(X < k), X ~ Binomial(n, 1/2).
  const double log_half_n = static_cast<double>(n) * std::log(0.5);
  double below = 0;
  for (std::int64_t k = 0; k <= n / 2; ++k) {
    const double ways = std::lgamma(n + 1.0) - std::lgamma(k + 1.0) - std::lgamma(static_cast<double>(n - k) + 1.0);
    below += std::exp(ways + log_half_n);
    if (below > alpha / 2) return k == 0 ? IntervalRanks{0, 0} : IntervalRanks{k, n + 1 - k};
  }
  return {0, 0};
}

std::int64_t samples_needed(double alpha) {
  std::int64_t n = 1;
  while (median_interval(n, alpha).low == 0) ++n;
  return n;
}

double normal_quantile(double alpha) {
  double low = 0, high = 40;  // erfc(40 / sqrt(2)) is 0
  for (int i = 0; i < 100; ++i) {
    const double middle = 0.5 * (low + high);
    (std::erfc(middle / std::sqrt(2.0)) > alpha ? low : high) = middle;
  }
  return high;
}

Summary summarise(std::vector<double> samples, double alpha) {
  constexpr double none = std::numeric_limits<double>::quiet_NaN();
  std::erase_if(samples, [](double sample) { return std::isnan(sample); });
  Summary s{static_cast<std::int64_t>(samples.size()), none, none, none, none, none, none, none};
  if (samples.empty()) return s;
  std::sort(samples.begin(), samples.end());
  s.median = median_of(samples);
  s.min = samples.front();
  s.p95 = nearest_rank(samples, 0.95);
  s.p99 = nearest_rank(samples, 0.99);
  if (samples.size() > 1) s.cv = coefficient_of_variation(samples);
  const IntervalRanks ranks = median_interval(s.n, alpha);
  if (ranks.low > 0) {
    s.low = samples[static_cast<std::size_t>(ranks.low) - 1];
    s.high = samples[static_cast<std::size_t>(ranks.high) - 1];
  }
  return s;
}

}  // namespace nsa
