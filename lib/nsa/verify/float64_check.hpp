#pragma once
// Checks a result during the run: recomputes sampled rows of the last layer in float64 from the stored q, K and V with
// plain loops. Finds wrong kernels, selections and exchanges. The oracle of the tests is separate code that starts from
// x.

#include <string>

#include "nsa/forward/stages.hpp"

namespace nsa {

struct CheckResult {
  double max_abs_err = 0;  ///< of o_cmp, o_sel, o_win against float64
  double scale = 0;        ///< largest |v| of the attended tokens
  std::string problem;     ///< empty: the rows are right
  void merge(const CheckResult& other);
};

/// Checks local plane `plane` at position t, which is row `row` of the context's tile. With exchanges it is collective
/// over the kv ranks: the rows that they hold are summed on kv rank 0, which does the check.
CheckResult check_row(const StepContext& ctx, std::int64_t plane, std::int64_t row, std::int64_t t);

}  // namespace nsa
