// Loans of KV tiles between the rows of a ragged batch (kernels/cuda/sizes/tile_loans.hpp).

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <random>
#include <vector>

#include "catch.hpp"
#include "kernels/cuda/sizes/tile_loans.hpp"

using namespace nsa::gpu;

namespace {

struct Loans {
  LoanRules rules;
  int share;
  std::vector<RowLoans> rows;
};

Loans loans_of(const std::vector<int>& tiles, int round) {
  const LoanRules rules{static_cast<int>(tiles.size()), round};
  const int share = loan_share(rules, [&](auto f) {
    int sum = 0;
    for (const int x : tiles) sum += f(x);
    return sum;
  });
  Loans loans{rules, share, {}};
  for (const int x : tiles) loans.rows.push_back(loans_of_row(rules, share, x));
  for (int row = 0; row < rules.rows; ++row) add_longer_rows(rules.rows, tiles.data(), loans.rows.data(), row);
  return loans;
}

/// Work of the busiest cluster over the mean, the rounds that borrowers lose included.
double check_loans(const std::vector<int>& tiles, int round) {
  const Loans loans = loans_of(tiles, round);
  const int rows = loans.rules.rows;
  std::vector<std::vector<int>> attended;  // how often, by row and tile
  for (const int x : tiles) attended.emplace_back(static_cast<std::size_t>(x), 0);
  std::map<int, int> lender_of_partial;
  int most = 0;
  bool whole = true, fits = true;
  for (int row = 0; row < rows; ++row) {
    const RowLoans& own = loans.rows[row];
    const int kept = tiles[row] - own.lent;
    fits &= own.lent >= 0 && (kept > 0 || tiles[row] == 0) && own.lent % round == 0;
    for (int i = own.lent; i < tiles[row]; ++i) ++attended[row][i];
    int work = kept + tiles[row] / tiles_scored_in_one, borrowed = 0;
    for (int other = 0; other < rows; ++other) {
      const RowLoans& lender = loans.rows[other];
      const RowLoans::Piece piece = own.from(lender);
      if (piece.count <= 0) continue;
      fits &= other != row && piece.first >= 0 && piece.first + piece.count <= lender.lent;
      for (int i = piece.first; i < piece.first + piece.count; ++i) ++attended[other][i];
      const int partial = own.partial_for(lender);
      fits &= partial >= 0 && partial < rows && !lender_of_partial.contains(partial);
      lender_of_partial[partial] = other;
      borrowed += piece.count;
    }
    fits &= borrowed <= own.room;
    most = std::max(most, work + borrowed + (borrowed > 0 ? round : 0));
  }
  for (const auto& row : attended) whole &= std::all_of(row.begin(), row.end(), [](int times) { return times == 1; });
  CHECK(whole);
  CHECK(fits);
  // The partials of a lender follow one another.
  int before = -1;
  std::vector<bool> seen(tiles.size(), false);
  bool consecutive = true;
  for (const auto& [partial, lender] : lender_of_partial) {
    consecutive &= lender == before || !seen[lender];
    seen[lender] = true, before = lender;
  }
  std::map<int, std::pair<int, int>> range;
  for (const auto& [partial, lender] : lender_of_partial) {
    const auto [at, fresh] = range.insert({lender, {partial, partial}});
    if (!fresh) consecutive &= partial == at->second.second + 1, at->second.second = partial;
  }
  CHECK(consecutive);
  const double mean =
      std::accumulate(tiles.begin(), tiles.end(), 0.0, [](double sum, int x) { return sum + work_of_tiles(x); }) / rows;
  // The scores of the longest row are not lent.
  const int alone = *std::max_element(tiles.begin(), tiles.end()) / tiles_scored_in_one + round;
  CHECK(most <= std::max(static_cast<int>(std::ceil(mean)) + 2 * round, alone));
  return most / mean;
}

std::vector<int> lognormal(int rows, double mean, double sigma, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal(0.0, sigma);
  std::vector<double> weights;
  for (int i = 0; i < rows; ++i) weights.push_back(std::exp(normal(engine)));
  const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
  std::vector<int> tiles;
  for (const double w : weights) tiles.push_back(static_cast<int>(w / sum * mean * rows));
  return tiles;
}

}  // namespace

TEST_CASE("every KV tile of a ragged batch is attended once, and no cluster has much more work", "[kernels][loans]") {
  double worst = 0;
  for (unsigned seed = 0; seed < 200; ++seed)
    for (const double sigma : {0.5, 1.0}) worst = std::max(worst, check_loans(lognormal(32, 128, sigma, seed), 8));
  CHECK(worst <= 1.11);
  for (unsigned seed = 0; seed < 100; ++seed)
    for (const int rows : {1, 2, 3, 7, 33, 132, max_loan_rows})
      for (const int round : {8, 16, 24})
        for (const double mean : {0.5, 3.0, 40.0, 1000.0}) check_loans(lognormal(rows, mean, 1.5, seed), round);
}

TEST_CASE("rows of equal lengths lend nothing", "[kernels][loans]") {
  for (const int tiles : {0, 1, 16, 128, 130, 4096}) {
    const Loans loans = loans_of(std::vector<int>(32, tiles), 8);
    CHECK(loans.share == work_of_tiles(tiles));
    for (const RowLoans& row : loans.rows) CHECK((row.lent == 0 && row.room == 0));
  }
}

TEST_CASE("one long row among short ones lends most of its tiles", "[kernels][loans]") {
  std::vector<int> tiles(32, 2);
  tiles[5] = 1024;
  const Loans loans = loans_of(tiles, 8);
  CHECK(loans.rows[5].lent >= 928);
  check_loans(tiles, 8);
  CHECK(loans.rows[0].partial_for(loans.rows[5]) == 0);
}
