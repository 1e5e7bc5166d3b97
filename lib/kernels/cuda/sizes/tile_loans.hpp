#pragma once
// Which KV tiles of cmp the longer rows of a ragged batch lend to the clusters of the shorter ones, in a fused step
// whose rows all have a cluster each (decode/loans/kernel.cuh). The same arithmetic on the host and in every CTA; all
// groups of a row have the same loans.
//
// Tiles are attended in rounds, one tile for every warp of a cluster, and loans consist of whole rounds. Work is
// counted in parts of a round. A cluster ends with what follows cmp, which is the same work for every row but for the
// scores of its blocks. With a share of work for each cluster, a row of more work lends its first rounds, and a row of
// less work can borrow. A loan costs its borrower a round more, for queries and partials.
//
// The loans of a share are dealt one by one: the longest lender borrows from the longest row that can, up to what that
// has left. A cluster attends what it borrows before its own tiles, in the order of its loans, and no loan ends later
// than its lender scores. So those who borrow from the longest row have most tiles of their own to attend afterwards,
// and the longest row, which scores longest, waits least.

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/interface/layer_shape.hpp"

namespace nsa::gpu {

constexpr int max_loan_rows = 64;        ///< of a batch whose rows lend tiles: loans are dealt one after the other
constexpr int tiles_scored_in_one = 12;  ///< tiles whose blocks are scored in the time in which one is attended
constexpr int round_parts = 16;          ///< parts of a round, the unit of work
constexpr int loan_shares = 256;         ///< that are tried

/// A row of so many tiles, of which a cluster attends `round` at a time.
struct LoanRow {
  std::int32_t row, rounds, scoring, work;  ///< its index; rounds of its tiles; work of its scores; all its work
};
NSA_HD LoanRow loan_row(int row, int tiles, int round) {
  const int rounds = (tiles + round - 1) / round, scoring = tiles * round_parts / (tiles_scored_in_one * round);
  return {row, rounds, scoring, rounds * round_parts + scoring};
}

/// Rounds [first, first + count) of the row `lender`, which the cluster of the row `borrower` attends.
struct Loan {
  std::int16_t borrower, lender, first, count;
};

/// The k-th share that is tried, of [0, loan_shares): from the mean work on; the last one is that of the longest row
/// or more, at which there are no loans.
NSA_HD int share_to_try(int mean_work, int most_work, int k) {
  return mean_work + k * ((most_work - mean_work + loan_shares - 2) / (loan_shares - 1));
}

/// Deals the loans of a share: calls emit(Loan) for each, in the order of lenders and of borrowers, at most one a row.
/// False: not all that exceeds the share found a borrower. rows: [count] by falling length.
template <class Emit>
NSA_HD bool deal_loans(const LoanRow* rows, int count, int share, Emit emit) {
  // Rounds that the row lends; it keeps its last one. Negative: it would have to lend that too.
  const auto lent = [&](const LoanRow& r) {
    const int excess = r.work - share, rounds = excess <= 0 ? 0 : (excess + round_parts - 1) / round_parts;
    return rounds < r.rounds || rounds == 0 ? rounds : -1;
  };
  int k = 0, left = lent(rows[0]), first = 0;
  for (int i = 0; i < count && left > 0; ++i) {
    int room = share - rows[i].work, begin = 0;
    while (left > 0) {
      const int until = share - rows[k].scoring - begin, most = (room < until ? room : until) / round_parts - 1;
      if (most <= 0) break;
      const int rounds = most < left ? most : left;
      emit(Loan{static_cast<std::int16_t>(rows[i].row), static_cast<std::int16_t>(rows[k].row),
                static_cast<std::int16_t>(first), static_cast<std::int16_t>(rounds)});
      room -= (rounds + 1) * round_parts, begin += (rounds + 1) * round_parts;
      left -= rounds, first += rounds;
      if (left > 0) break;  // the borrower has no more room, or none in time
      left = ++k < count ? lent(rows[k]) : 0, first = 0;
    }
  }
  return left == 0;
}

/// The loans of the least share that is tried; tiles: of each row.
struct LoanPlan {
  int share = 0;
  std::vector<Loan> loans;
};
LoanPlan plan_loans(std::span<const int> tiles, int round);
/// The most tiles that a cluster attends over the mean.
double loan_imbalance(std::span<const int> tiles, int round);

}  // namespace nsa::gpu
