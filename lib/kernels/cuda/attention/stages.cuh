#pragma once
// Attention of one branch for every shape: scalar kernel, matrix products, row-wise tensor-core kernel.

#include "kernels/cuda/runtime/common.cuh"
#include "kernels/cuda/sizes/accepts.hpp"

namespace nsa::gpu {

/// Any shape and type: scalar arithmetic, one CTA a (row, group, split). attention/scalar.cu
void attend_general(Branch branch, const AttendArgs&, Stream*);

/// By matrix products (attention/sdpa/gemm.cu): any shape; masked where the scores of one row over all tokens fit the
/// scratch.
void attend_gemm(Branch branch, const AttendArgs&, Stream*);
void attend_masked(Branch branch, const AttendArgs&, Stream*);

/// Packed SDPA of sel (attention/sdpa/packed.cu): a gather, then attention over the packed rows. `packed_fits`: the
/// scratch holds at least one row, and the cache is one that the gather reads.
void attend_packed(const AttendArgs&, Stream*);
bool packed_fits(const AttendArgs&);

/// One CTA a query row and split, 16-bit storage, tensor cores. attention/rows/kernel.cu
void attend_rows(Branch branch, const AttendArgs&, Stream*);

}  // namespace nsa::gpu
