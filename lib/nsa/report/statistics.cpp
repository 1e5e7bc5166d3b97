#include "nsa/report/statistics.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace nsa {
namespace {

/// Where too few independent samples make an interval, the range of at least so many samples does, stretched about the
/// median (of logarithms) by this factor.
constexpr std::size_t least_for_range = 12;
constexpr double range_stretch = 3;

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

/// How many neighbouring samples tell about the median what one independent sample tells: 1 + 2 sum of the
/// autocorrelations of "above the median", up to the first pair of them that is not positive (Geyer 1992).
double correlation_length(const std::vector<double>& samples, double median) {
  const std::size_t n = samples.size();
  std::vector<double> side(n);
  for (std::size_t i = 0; i < n; ++i) side[i] = samples[i] > median ? 1 : samples[i] < median ? -1 : 0;
  const auto covariance = [&](std::size_t lag) {
    double sum = 0;
    for (std::size_t i = lag; i < n; ++i) sum += side[i] * side[i - lag];
    return sum / static_cast<double>(n);
  };
  const double variance = covariance(0);
  if (variance == 0) return 1;
  double length = 1;
  for (std::size_t lag = 1; lag + 1 < n / 2; lag += 2) {
    const double pair = (covariance(lag) + covariance(lag + 1)) / variance;
    if (pair <= 0) break;
    length += 2 * pair;
  }
  return length;
}

}  // namespace

MedianInterval dependent_interval(const std::vector<double>& samples, double alpha) {
  constexpr double none = std::numeric_limits<double>::quiet_NaN();
  if (samples.empty()) return {none, none, none, 0};
  std::vector<double> sorted = samples;
  std::sort(sorted.begin(), sorted.end());
  const double median = median_of(sorted), count = static_cast<double>(sorted.size());
  const double independent = count / correlation_length(samples, median);
  const IntervalRanks ranks = median_interval(static_cast<std::int64_t>(independent), alpha);
  if (ranks.low == 0 && sorted.size() < least_for_range) return {median, none, none, independent};
  if (ranks.low == 0)
    return {median, median * std::pow(sorted.front() / median, range_stretch),
            median * std::pow(sorted.back() / median, range_stretch), independent};
  // The same share of the samples lies below the bound as of that many independent ones.
  const double below = std::floor(static_cast<double>(ranks.low - 1) / std::floor(independent) * count);
  const auto low = static_cast<std::size_t>(below);
  return {median, sorted[low], sorted[sorted.size() - 1 - low], independent};
}

Ratio median_ratio(const std::vector<double>& a, const std::vector<double>& b, double alpha, double between_runs) {
  const MedianInterval of_a = dependent_interval(a, alpha), of_b = dependent_interval(b, alpha);
  const auto log_ratio = [](double x, double y) { return std::log(x / y); };
  const double middle = log_ratio(of_b.median, of_a.median);
  const double runs = normal_quantile(alpha) * std::sqrt(2.0) * between_runs;
  const double down = std::hypot(log_ratio(of_b.median, of_b.low), log_ratio(of_a.high, of_a.median), runs);
  const double up = std::hypot(log_ratio(of_b.high, of_b.median), log_ratio(of_a.median, of_a.low), runs);
  return {std::exp(middle), std::exp(middle - down), std::exp(middle + up)};
}

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
