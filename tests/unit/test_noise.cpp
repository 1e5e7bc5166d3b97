// When a point is NOISY: each reason by itself, just beyond its threshold and just within.

#include <string>

#include "catch.hpp"
#include "nsa/report/noise.hpp"

using namespace nsa;

namespace {

/// Mode total on one rank: `count` steps of 100 us, after one that warms up.
PointRecord quiet_point(int count = 24) {
  PointRecord p;
  p.parameters = {{"task.kind", "decode"}, {"run.min_interval", 0.0}};
  p.warmup_reps = 1;
  p.time = {{"total"}, 1, count + 1, std::vector<double>(static_cast<std::size_t>(stage_count * (count + 1)), 1e-4)};
  p.bytes.assign(stage_count, 0);
  p.copy_bandwidth = 1e10;
  NoiseRecord& n = p.noise;
  n.modes = {"total"};
  n.ranks = 1;
  n.seconds = {1}, n.steal = {0}, n.sm_clock_mhz = {1900}, n.sm_clock_max_mhz = {1980};
  n.voluntary_switches = {0}, n.involuntary_switches = {3}, n.minor_faults = {4}, n.major_faults = {1};
  n.throttle_reasons = {0}, n.cache_bytes = {50'000'000};
  return p;
}

/// The seconds of a step after warm-up.
double& step(PointRecord& p, int i) {
  return p.time.seconds[static_cast<std::size_t>(static_cast<int>(Stage::step) * p.time.reps + p.warmup_reps + i)];
}

std::string noise_of(PointRecord p) {
  judge_noise(p);
  std::string text;
  for (const std::string& line : p.noisy) text += line + "\n";
  return text;
}

}  // namespace

TEST_CASE("a point without disturbances is not NOISY", "[noise]") {
  CHECK(noise_of(quiet_point()) == "");
  PointRecord p = quiet_point();
  judge_noise(p);
  CHECK(p.noise.cv.at(0) == Approx(0).margin(1e-12));  // of equal samples; only rounding
  CHECK(p.noise.outlier_share == std::vector<double>{0});
}

TEST_CASE("a step of 44 ms between neighbours of 0.1 ms makes the point NOISY", "[noise]") {
  PointRecord p = quiet_point();
  step(p, 7) = 0.044;
  CHECK(noise_of(p) ==
        "total: 1 of 24 samples above 3 x the median took 95% of the time (largest 44.0 ms, median 100 us); 3 "
        "involuntary context switches, 5 page faults\n");
  judge_noise(p);
  CHECK(p.noise.outlier_share[0] == Approx((0.044 - 1e-4) / (0.044 + 23e-4)));
}

TEST_CASE("a step that warms up, one of twice the median, and too few steps are no noise", "[noise]") {
  PointRecord p = quiet_point();
  step(p, -1) = 0.044;
  for (int i = 0; i < 24; i += 12) step(p, i) = 2.1e-4;  // a step that also compresses
  CHECK(noise_of(p) == "");
  PointRecord few = quiet_point(5);
  step(few, 2) = 0.044;
  CHECK(noise_of(few) == "");
}

TEST_CASE("a median that moves by more than a tenth is noise", "[noise]") {
  for (const double factor : {1.09, 1.11}) {
    PointRecord p = quiet_point();
    for (int i = 12; i < 24; ++i) step(p, i) = factor * 1e-4;
    const std::string noise = noise_of(p);
    CAPTURE(factor, noise);
    CHECK((noise.find("total: the median moved from 100 us in the first half of the samples to 111 us") == 0) ==
          (factor > 1.1));
    CHECK(noise.empty() == (factor < 1.1));
  }
}

TEST_CASE("stolen time, a low clock and NVML's thermal reasons are noise", "[noise]") {
  PointRecord p = quiet_point();
  p.noise.steal = {0.019};
  p.noise.sm_clock_mhz = {1490};
  p.noise.throttle_reasons = {0x4};  // the power cap: normal in long products, seen by the clock
  CHECK(noise_of(p) == "");
  p.noise.steal = {0.05};
  p.noise.sm_clock_mhz = {1480};
  p.noise.throttle_reasons = {0x44};
  CHECK(noise_of(p) ==
        "total, rank 0: other machines or the CPU quota took 5.0% of its cores' time\n"
        "total, rank 0: mean SM clock 1480 MHz, 75% of 1980 MHz\n"
        "total, rank 0: the GPU lowered its clock (temperature; NVML 0x44)\n");
  p.noise.seconds = {0.001}, p.noise.steal = {0.005};  // one tick of the kernel's clock on two cores
  p.noise.sm_clock_mhz = {0}, p.noise.throttle_reasons = {-1};
  CHECK(noise_of(p) == "");
}

TEST_CASE("a copy rate that neither memory nor a cache delivers is noise", "[noise]") {
  const auto with_bytes = [](std::int64_t bytes, double bandwidth) {
    PointRecord p = quiet_point();
    p.bytes[static_cast<std::size_t>(Stage::step)] = bytes;
    p.copy_bandwidth = bandwidth;
    return noise_of(p);
  };
  CHECK(with_bytes(1'000'000, 1e9) == "");  // 1000%, from a cache
  CHECK(with_bytes(1'000'000, 1e10 / 28.78) ==
        "copy rate 2878%: at most 2000% is possible; the copy of 0.3 GB/s was disturbed\n");
  CHECK(with_bytes(200'000'000, 1.4e12) == "");  // 143%
  CHECK(with_bytes(200'000'000, 1.3e12) ==
        "copy rate 154%: at most 150% is possible for bytes that no cache holds; the copy of 1300.0 GB/s was "
        "disturbed\n");
}

TEST_CASE("an interval that stayed wider than asked for is noise", "[noise]") {
  PointRecord p = quiet_point();
  for (int i = 0; i < 24; i += 2) step(p, i) = 1.05e-4;
  p.parameters[1].second = 0.02;
  p.stop_reason = "min_interval";
  CHECK(noise_of(p) == "");
  p.stop_reason = "interval_time";
  CHECK(noise_of(p) == "total: the median's 95% interval is 4.9% wide, not the 2.0% of run.min_interval\n");
}
