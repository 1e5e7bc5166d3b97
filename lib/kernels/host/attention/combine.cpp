// o = sum over branches of gate x o_c, each normalised over the ranks' partials.
//
// Tiling: one (row, head) a loop iteration. Bytes: the partials of all ranks once; bound by them.

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/host/runtime/arena.hpp"
#include "kernels/host/runtime/stages.hpp"
#include "kernels/host/simd/loops.hpp"

namespace nsa::host {
namespace {

/// o_c of one row and head: the ranks' partials merged by rising rank, normalised.
void merge_rank_partials(const CombineArgs& args, Branch branch, std::int64_t row_head, float* o) {
  const LayerShape& s = args.shape;
  const std::int64_t size = partial_floats(s, args.tile.rows());
  float m = neg_inf, sum = 0.0f;
  std::fill_n(o, s.d_v, 0.0f);
  for (std::int32_t r = 0; r < args.ranks; ++r) {
    const float* base = args.partials + r * size;
    const Partials partial = partials_at(const_cast<float*>(base), s, args.tile.rows(), branch);
    const float m2 = partial.ms[row_head * 2], s2 = partial.ms[row_head * 2 + 1];
    if (m2 == neg_inf) continue;
    const float m_new = std::max(m, m2), scale_prev = exponential(m - m_new), scale_new = exponential(m2 - m_new);
    rescale_and_add(s.d_v, scale_prev, o, scale_new, partial.o + row_head * s.d_v);
    sum = sum * scale_prev + s2 * scale_new;
    m = m_new;
  }
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  for (std::int32_t e = 0; e < s.d_v; ++e) o[e] *= inverse;
}

}  // namespace

void combine(const CombineArgs& args, Stream*) {
  const LayerShape& s = args.shape;
#pragma omp parallel
  {
    std::vector<float> o(s.d_v), total(s.d_v);
#pragma omp for
    for (std::int64_t row_head = 0; row_head < args.tile.rows() * s.heads(); ++row_head) {
      const std::int64_t row_group = row_head / s.heads_per_group;
      std::fill(total.begin(), total.end(), 0.0f);
      for (std::int32_t c = 0; c < branches; ++c) {
        if (args.leave_out[c])
          std::fill(o.begin(), o.end(), 0.0f);
        else
          merge_rank_partials(args, static_cast<Branch>(c), row_head, o.data());
        const float gate = args.gate[row_group * 3 + c];
        for (std::int32_t e = 0; e < s.d_v; ++e) total[e] += gate * o[e];
        if (args.o_branch[c]) std::copy(o.begin(), o.end(), args.o_branch[c] + row_head * s.d_v);
      }
      store(s.dtype, s.d_v, total.data(), at(s.dtype, args.o, row_head * s.d_v));
    }
  }
}

}  // namespace nsa::host
