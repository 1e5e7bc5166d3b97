#include <cmath>
#include <limits>
#include <numeric>

#include "catch.hpp"
#include "nsa/report/statistics.hpp"

using namespace nsa;

TEST_CASE("ranks of the median's 95% interval", "[statistics]") {
  struct {
    std::int64_t n, low, high;
  } const table[] = {{0, 0, 0},   {1, 0, 0},    {5, 0, 0},    {6, 1, 6},    {10, 2, 9},
                     {20, 6, 15}, {30, 10, 21}, {50, 18, 33}, {100, 40, 61}};
  for (const auto& row : table) {
    CAPTURE(row.n);
    CHECK(median_interval(row.n).low == row.low);
    CHECK(median_interval(row.n).high == row.high);
  }
}

TEST_CASE("the interval of many samples does not underflow", "[statistics]") {
  // Normal approximation: n/2 -+ 1.96 sqrt(n)/2, right to a rank or two at n = 10000.
  CHECK(std::abs(median_interval(10000).low - 4902) <= 2);
  CHECK(median_interval(10000).low + median_interval(10000).high == 10001);
}

TEST_CASE("summary of samples in any order", "[statistics]") {
  std::vector<double> samples(20);
  std::iota(samples.rbegin(), samples.rend(), 1.0);  // 20 .. 1
  samples.push_back(std::numeric_limits<double>::quiet_NaN());
  const Summary s = summarise(samples);
  CHECK(s.n == 20);
  CHECK(s.median == 10.5);
  CHECK(s.low == 6);
  CHECK(s.high == 15);
  CHECK(s.min == 1);
  CHECK(s.p95 == 19);  // nearest rank: the 19th of 20
  CHECK(s.p99 == 20);
  CHECK(s.cv == Approx(std::sqrt(35.0) / 10.5).epsilon(1e-12));  // variance of 1..n is n(n+1)/12; only rounding
}

TEST_CASE("odd counts, few samples, none", "[statistics]") {
  CHECK(summarise({3, 1, 2}).median == 2);
  CHECK(std::isnan(summarise({3, 1, 2}).low));
  CHECK(summarise({7}).p99 == 7);
  CHECK(std::isnan(summarise({7}).cv));
  const Summary none = summarise({std::numeric_limits<double>::quiet_NaN()});
  CHECK(none.n == 0);
  CHECK(std::isnan(none.median));
  CHECK(std::isnan(none.p95));
}

TEST_CASE("an interval that misses less often is wider and needs more samples", "[statistics]") {
  CHECK(median_interval(41).low == 14);
  CHECK(median_interval(41, 0.005).low == 12);
  CHECK(samples_needed(0.05) == 6);
  CHECK(samples_needed(0.005) == 9);
  CHECK(median_interval(8, 0.005).low == 0);
}

TEST_CASE("normal quantiles", "[statistics]") {
  CHECK(normal_quantile(0.05) == Approx(1.959964).epsilon(1e-6));
  CHECK(normal_quantile(0.001) == Approx(3.290527).epsilon(1e-6));
}
