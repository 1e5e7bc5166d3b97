#pragma once
// Which KV tiles of cmp the longer rows of a ragged batch lend to the clusters of the shorter ones, in a fused step
// whose rows all have a cluster each (decode/loans/kernel.cuh). The same arithmetic on the host and in every CTA; all
// groups of a row have the same loans.
//
// Work is counted in tiles. A cluster ends with what follows cmp, which is the same work for every row but for the
// scores of its blocks. With a share `S` of work for each cluster, a row of more work lends its first tiles, one of
// less work has room for loans. The rows that lend, longest first, make one sequence of lent tiles; the rows that have
// room, longest first, take it piece by piece. So those who borrow from the longest row have most tiles of their own
// to attend afterwards, and the longest row, which scores longest, waits least.

#include "kernels/interface/layer_shape.hpp"

namespace nsa::gpu {

constexpr int max_loan_rows = 160;       ///< of a batch whose rows lend tiles
constexpr int tiles_scored_in_one = 12;  ///< tiles whose blocks are scored in the time in which one is attended

/// Loans consist of whole rounds: one tile for every warp of a cluster. A borrower spends the time of a round more on
/// queries and partials.
struct LoanRules {
  int rows = 0, round = 8;
};

/// Work of a row of so many tiles.
NSA_HD int work_of_tiles(int tiles) { return tiles + tiles / tiles_scored_in_one; }
/// Tiles that a row lends. It keeps its last tile.
NSA_HD int lent_tiles(const LoanRules& rules, int share, int tiles) {
  const int excess = work_of_tiles(tiles) - share;
  if (excess <= 0) return 0;
  const int wanted = (excess + rules.round - 1) / rules.round, most = (tiles - 1) / rules.round;
  return (wanted < most ? wanted : most) * rules.round;
}
/// Tiles that the cluster of a row can attend for others.
NSA_HD int loan_room(const LoanRules& rules, int share, int tiles) {
  const int left = share - work_of_tiles(tiles) - rules.round;
  return left <= 0 ? 0 : left / rules.round * rules.round;
}

/// The least share at which there is room for what is lent; that of equal rows is their own work. `sum(f)`: the sum of
/// f(tiles) over all rows.
template <class Sum>
NSA_HD int loan_share(const LoanRules& rules, Sum sum) {
  const auto work = [](int tiles) { return work_of_tiles(tiles); };
  int low = (sum(work) + rules.rows - 1) / rules.rows;
  // There every borrower has lost at most two rounds of room, and every lender gained less than one.
  int high = low + 2 * rules.round;
  while (low < high) {
    const int share = low + (high - low) / 2;
    const auto spare = [&](int tiles) { return loan_room(rules, share, tiles) - lent_tiles(rules, share, tiles); };
    if (sum(spare) >= 0)
      high = share;
    else
      low = share + 1;
  }
  return low;
}

/// What a row lends and has room for; the same and the rows that do, of all longer rows.
struct RowLoans {
  int lent = 0, room = 0, lent_before = 0, room_before = 0, lenders_before = 0, borrowers_before = 0;
  /// Tiles that the row `lender` lends to this one: [first, first + count) of that row.
  struct Piece {
    int first, count;
  };
  NSA_HD Piece from(const RowLoans& lender) const {
    const int begin = room_before > lender.lent_before ? room_before : lender.lent_before,
              end = room_before + room < lender.lent_before + lender.lent ? room_before + room
                                                                          : lender.lent_before + lender.lent;
    return {begin - lender.lent_before, end > begin ? end - begin : 0};
  }
  /// Number of the partial that this row forms for the row `lender`: no other pair of rows has it, those of a lender
  /// follow one another, and all are below the number of rows.
  NSA_HD int partial_for(const RowLoans& lender) const { return borrowers_before + lender.lenders_before; }
};
NSA_HD RowLoans loans_of_row(const LoanRules& rules, int share, int tiles) {
  RowLoans own;
  own.lent = lent_tiles(rules, share, tiles), own.room = loan_room(rules, share, tiles);
  return own;
}
/// Adds what the longer rows lend and have room for. tiles, all: [rows].
NSA_HD void add_longer_rows(int rows, const int* tiles, RowLoans* all, int row) {
  RowLoans own = all[row];
  const int own_tiles = tiles[row];
  for (int other = 0; other < rows; ++other) {
    const bool longer = tiles[other] > own_tiles || (tiles[other] == own_tiles && other < row);
    const int lent = longer ? all[other].lent : 0, room = longer ? all[other].room : 0;
    own.lent_before += lent, own.room_before += room;
    own.lenders_before += lent > 0, own.borrowers_before += room > 0;
  }
  all[row] = own;
}

}  // namespace nsa::gpu
