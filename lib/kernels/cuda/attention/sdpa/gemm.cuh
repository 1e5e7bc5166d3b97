#pragma once
// A batch job of attention by matrix products: attention/sdpa/gemm.cu divides a branch into jobs,
// attention/sdpa/gemm_kernels.cu has the kernels beside the products.

#include "kernels/cuda/runtime/common.cuh"
#include "kernels/cuda/sizes/sdpa.hpp"

namespace nsa::gpu {

struct SdpaJob {
  AttendArgs a;
  Source source;
  bool masked;  // sel: all tokens, masked to those of selected blocks
  bool own_kv;  // a K/V matrix per (row, group); else per (sequence, group)
  std::int64_t columns, prob_ld;
  void *k, *v;                      // first matrix: packed, or in place
  std::int64_t k_stride, v_stride;  // between matrices, elements
  float* scores;                    // [row][head]: base + row * score_row + head * score_ld
  std::int64_t score_row, score_ld;
  void* prob;  // P: [work item of the job][h][prob_ld], storage type
  // Work items first .. first + count of the job: (row, group) of the tile, or rows of (sequence, g).
  std::int64_t first, count;
  int sequence, g;
};

/// Packs K and V of the job into `matrices` matrices.
void gather(const SdpaJob& p, std::int64_t matrices, Stream* stream);

/// Scores of the job to P relative to their maximum; stores (m, s), and the LSE buckets of cmp.
void softmax(Branch branch, const SdpaJob& p, Stream* stream);

/// Moves the compressed scores of the job from memory rows to the columns that rank reads (score_column).
void spread_scores(const SdpaJob& p, Stream* stream);

}  // namespace nsa::gpu
