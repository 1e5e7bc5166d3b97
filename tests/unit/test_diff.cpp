// How often `nsa diff` is wrong about samples whose difference is known.

#include <algorithm>
#include <cmath>
#include <random>

#include "catch.hpp"
#include "nsa/report/diff.hpp"

using namespace nsa;

namespace {

/// n times of a run around 1, lognormal with `spread`; neighbours correlate by `memory`.
std::vector<double> a_run(std::mt19937_64& random, int n, double spread, double memory) {
  std::normal_distribution<double> normal;
  std::vector<double> times;
  double x = normal(random);
  for (int i = 0; i < n; ++i) {
    times.push_back(std::exp(spread * x));
    x = memory * x + std::sqrt(1 - memory * memory) * normal(random);
  }
  return times;
}

struct Counts {
  int same = 0, faster = 0, slower = 0, unclear = 0;
};

/// B takes (1 + slowdown) times as long as A; the whole of each run, exp(between_runs N(0, 1)) times as long.
Counts compare_pairs(int pairs, int n, double spread, double memory, double slowdown,
                     const RunVariation& variation = cuda_variation) {
  std::mt19937_64 random(7);
  std::normal_distribution<double> normal;
  Counts counts;
  for (int i = 0; i < pairs; ++i) {
    const std::vector<double> a = a_run(random, n, spread, memory);
    std::vector<double> b = a_run(random, n, spread, memory);
    const double run = std::exp(variation.between_runs * std::sqrt(2.0) * normal(random));
    for (double& time : b) time *= run * (1 + slowdown);
    const Difference d = judge_ratio(median_ratio(a, b, family_error, variation.between_runs), variation.same_margin);
    ++(d == Difference::same     ? counts.same
       : d == Difference::faster ? counts.faster
       : d == Difference::slower ? counts.slower
                                 : counts.unclear);
  }
  return counts;
}

}  // namespace

TEST_CASE("equal runs: at most 1% of the pairs are called different", "[diff]") {
  for (const int n : {24, 80, 400})
    for (const double spread : {0.003, 0.02, 0.2})
      for (const double memory : {0.0, 0.5, 0.8}) {
        if (n == 24 && memory == 0.8) continue;  // 3 independent ones: too few to tell how dependent they are
        for (const RunVariation& variation : {host_variation, cuda_variation}) {
          const Counts c = compare_pairs(1000, n, spread, memory, 0, variation);
          CAPTURE(n, spread, memory, variation.between_runs, c.faster, c.slower);
          CHECK(c.faster + c.slower <= 16);  // 10 expected at most; 17 or more have a probability of 3%
        }
      }
}

TEST_CASE("a slowdown of 3.5% is found in 95% of the pairs of GPU runs whose samples are narrow", "[diff]") {
  for (const auto& [n, spread, memory] :
       {std::tuple(24, 0.002, 0.0), {80, 0.003, 0.5}, {400, 0.01, 0.0}, {400, 0.003, 0.8}}) {
    const Counts c = compare_pairs(200, n, spread, memory, 0.035);
    CAPTURE(n, spread, memory, c.slower, c.unclear);
    CHECK(c.slower >= 190);
    CHECK(c.faster == 0);
  }
  CHECK(compare_pairs(200, 24, 0.1, 0.8, 2.0).slower >= 190);    // three times as long, of few independent samples
  CHECK(compare_pairs(200, 24, 0.2, 0.0, 0.02).unclear >= 196);  // and it does not guess where it cannot know
}

TEST_CASE("by turns, 2% is found in 95% of the comparisons, and equal programs differ in 1%", "[diff]") {
  struct {
    RunVariation variation;
    int pairs;
  } const cases[] = {{cuda_variation, 12}, {host_variation, 24}};
  for (const auto& [variation, pairs] : cases)
    for (const double slowdown : {0.0, 0.02}) {
      std::mt19937_64 random(11);
      std::normal_distribution<double> normal;
      int slower = 0, faster = 0;
      for (int comparison = 0; comparison < 1000; ++comparison) {
        std::vector<double> ratios;
        for (int i = 0; i < pairs; ++i)
          ratios.push_back((1 + slowdown) * std::exp(variation.between_runs * std::sqrt(2.0) * normal(random)));
        const Summary r = summarise(ratios, family_error);
        const Difference d = judge_ratio({r.median, r.low, r.high}, turns_same_margin);
        slower += d == Difference::slower;
        faster += d == Difference::faster;
      }
      CAPTURE(pairs, slowdown, slower, faster);
      if (slowdown > 0)
        CHECK(slower >= 950);
      else
        CHECK(slower + faster <= 16);  // 10 expected at most
    }
  CHECK(pairs_needed(1) == 8);
  CHECK(pairs_needed(13) == 12);
}

TEST_CASE("verdicts by where the interval of the ratio lies", "[diff]") {
  const auto judge = [](double low, double high) { return judge_ratio({1, low, high}, 0.02); };
  CHECK(judge(1.001, 1.5) == Difference::slower);
  CHECK(judge(1.001, 1.01) == Difference::slower);
  CHECK(judge(0.999, 1.5) == Difference::unclear);
  CHECK(judge(0.5, 0.999) == Difference::faster);
  CHECK(judge(0.5, 1.001) == Difference::unclear);
  CHECK(judge(0.99, 1.019) == Difference::same);
  CHECK(judge(0.97, 1.019) == Difference::unclear);
  CHECK(judge(std::nan(""), std::nan("")) == Difference::unclear);
}

TEST_CASE("samples that depend on their neighbours count as fewer", "[statistics]") {
  std::mt19937_64 random(3);
  const std::vector<double> independent = a_run(random, 400, 0.1, 0), dependent = a_run(random, 400, 0.1, 0.8);
  CHECK(dependent_interval(independent, 0.05).n > 250);
  CHECK(dependent_interval(dependent, 0.05).n < 120);  // correlation of signs of an AR(1): (2/pi) asin(0.8^k)
  CHECK(std::isnan(dependent_interval({1, 2, 3, 4, 5}, 0.05).low));
  std::vector<double> two_levels(12, 2.0);
  std::fill(two_levels.begin() + 6, two_levels.end(), 4.0);
  two_levels.push_back(4.0);
  CHECK(dependent_interval(two_levels, 0.05).low == Approx(4 * 0.125));  // the range, three times as far
  const MedianInterval i = dependent_interval({5, 1, 4, 2, 3, 6, 8, 7, 10, 9}, 0.05);
  CHECK(i.median == 5.5);
}

TEST_CASE("the interval of a ratio combines both sides", "[statistics]") {
  std::mt19937_64 random(5);
  const std::vector<double> a = a_run(random, 100, 0.05, 0), b = a_run(random, 100, 0.05, 0);
  const Ratio there = median_ratio(a, b, 0.05, 0.01), back = median_ratio(b, a, 0.05, 0.01);
  CHECK(there.value * back.value == Approx(1));
  CHECK(there.low * back.high == Approx(1));
  CHECK(there.low < there.value);
  CHECK(there.value < there.high);
  const Ratio within = median_ratio(a, b, 0.05, 0);  // the samples alone; runs add 1.96 * sqrt(2) * 1% in quadrature
  CHECK(std::pow(std::log(there.high / there.value), 2) - std::pow(std::log(within.high / within.value), 2) ==
        Approx(std::pow(1.959964 * std::sqrt(2.0) * 0.01, 2)));
  CHECK(std::isnan(median_ratio({1, 2, 3}, b, 0.05, 0).low));
}
