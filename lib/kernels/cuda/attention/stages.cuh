#pragma once
// Attention of one branch for every shape: scalar kernel, matrix products, row-wise tensor-core kernel.

#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu {

/// Any shape and type: scalar arithmetic, one CTA a (row, group, split). attention/scalar.cu
void attend_general(Branch branch, const AttendArgs&, Stream*);

/// By matrix products (attention/sdpa/gemm.cu): any shape; masked where the scores of one row over all tokens fit the
/// scratch.
void attend_gemm(Branch branch, const AttendArgs&, Stream*);
void attend_masked(Branch branch, const AttendArgs&, Stream*);
bool masked_accepts(const LayerShape&, const QueryTile&);

/// Packed SDPA of sel (attention/sdpa/packed.cu): a gather, then attention over the packed rows. `packed_fits`: the
/// scratch holds at least one row, and the cache is one that the gather reads.
void attend_packed(const AttendArgs&, Stream*);
bool packed_accepts(const LayerShape&, const QueryTile&);
bool packed_fits(const AttendArgs&);

/// One CTA a query row and split, 16-bit storage, tensor cores. attention/rows/kernel.cu
void attend_rows(Branch branch, const AttendArgs&, Stream*);
bool rows_accept(const LayerShape&, const QueryTile&);

/// Bytes of scratch a stage needs.
std::size_t attend_scratch(const LayerShape&, const QueryTile&);                        ///< of one branch
std::size_t gemm_scratch(const LayerShape&, const QueryTile&, const AttentionPolicy&);  ///< of one branch
std::size_t masked_scratch(const LayerShape&, const QueryTile&);                        ///< of one branch
std::size_t packed_scratch(const LayerShape&, const QueryTile&);                        ///< beside the others
std::size_t rows_scratch(const LayerShape&, const QueryTile&);

}  // namespace nsa::gpu
