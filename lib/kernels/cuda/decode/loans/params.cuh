#pragma once
// Arguments of a fused decode step of a ragged batch whose longer rows lend KV tiles of cmp to the clusters of shorter
// ones (decode/loans/kernel.cuh).

#include "kernels/cuda/decode/fused/params.cuh"
#include "kernels/cuda/sizes/tile_loans.hpp"

namespace nsa::gpu {

struct LoanCoord;

/// One kernel for a step and for a layer, as that of FP8 rows: without rows in `appended` nothing is appended.
struct FusedLoanParams : FusedAppendParams {
  using Coord = LoanCoord;
  static constexpr bool lends = true;
  float* partials = nullptr;     ///< [group][number of the partial][CTA of the cluster][heads * (Dv + 2)]
  unsigned* arrivals = nullptr;  ///< [work item]: CTAs that have attended tiles of it. Zero between launches
  int loans_at = 0;              ///< where ClusterLoans lie in shared memory
};

/// Whether rows lend tiles in a step of these arguments, and its CTAs a work item; 0: they do not.
int loan_cluster(const LayerShape& s, const QueryTile& tile);

/// The step of `of`, whose work is not yet divided, if rows lend tiles in it; else its `cluster` is 0.
FusedLoanParams loan_params(const FusedAppendParams& of, const AttentionArgs& a);
void launch_loans(const FusedLoanParams& p, Stream* stream);
/// Launches the step if rows lend tiles in it; else false, and nothing was launched. decode/loans/launch.cu
bool try_loan_decode(const AttentionArgs& a, Stream* stream);

// The kernels of one storage type (decode/loans/kernel.cu.in).
/// active_clusters() of decode/fused/params.cuh.
template <DType Storage>
int active_loan_clusters(const LayerShape& s, int cluster);
template <DType Storage>
void launch_loan_decode(const FusedLoanParams& p, Stream* stream);

}  // namespace nsa::gpu
