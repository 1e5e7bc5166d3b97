#include "nsa/gate/shape_conditions.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <functional>

#include "nsa/report/metrics.hpp"

namespace nsa {

bool has_interval(const Measured& m) { return std::isfinite(m.value) && std::isfinite(m.low) && std::isfinite(m.high); }

Outcome outcome_of(const Measured& m, double threshold, bool at_least) {
  if (!has_interval(m)) return Outcome::open;
  const bool above = m.low >= threshold, below = m.high < threshold;
  if (at_least) return above ? Outcome::met : below ? Outcome::not_met : Outcome::open;
  return m.high <= threshold ? Outcome::met : m.low > threshold ? Outcome::not_met : Outcome::open;
}

std::string too_few(std::int64_t n, double alpha) {
  return fmt::format("{} samples give no interval here, {} do; raise run.steps", n, samples_needed(alpha));
}

std::string noise_gap(const PointRecord& point) {
  return fmt::format("NOISY ({}); run it again on a quiet machine", point.noisy.front());
}

namespace {

constexpr const char* kernels_run = "nsa run inputs/gate/m4_kernels.toml";

std::int64_t find_implementation(const KernelRecord& k, const char* name) {
  const auto at = std::find(k.implementations.begin(), k.implementations.end(), name);
  return at == k.implementations.end() ? -1 : at - k.implementations.begin();
}

/// One time of a shape that `fused` is compared with.
struct Baseline {
  std::string name;
  Measured speed;  ///< of `fused` over it
};

/// Repetition by repetition: both were measured in alternation.
Measured paired_ratio(const PointRecord& point, const std::string& of, double alpha) {
  const Summary s = kernel_ratio(point, of, "fused", alpha);
  return {s.median, s.low, s.high, s.n};
}

/// Of two runs: the ratio of the medians, between the ratios of their bounds, each of which misses with half of alpha.
Measured unpaired_ratio(const PointRecord& peer, const std::string& of, const PointRecord& point, double alpha) {
  const Summary base = summarise(kernel_samples(peer, of), alpha / 2);
  const Summary fused = summarise(kernel_samples(point, "fused"), alpha / 2);
  return {base.median / fused.median, base.low / fused.high, base.high / fused.low, std::min(base.n, fused.n)};
}

/// The baselines whose names end in one of `endings`: of this program, and of peers. "sdpa" gathers first.
std::vector<Baseline> baselines(const KernelEvidence& evidence, std::initializer_list<const char*> endings,
                                double alpha) {
  const auto is_one = [&](const std::string& name) {
    return std::any_of(endings.begin(), endings.end(), [&](const char* ending) { return name.ends_with(ending); });
  };
  std::vector<Baseline> list;
  for (const std::string& name : evidence.point->kernels.implementations)
    if (is_one(name)) list.push_back({name, paired_ratio(*evidence.point, name, alpha)});
  for (const PeerPoint& peer : evidence.peers)
    for (const std::string& name : peer.point->kernels.implementations)
      if (is_one(name)) list.push_back({name, unpaired_ratio(*peer.point, name, *evidence.point, alpha)});
  return list;
}

/// Speed over the fastest: the smallest value, and the smallest bounds, of all baselines. Without an interval where one
/// of them has none.
Speed over_fastest(const std::vector<Baseline>& list) {
  Speed speed{{none, none, none, 0}, {}};
  for (const Baseline& b : list) {
    Measured& m = speed.measured;
    if (!has_interval(b.speed)) return {b.speed, b.name};
    if (speed.baseline.empty()) m = b.speed;
    if (speed.baseline.empty() || b.speed.value < m.value) speed.baseline = b.name;
    m = {std::min(m.value, b.speed.value), std::min(m.low, b.speed.low), std::min(m.high, b.speed.high),
         std::min(m.n, b.speed.n)};
  }
  return speed;
}

Measured mean_error(const KernelRecord& k, double alpha) {
  const std::int64_t at = find_implementation(k, "fused");
  if (at < 0) return {none, none, none, 0};
  const double mean = k.mean_abs_err[static_cast<std::size_t>(at)];
  if (std::isnan(mean)) return {none, none, none, 0};  // run.check was off
  const double half = normal_quantile(alpha) * k.mean_abs_err_se[static_cast<std::size_t>(at)];
  return {mean, std::max(0.0, mean - half), mean + half, 1};
}

/// Why the times of the shape decide nothing; empty: they do.
std::string noisy_of(const KernelEvidence& evidence) {
  if (!evidence.point->noisy.empty()) return noise_gap(*evidence.point);
  for (const PeerPoint& peer : evidence.peers)
    if (!peer.point->noisy.empty()) return noise_gap(*peer.point);
  return {};
}

std::vector<ShapeResult> shape_results(const DevicePoints& points) {
  const double alpha = family_alpha / static_cast<double>(std::max<std::size_t>(1, points.kernels.size()));
  std::vector<ShapeResult> shapes;
  for (const KernelEvidence& evidence : points.kernels)
    shapes.push_back({shape_name(*evidence.point), kernel_variant(*evidence.point, "fused"),
                      over_fastest(baselines(evidence, {"sdpa", "sdpa_gemm"}, alpha)),
                      over_fastest(baselines(evidence, {"sdpa_packed", "sdpa_gemm_packed", "flash_packed"}, alpha)),
                      mean_error(evidence.point->kernels, alpha), noisy_of(evidence)});
  return shapes;
}

/// "N=256 H=4 D=64 n=8 scattered and 46 more: not in k.h5 ...": the points that are missing, and why the first is.
std::string gap_text(const std::vector<Gap>& gaps) {
  return fmt::format("{}{}: {}", gaps.front().what,
                     gaps.size() == 1 ? "" : fmt::format(" and {} more", gaps.size() - 1), gaps.front().why);
}

/// A value of each shape, and the baseline that it is over; that of an error is empty.
using ShapeValue = std::function<Speed(const ShapeResult&)>;

/// Why the value of the shape has no interval.
std::string unknown_text(const std::string& shape, const Speed& value, double alpha) {
  const std::string of = value.baseline.empty() ? shape : fmt::format("{} against {}", shape, value.baseline);
  const Measured& m = value.measured;
  return m.n == 0 || std::isfinite(m.low) ? of + " lacks an implementation, or was not checked"
                                          : fmt::format("{}: {}", of, too_few(m.n, alpha));
}

/// A condition that every shape has to meet: the worst value of all shapes, and the worst bounds. `gaps`: the shapes
/// that leave it open.
Condition over_shapes(const std::vector<Gap>& gaps, const std::vector<ShapeResult>& shapes, const ShapeValue& value_of,
                      Condition c) {
  c.measured = {none, none, none, 0};
  if (shapes.empty()) {
    c.why = gaps.empty() ? fmt::format("not measured: {}", kernels_run) : gap_text(gaps);
    return c;
  }
  std::string worst, unknown;
  for (const ShapeResult& shape : shapes) {
    const Speed value = value_of(shape);
    const Measured& m = value.measured;
    if (!has_interval(m)) {
      if (unknown.empty()) unknown = unknown_text(shape.name, value, family_alpha / static_cast<double>(shapes.size()));
      continue;
    }
    if (worst.empty() || (c.at_least ? m.value < c.measured.value : m.value > c.measured.value))
      worst = shape.name + (value.baseline.empty() ? "" : " against " + value.baseline);
    if (std::isnan(c.measured.low)) c.measured = m;
    const auto pick = [&](double a, double b) { return c.at_least ? std::min(a, b) : std::max(a, b); };
    c.measured = {pick(c.measured.value, m.value), pick(c.measured.low, m.low), pick(c.measured.high, m.high),
                  std::min(c.measured.n, m.n)};
  }
  c.outcome = outcome_of(c.measured, c.threshold, c.at_least);
  if (!worst.empty()) c.why = "worst: " + worst;
  const auto noisy = std::ranges::find_if(shapes, [](const ShapeResult& shape) { return !shape.noisy.empty(); });
  if (c.unit != Unit::error && noisy != shapes.end()) {  // an error does not depend on noise
    c.outcome = Outcome::open;
    c.why = fmt::format("{}: {}", noisy->name, noisy->noisy);
    return c;
  }
  if (c.outcome == Outcome::not_met) return c;
  if (unknown.empty() && !gaps.empty()) unknown = gap_text(gaps);
  if (!unknown.empty()) {
    c.outcome = Outcome::open;
    c.why = unknown;
  } else if (c.outcome == Outcome::open) {
    c.why += fmt::format("; the interval holds {}, raise run.steps", c.threshold);
  }
  return c;
}

}  // namespace

void judge_shapes(DeviceVerdict& device, const DevicePoints& points) {
  device.shapes = shape_results(points);
  const auto shapes = [&](const std::vector<Gap>& gaps, const ShapeValue& value_of, const char* name, double threshold,
                          Unit unit) {
    const bool at_least = unit == Unit::ratio;
    return over_shapes(gaps, device.shapes, value_of, {name, unit, threshold, at_least, {}, Outcome::open, {}});
  };
  std::vector<Gap> speed_gaps = points.kernel_gaps;
  speed_gaps.insert(speed_gaps.end(), points.peer_gaps.begin(), points.peer_gaps.end());
  device.speedup = shapes(
      speed_gaps, [](const ShapeResult& s) { return s.with_gather; }, "speed over packed SDPA with its gather >= 1.2x",
      gate_speedup, Unit::ratio);
  device.speedup_packed = shapes(
      speed_gaps, [](const ShapeResult& s) { return s.packed; }, "speed over packed SDPA without the gather >= 1.2x",
      gate_speedup, Unit::ratio);
  device.error = shapes(
      points.kernel_gaps,
      [](const ShapeResult& s) {
        return Speed{s.error, {}};
      },
      "mean absolute error <= 1e-3", gate_error, Unit::error);
}

}  // namespace nsa
