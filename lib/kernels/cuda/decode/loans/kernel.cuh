#pragma once
// Fused decode attention of a ragged batch in one launch without waves: the fused decode step (decode/fused/kernel.cuh)
// with a cluster a (row, group), all resident at the same time, in which the longer rows lend KV tiles of cmp to the
// clusters of the shorter ones (sizes/tile_loans.hpp). What follows cmp is the same work for every row.
//
// A cluster first attends what it borrows, piece by piece: it stores the (m, sum) and block sums of the tiles as their
// own cluster would, a partial a CTA, and counts the CTA's arrival at the lender. Then it attends its own tiles. A
// lender waits for the arrivals before it scores blocks, and adds the partials when it merges its own. Nobody waits
// before it has attended all that it borrows, so that the waiting has an end.
//
// Every CTA works the loans out by itself, from the positions. Scores, (m, sum) and block sums of a tile do not depend
// on who attends it, so the blocks are chosen by the same bits as on every other path.
//
// Bytes: those of the fused step, and a partial of heads * (Dv + 2) floats a piece and CTA through the L2. Bound: as
// the fused step of equal lengths, and the rounds that the loans leave (sizes/tile_loans.hpp).

#include "kernels/cuda/decode/fused/kernel.cuh"
#include "kernels/cuda/decode/loans/params.cuh"

namespace nsa::gpu {

/// What a cluster lends and borrows, in shared memory.
struct ClusterLoans {
  int lent, partials, first_partial;  // tiles of its own row, and the pieces in which others attend them
  int lender, lenders_end;            // of the next piece, by falling length; one past that of the last
  int step;                           // number of the step
};

struct LoanCoord : FusedCoord {
  const FusedLoanParams* p;
  ClusterLoans* loans;
  // In the place of the terms of block selection, which are not used with block sums.
  int *tiles, *lender_rows;  // [rows]: KV tiles; [lenders]: by falling length
  RowLoans* rows;            // [rows]
  static constexpr int bytes = max_loan_rows * (2 * sizeof(int) + sizeof(RowLoans));

  /// The loans of all rows, and of this cluster. All threads, after the predecessor, which may move the positions on.
  /// A barrier follows before the loans are read.
  template <class WarpTile, int W>
  __device__ __forceinline__ void plan(const FusedLoanParams& params, char* shared) {
    using SharedLayout = FusedSharedLayout<WarpTile, W>;
    static_assert(bytes <= W * (max_halo_tokens + round_tokens) * 4);
    p = &params;
    loans = reinterpret_cast<ClusterLoans*>(shared + params.loans_at);
    tiles = reinterpret_cast<int*>(shared + SharedLayout::terms_at(params.shape));
    lender_rows = tiles + max_loan_rows;
    rows = reinterpret_cast<RowLoans*>(lender_rows + max_loan_rows);
    const LoanRules rules{static_cast<int>(params.tile.rows()), W * params.cluster};
#pragma unroll 1
    for (int i = threadIdx.x; i < rules.rows; i += 32 * W) tiles[i] = tiles_at(first_position(params.tile, i));
    __syncthreads();
    const int share = loan_share(rules, [&](auto f) { return sum_over_rows([&](int i) { return f(tiles[i]); }); });
#pragma unroll 1
    for (int i = threadIdx.x; i < rules.rows; i += 32 * W) rows[i] = loans_of_row(rules, share, tiles[i]);
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < rules.rows; i += 32 * W) {
      add_longer_rows(rules.rows, tiles, rows, i);
      if (rows[i].lent > 0) lender_rows[rows[i].lenders_before] = i;
    }
    __syncthreads();
    if (threadIdx.x < 32) plan_cluster();
  }
  __device__ __forceinline__ bool borrows() const { return loans->lender < loans->lenders_end; }
  /// While it borrows: the row that the next tiles are of, and these tiles.
  __device__ __forceinline__ int lender_row() const { return lender_rows[loans->lender]; }
  __device__ __forceinline__ RowLoans::Piece piece() const { return rows[own_row()].from(rows[lender_row()]); }
  /// Where the partial of this CTA for that piece lies.
  __device__ __forceinline__ float* partial_of_piece() const {
    return partial(rows[own_row()].partial_for(rows[lender_row()])) + cta * partial_floats();
  }
  /// The partial of this CTA, and what it has stored of the tiles, is there. All threads.
  __device__ __forceinline__ void end_piece() const {
    __threadfence();
    __syncthreads();
    if (threadIdx.x != 0) return;
    atomicAdd(p->arrivals + work_item, 1u);
    ++loans->lender;
  }
  /// A warp: until all tiles that this row has lent are attended.
  __device__ __forceinline__ void wait_for_lent() const {
    const unsigned ctas = loans->partials * p->cluster;
    if (ctas > 0 && threadIdx.x % 32 == 0) {
      unsigned arrived;
      do asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(arrived) : "l"(p->arrivals + work_item) : "memory");
      while (arrived < ctas);
    }
    __syncwarp();
  }
  /// Once every CTA of the cluster has waited.
  __device__ __forceinline__ void clear_arrivals() const {
    if (threadIdx.x == 0 && cta == 0 && loans->partials > 0) p->arrivals[work_item] = 0;
  }
  /// The partials of those who attended what this row has lent.
  __device__ __forceinline__ int lent_partials() const { return loans->partials * p->cluster; }
  __device__ __forceinline__ const float* first_lent_partial() const { return partial(loans->first_partial); }
  __device__ __forceinline__ int partial_floats() const {
    return static_cast<int>(decode_partial_floats(decode_heads(p->shape.dtype), p->shape.d_v));
  }

 private:
  __device__ __forceinline__ int own_row() const { return p->groups(p->by_cluster(static_cast<int>(blockIdx.x))); }
  __device__ __forceinline__ float* partial(int number) const {
    return p->partials +
           std::int64_t{(group * static_cast<int>(p->tile.rows()) + number) * p->cluster} * partial_floats();
  }
  __device__ __forceinline__ int tiles_at(std::int64_t t) const {
    const LayerShape& s = p->shape;
    const int end = static_cast<int>(t) + 1, tokens = end < s.rules.l ? 0 : p->stride(end - s.rules.l) + 1;
    return p->segment(tokens + static_cast<int>(s.lse.segment) - 1) * tiles_per_span(cmp, s);
  }
  // Sum of f(i) over the rows. All lanes.
  template <class F>
  __device__ __forceinline__ int sum_over_rows(F f) const {
    int sum = 0;
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < static_cast<int>(p->tile.rows()); i += 32) sum += f(i);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    return sum;
  }
  __device__ __forceinline__ void plan_cluster() const {
    const RowLoans own = rows[own_row()];
    const int partials = sum_over_rows([&](int i) { return rows[i].from(own).count > 0; }),
              borrowers_before = sum_over_rows(
                  [&](int i) { return rows[i].room > 0 && rows[i].room_before + rows[i].room <= own.lent_before; }),
              lenders = sum_over_rows([&](int i) { return own.from(rows[i]).count > 0; }),
              lenders_before = sum_over_rows(
                  [&](int i) { return rows[i].lent > 0 && rows[i].lent_before + rows[i].lent <= own.room_before; });
    if (threadIdx.x > 0) return;
    const int step = p->log.number ? static_cast<int>(*p->log.number) : 0;
    *loans = {own.lent, partials, own.lenders_before + borrowers_before, lenders_before, lenders_before + lenders,
              step};
  }
};

}  // namespace nsa::gpu
