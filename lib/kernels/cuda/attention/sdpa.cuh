#pragma once
// A job of attention by matrix products: what attention/sdpa.cu cuts a branch's work into, and the two kernels beside
// its products (attention/sdpa_kernels.cu).

#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu {

// Where column j of K and V comes from.
enum class Source {
  in_place,  // the memory rows of the plane from its first one (ring: from slot_begin)
  chosen,    // packed: token j % l' of chosen block j / l'
  span,      // packed: the window of the tile's rows, from its first token on
  whole      // packed: token j of the sequence
};

struct Dense {
  AttendArgs a;
  Source source;
  bool masked;    // sel: all tokens, of which the chosen ones count
  bool per_list;  // each (row, group) its own K/V
  std::int64_t columns, weight_ld;
  void *k, *v;                      // of the first matrix: packed, or in place
  std::int64_t k_stride, v_stride;  // between matrices, elements
  float* scores;                    // [row][head]: base + row * score_row + head * score_ld
  std::int64_t score_row, score_ld;
  void* weights;  // [row or list of the job][h][weight_ld], storage type
  // The job: lists (row * groups + g) first .. first + count of the tile, or its rows of (sequence, g).
  std::int64_t first, count;
  int sequence, g;
};

/// Packs the job's K and V into `matrices` of them.
void gather(const Dense& p, std::int64_t matrices, Stream* stream);

/// The job's scores to weights relative to their maximum, and what is left of their sums.
void weigh(Branch branch, const Dense& p, Stream* stream);

/// The job's compressed scores from memory rows to the columns rank finds them in (score_column).
void spread_scores(const Dense& p, Stream* stream);

}  // namespace nsa::gpu
