#pragma once
// Checks a result while it is made: sampled rows of the last layer, recomputed in float64 from the stored q, K
// and V by plain loops. Finds wrong kernels, wrong selection and wrong exchanges; the tests' oracle, which
// starts from x, is another one.

#include <string>

#include "nsa/forward/stages.hpp"

namespace nsa {

struct CheckResult {
  double max_abs_err = 0;  ///< of o_cmp, o_sel, o_win against float64
  std::string problem;     ///< empty: the rows are right
  void merge(const CheckResult& other);
};

/// Largest error that rounding explains: fp32 accumulation, and for 16-bit storage the rounding of the softmax
/// weights that tensor-core kernels feed to the second product (2^-9 relative), for |v| of order one.
double error_bound(DType type);

/// Checks local plane `plane` at position t, whose row within the work's tile is `row`. Collective over the kv
/// ranks when the work exchanges: rows they hold are summed on kv rank 0, which does the check.
CheckResult check_row(const StepContext& ctx, std::int64_t plane, std::int64_t row, std::int64_t t);

}  // namespace nsa
