#include "nsa/report/noise.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>

#include "nsa/report/metrics.hpp"
#include "nsa/report/statistics.hpp"

namespace nsa {
namespace {

constexpr double drift_alpha = 0.01;
constexpr double steal_ticks = 0.02;  ///< s: two ticks of the clock that counts it; one says nothing about a short mode

std::string share_text(double share) { return fmt::format("{:.{}f}%", 100 * share, share < 0.0995 ? 1 : 0); }

/// The samples that a point reports: of a mode's steps, or of an implementation.
struct Series {
  std::string name;
  std::vector<double> samples;  ///< slowest rank
};

std::vector<Series> all_series(const PointRecord& p) {
  std::vector<Series> list;
  for (const std::string& mode : p.time.modes) list.push_back({mode, slowest_samples(p, mode, Stage::step)});
  for (const std::string& name : p.kernels.implementations) list.push_back({name, kernel_samples(p, name)});
  return list;
}

/// The largest value over the series that one rank measured in a mode, or (kind = "kernels") over implementations.
template <class Statistic>
double largest(const PointRecord& p, const std::string& mode, std::int64_t rank, Statistic&& of) {
  const KernelRecord& k = p.kernels;
  if (k.implementations.empty()) return of(rank_samples(p, mode, Stage::step, rank));
  double most = std::numeric_limits<double>::quiet_NaN();
  for (std::int64_t i = 0; i < std::ssize(k.implementations); ++i) {
    const auto row = k.seconds.begin() + (i * k.ranks + rank) * k.reps;
    most = std::fmax(most, of(std::vector<double>(row + std::min(p.warmup_reps, k.reps), row + k.reps)));
  }
  return most;
}

std::int64_t sample_count(const PointRecord& p, const std::string& mode) {
  const KernelRecord& k = p.kernels;
  if (!k.implementations.empty()) return k.reps - p.warmup_reps;
  return std::ssize(slowest_samples(p, mode, Stage::step));
}

/// The counters of a mode, summed over ranks, as an explanation; empty where there is nothing to tell.
std::string counters_text(const NoiseRecord& n, const std::string& mode) {
  const auto at = std::find(n.modes.begin(), n.modes.end(), mode);
  if (n.modes.empty()) return {};
  const std::int64_t first = at == n.modes.end() ? 0 : (at - n.modes.begin()) * n.ranks;
  const auto sum = [&](const std::vector<std::int64_t>& of) {
    return std::accumulate(of.begin() + first, of.begin() + first + n.ranks, std::int64_t{0});
  };
  return fmt::format("; {} involuntary context switches, {} page faults", sum(n.involuntary_switches),
                     sum(n.minor_faults) + sum(n.major_faults));
}

void judge_samples(const PointRecord& p, const Series& series, std::vector<std::string>& reasons) {
  const Summary all = summarise(series.samples);
  if (std::isnan(all.low)) return;  // too few samples to tell an outlier
  if (const double share = outlier_share(series.samples); share > most_outlier_share) {
    const auto outliers =
        std::ranges::count_if(series.samples, [&](double s) { return s > outlier_factor * all.median; });
    reasons.push_back(fmt::format(
        "{}: {} of {} samples above {} x the median took {} of the time (largest {}, median {}){}", series.name,
        outliers, all.n, outlier_factor, share_text(share), time_text(*std::ranges::max_element(series.samples)),
        time_text(all.median), counters_text(p.noise, series.name)));
  }
  const auto middle = series.samples.begin() + static_cast<std::ptrdiff_t>(series.samples.size() / 2);
  const Summary first = summarise({series.samples.begin(), middle}, drift_alpha),
                second = summarise({middle, series.samples.end()}, drift_alpha);
  const bool moved = first.high < second.low || second.high < first.low;  // false where there is no interval
  if (moved && std::fmax(first.median / second.median, second.median / first.median) > 1 + most_drift)
    reasons.push_back(fmt::format("{}: the median moved from {} in the first half of the samples to {} in the second{}",
                                  series.name, time_text(first.median), time_text(second.median),
                                  counters_text(p.noise, series.name)));
}

/// Of modes with enough samples for an interval: no statement rests on the others.
void judge_counters(const PointRecord& p, std::vector<std::string>& reasons) {
  const NoiseRecord& n = p.noise;
  constexpr std::int64_t slowdown = 0x8, software_thermal = 0x20, thermal = 0x40, power_brake = 0x80;  // of NVML
  for (std::size_t i = 0; i < n.seconds.size(); ++i) {
    const std::size_t rank = i % static_cast<std::size_t>(n.ranks);
    if (sample_count(p, n.modes[i / static_cast<std::size_t>(n.ranks)]) < samples_needed(0.05)) continue;
    const std::string where = fmt::format("{}, rank {}", n.modes[i / static_cast<std::size_t>(n.ranks)], rank);
    if (n.steal[i] >= steal_ticks && n.steal[i] > most_steal * n.seconds[i])
      reasons.push_back(fmt::format("{}: other machines or the CPU quota took {} of its cores' time", where,
                                    share_text(n.steal[i] / n.seconds[i])));
    const double clock = n.sm_clock_mhz[i], most = n.sm_clock_max_mhz[rank];
    if (clock > 0 && most > 0 && clock < least_clock * most)
      reasons.push_back(
          fmt::format("{}: mean SM clock {:.0f} MHz, {} of {:.0f} MHz", where, clock, share_text(clock / most), most));
    const std::int64_t bits = n.throttle_reasons[i];
    if (bits >= 0 && (bits & (slowdown | software_thermal | thermal | power_brake)) != 0)
      reasons.push_back(fmt::format("{}: the GPU lowered its clock ({}; NVML 0x{:x})", where,
                                    (bits & (software_thermal | thermal)) != 0 ? "temperature" : "hardware or power",
                                    bits));
  }
}

/// A step cannot move its bytes faster than memory, or a cache that holds them, delivers them.
void judge_copy_rate(const PointRecord& p, std::vector<std::string>& reasons) {
  const double rate = copy_rate_fraction(p);
  if (std::isnan(rate)) return;
  const std::int64_t cache = p.noise.cache_bytes.empty() ? 0 : std::ranges::max(p.noise.cache_bytes);
  const bool cached = cache <= 0 || busiest_bytes(p) < 2 * cache;
  const double most = cached ? most_cached_copy_rate : most_copy_rate;
  if (rate <= most) return;
  reasons.push_back(fmt::format("copy rate {}: at most {} is possible{}; the copy of {:.1f} GB/s was disturbed",
                                share_text(rate), share_text(most), cached ? "" : " for bytes that no cache holds",
                                p.copy_bandwidth / 1e9));
}

void judge_interval(const PointRecord& p, const Series& series, std::vector<std::string>& reasons) {
  const double asked = real_parameter(p, "run.min_interval", 0);
  const Summary s = summarise(series.samples);
  const double width = (s.high - s.low) / s.median;
  if (asked > 0 && !(width <= asked) && p.stop_reason == "interval_time")
    reasons.push_back(fmt::format("{}: the median's 95% interval is {} wide, not the {} of run.min_interval",
                                  series.name, share_text(width), share_text(asked)));
}

}  // namespace

double outlier_share(const std::vector<double>& samples) {
  const double bound = summarise(samples).median;
  double beyond = 0, all = 0;
  for (const double sample : samples) {
    all += sample;
    if (sample > outlier_factor * bound) beyond += sample - bound;
  }
  return all > 0 ? beyond / all : std::numeric_limits<double>::quiet_NaN();
}

void judge_noise(PointRecord& p) {
  NoiseRecord& n = p.noise;
  n.cv.clear(), n.outlier_share.clear();
  for (const std::string& mode : n.modes)
    for (std::int64_t rank = 0; rank < n.ranks; ++rank) {
      n.cv.push_back(largest(p, mode, rank, [](const std::vector<double>& own) { return summarise(own).cv; }));
      n.outlier_share.push_back(largest(p, mode, rank, outlier_share));
    }
  p.noisy.clear();
  if (n.modes.empty()) return;  // kind = "needle": its steps are checked, not timed
  for (const Series& series : all_series(p)) {
    judge_samples(p, series, p.noisy);
    judge_interval(p, series, p.noisy);
  }
  judge_counters(p, p.noisy);
  judge_copy_rate(p, p.noisy);
}

}  // namespace nsa
