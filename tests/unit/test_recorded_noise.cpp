// How often comparisons of runs err, and how often they find a slowdown of 2%, with the noise of recorded files.
// `unit_tests "[study]"` prints the table of docs/METRICS.md, "The comparison".

#include <algorithm>
#include <cmath>
#include <iomanip>
#include <iostream>
#include <random>
#include <span>
#include <string>

#include "catch.hpp"
#include "nsa/report/diff.hpp"
#include "nsa/report/metrics.hpp"
#include "nsa/results/result_file.hpp"

using namespace nsa;

namespace {

/// Samples of mode `total` of every point of a file in docs/results, and by how much runs of its machine differ.
struct Recorded {
  std::string file;
  RunVariation variation;
  int turns;  ///< pairs of a comparison by turns
  std::vector<std::vector<double>> series() const {
    std::vector<std::vector<double>> list;
    for (const PointRecord& point : read_result(std::string(NSA_RESULTS "/") + file).points)
      list.push_back(slowest_samples(point, "total", Stage::step));
    return list;
  }
};
const Recorded gpu{"h200/m4_decode.h5", cuda_variation, 12}, host{"host/m4_decode.h5", host_variation, 24};

/// Runs whose samples are drawn from a series in blocks of 6, so that neighbours stay neighbours.
class Runs {
 public:
  Runs(std::span<const double> series, double between_runs)
      : series_(series), between_runs_(between_runs), random_(static_cast<std::uint64_t>(series.front() * 1e12)) {}

  /// n samples; each takes `factor` times as long, and those of one run vary together.
  std::vector<double> run(int n, double factor) {
    constexpr std::size_t block = 6;
    const double scale = factor * std::exp(between_runs_ * normal_(random_));
    std::uniform_int_distribution<std::size_t> begin(0, series_.size() - block);
    std::vector<double> samples;
    while (samples.size() < static_cast<std::size_t>(n)) {
      const std::size_t from = begin(random_);
      for (std::size_t i = 0; i < block && samples.size() < static_cast<std::size_t>(n); ++i)
        samples.push_back(scale * series_[from + i]);
    }
    return samples;
  }

 private:
  std::span<const double> series_;
  double between_runs_;
  std::mt19937_64 random_;  ///< of its own for every series
  std::normal_distribution<double> normal_;
};

/// Verdicts on `comparisons` pairs of runs, or by turns, of every series; B takes (1 + slowdown) times as long.
struct Rates {
  int comparisons = 0, slower = 0, faster = 0, same = 0;
  double found() const { return static_cast<double>(slower) / comparisons; }
  double different() const { return static_cast<double>(slower + faster) / comparisons; }
  void add(Difference d) {
    ++comparisons;
    slower += d == Difference::slower;
    faster += d == Difference::faster;
    same += d == Difference::same;
  }
};

/// `nsa diff` of two runs.
Rates by_diff(const Recorded& recorded, int n, double slowdown, int comparisons) {
  Rates rates;
  const double between = recorded.variation.between_runs;
  for (const std::vector<double>& series : recorded.series()) {
    Runs runs(series, between);
    for (int i = 0; i < comparisons; ++i)
      rates.add(judge_ratio(median_ratio(runs.run(n, 1), runs.run(n, 1 + slowdown), family_error, between),
                            recorded.variation.same_margin));
  }
  return rates;
}

/// `nsa run --against`.
Rates by_turns(const Recorded& recorded, int n, double slowdown, int comparisons) {
  Rates rates;
  for (const std::vector<double>& series : recorded.series()) {
    Runs runs(series, recorded.variation.between_runs);
    for (int i = 0; i < comparisons; ++i) {
      std::vector<double> ratios;
      for (int pair = 0; pair < recorded.turns; ++pair) {
        const double a = summarise(runs.run(n, 1)).median;
        ratios.push_back(summarise(runs.run(n, 1 + slowdown)).median / a);
      }
      const Summary r = summarise(ratios, family_error);
      rates.add(judge_ratio({r.median, r.low, r.high}, turns_same_margin));
    }
  }
  return rates;
}

}  // namespace

TEST_CASE("recorded noise: by turns 2% is found in 95%, and equal programs differ in 1%", "[diff]") {
  for (const auto& [recorded, n] : {std::pair(gpu, 100), std::pair(host, 1600)}) {
    const Rates slowed = by_turns(recorded, n, 0.02, 40), equal = by_turns(recorded, 100, 0, 40);
    CAPTURE(recorded.file, slowed.slower, equal.slower, equal.faster, equal.comparisons);
    CHECK(slowed.comparisons == 400);
    CHECK(slowed.found() >= 0.95);
    CHECK(equal.slower + equal.faster <= 9);  // 4 expected at most; 10 or more have a probability of 1%
  }
}

TEST_CASE("recorded noise: two runs are called different in 1%", "[diff]") {
  for (const Recorded& recorded : {gpu, host}) {
    const Rates equal = by_diff(recorded, 100, 0, 40);
    CAPTURE(recorded.file, equal.slower, equal.faster);
    CHECK(equal.slower + equal.faster <= 9);
  }
  CHECK(by_diff(gpu, 400, 0.035, 20).found() >= 0.95);
}

TEST_CASE("the table of error rates with recorded noise", "[.][study]") {
  std::cout << std::fixed << std::setprecision(1) << std::setw(20) << "noise of" << std::setw(10) << "samples"
            << std::setw(30) << "nsa diff: differ, 2%, 3.5%" << std::setw(34) << "by turns: pairs, differ, 2%\n";
  for (const Recorded& recorded : {gpu, host})
    for (const int n : {24, 100, 400, 1600}) {
      const auto percent = [](double share) { return 100 * share; };
      std::cout << std::setw(20) << recorded.file << std::setw(10) << n;
      for (const double slowdown : {0.0, 0.02, 0.035}) {
        const Rates rates = by_diff(recorded, n, slowdown, 300);
        std::cout << std::setw(10) << percent(slowdown > 0 ? rates.found() : rates.different());
      }
      std::cout << std::setw(14) << recorded.turns;
      for (const double slowdown : {0.0, 0.02}) {
        const Rates rates = by_turns(recorded, n, slowdown, 300);
        std::cout << std::setw(10) << percent(slowdown > 0 ? rates.found() : rates.different());
      }
      std::cout << " %" << std::endl;
    }
}
