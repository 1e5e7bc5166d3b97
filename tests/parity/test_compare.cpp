// Tests of the comparison: it must find the differences that it is made for.

#include <limits>

#include "catch.hpp"
#include "parity/compare.hpp"

using oracle::Integers;
using oracle::Reals;

TEST_CASE("deviation is relative to the largest expected value and detects NaN", "[compare]") {
  const Reals b({1, 2, 2}, std::vector<double>{1, -4, 0, 2});
  Reals a = b;
  CHECK(parity::deviation(a, b).largest == 0);
  a(0, 1, 0) = 0.4;
  CHECK(parity::deviation(a, b).largest == Approx(0.1));
  CHECK(parity::deviation(a, b).mean == Approx(0.025));
  a(0, 0, 0) = std::numeric_limits<double>::quiet_NaN();
  CHECK_FALSE(parity::deviation(a, b).largest < 1e300);
}

TEST_CASE("selections differ only by ties", "[compare]") {
  oracle::Options o;
  o.l_sel = 4;
  o.n_sel = 3;
  o.n_init = 1;
  o.n_local = 1;
  const Reals scores({1, 1, 1, 5}, std::vector<double>{0, 0.5, 0.50001, 0.9, 0});
  const auto selection = [](std::vector<std::int64_t> blocks) { return Integers({1, 1, 1, 3}, std::move(blocks)); };
  const auto compare = [&](std::vector<std::int64_t> a, std::vector<std::int64_t> b) {
    return parity::compare_selections(o, selection(std::move(a)), selection(std::move(b)), scores, 19);
  };
  CHECK(compare({0, 3, 4}, {0, 3, 4}).differing == 0);
  CHECK(compare({0, 1, 4}, {0, 2, 4}).widest_gap == Approx(1e-5));
  CHECK(compare({0, 1, 4}, {0, 3, 4}).widest_gap == Approx(0.4));
  CHECK(compare({0, 3, 4}, {0, 3, 4}).well_formed);
  CHECK_FALSE(compare({3, 0, 4}, {0, 3, 4}).well_formed);
  CHECK_FALSE(compare({0, 3, -1}, {0, 3, 4}).well_formed);
  CHECK_FALSE(compare({1, 3, 4}, {0, 3, 4}).well_formed);  // the first block is forced
  CHECK_FALSE(compare({0, 2, 3}, {0, 3, 4}).well_formed);  // and the last
}

TEST_CASE("rows are cut from every sequence", "[compare]") {
  const Reals all({2, 3, 1}, std::vector<double>{0, 1, 2, 10, 11, 12});
  CHECK(parity::rows_of(all, 1, 2).values == std::vector<double>{1, 2, 11, 12});
  CHECK_THROWS_AS(parity::rows_of(all, 2, 2), std::out_of_range);
}
