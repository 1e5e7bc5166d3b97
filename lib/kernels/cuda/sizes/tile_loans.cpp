#include "kernels/cuda/sizes/tile_loans.hpp"

#include <algorithm>
#include <functional>

namespace nsa::gpu {

LoanPlan plan_loans(std::span<const int> tiles, int round) {
  std::vector<LoanRow> rows;
  for (const int x : tiles) rows.push_back(loan_row(static_cast<int>(rows.size()), x, round));
  std::ranges::stable_sort(rows, std::greater{},
                           [&](const LoanRow& r) { return tiles[static_cast<std::size_t>(r.row)]; });
  const int count = static_cast<int>(rows.size());
  int sum = 0;
  for (const LoanRow& r : rows) sum += r.work;
  LoanPlan plan;
  for (int k = 0; k < loan_shares; ++k) {
    plan = {share_to_try((sum + count - 1) / count, rows[0].work, k), {}};
    if (deal_loans(rows.data(), count, plan.share, [&](Loan loan) { plan.loans.push_back(loan); })) break;
  }
  return plan;
}

double loan_imbalance(std::span<const int> tiles, int round) {
  std::vector<int> attended(tiles.begin(), tiles.end());
  for (const Loan& loan : plan_loans(tiles, round).loans) {
    attended[static_cast<std::size_t>(loan.borrower)] += loan.count * round;
    attended[static_cast<std::size_t>(loan.lender)] -= loan.count * round;
  }
  double sum = 0;
  for (const int x : attended) sum += x;
  return sum == 0 ? 1.0 : std::ranges::max(attended) * static_cast<double>(attended.size()) / sum;
}

}  // namespace nsa::gpu
