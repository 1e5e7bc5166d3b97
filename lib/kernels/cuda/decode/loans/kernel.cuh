#pragma once
// Fused decode attention of a ragged batch in one launch without waves: the fused decode step (decode/fused/kernel.cuh)
// with a cluster a (row, group), all resident at the same time, in which the longer rows lend KV tiles of cmp to the
// clusters of the shorter ones (sizes/tile_loans.hpp). What follows cmp is the same work for every row.
//
// A cluster first attends what it borrows, loan by loan: it stores the (m, sum) and block sums of the tiles as their
// own cluster would, a partial a CTA, and counts the CTA's arrival at the lender. Then it attends its own tiles. A
// lender waits for the arrivals before it scores blocks, and adds the partials when it merges its own. Nobody waits
// before it has attended all that it borrows, so that the waiting has an end.
//
// Every CTA works the loans out by itself, from the tiles of each row; where these are as in a step before, it reads
// the loans of then, which the last CTA of a layer's launch that had to work them out has stored. Scores, (m, sum) and
// block sums of a tile do not depend on who attends it, so the blocks are chosen by the same bits as on every other
// path.
//
// Bytes: those of the fused step, and a partial of heads * (Dv + 2) floats a loan and CTA through the L2. Bound: as
// the fused step of equal lengths, and the rounds that the loans leave (sizes/tile_loans.hpp).

#include "kernels/cuda/decode/fused/kernel.cuh"
#include "kernels/cuda/decode/loans/params.cuh"

namespace nsa::gpu {

/// What a cluster lends and borrows, in shared memory.
struct ClusterLoans {
  int lent, partials, first_partial;  // tiles of its own row, and the loans in which others attend them
  int loan, loans_end;                // the next one that it attends, and one past the last
  int step;                           // number of the step
};

/// The loans of rows of so many tiles, attended in such rounds; they depend on nothing else.
struct StoredLoans {
  int rows, round, count;
  int tiles[max_loan_rows];
  alignas(8) Loan loans[max_loan_rows];
};
static __device__ StoredLoans stored_loans;

/// Sum of f(i) over [0, count). All lanes.
template <class F>
__device__ __forceinline__ int sum_over(int count, F f) {
  int sum = 0;
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < count; i += 32) sum += f(i);
  return __reduce_add_sync(0xffffffffu, sum);
}

/// Deals the loans of every share, one a thread, and keeps those of the least one that suffices. *chosen is
/// loan_shares before and the number of loans after. All threads; barriers before and after. sorted, tiles: [rows].
static __device__ __noinline__ void deal_in_cta(LoanRow* sorted, Loan* all, const int* tiles, int* chosen, int rows,
                                                int round) {
  const int i = threadIdx.x;
  if (i < rows) {
    int longer = 0;
    for (int other = 0; other < rows; ++other)
      longer += tiles[other] > tiles[i] || (tiles[other] == tiles[i] && other < i);
    sorted[longer] = loan_row(i, tiles[i], round);
  }
  __syncthreads();
  const int most = sorted[0].work, mean = (sum_over(rows, [&](int k) { return sorted[k].work; }) + rows - 1) / rows,
            share = share_to_try(mean, most, i);
  if (deal_loans(sorted, rows, share, [](Loan) {})) atomicMin(chosen, i);
  __syncthreads();
  const bool is_chosen = i == *chosen;
  __syncthreads();
  if (!is_chosen) return;
  int count = 0;
  deal_loans(sorted, rows, share, [&](Loan loan) { all[count++] = loan; });
  *chosen = count;
}

struct LoanCoord : FusedCoord {
  const FusedLoanParams* p;
  ClusterLoans* loans;
  // In the place of the terms of block selection, which are not used with block sums.
  LoanRow* sorted;      // [rows], by falling length
  Loan* all;            // [rows]: a loan's number is that of its partial
  int *tiles, *chosen;  // [rows]: KV tiles; the number of the share, then that of the loans
  bool is_new;          // these loans are not stored
  static constexpr int bytes = max_loan_rows * (sizeof(LoanRow) + sizeof(Loan) + sizeof(int)) + sizeof(int);

  /// The loans of all rows, and of this cluster. All threads, after the predecessor, which may move the positions on.
  /// A barrier follows before the loans are read.
  template <class WarpTile, int W>
  __device__ __forceinline__ void plan(const FusedLoanParams& params, char* shared) {
    using SharedLayout = FusedSharedLayout<WarpTile, W>;
    static_assert(bytes <= W * (max_halo_tokens + round_tokens) * 4 && loan_shares == 32 * W);
    p = &params;
    loans = reinterpret_cast<ClusterLoans*>(shared + params.loans_at);
    sorted = reinterpret_cast<LoanRow*>(shared + SharedLayout::terms_at(params.shape));
    all = reinterpret_cast<Loan*>(sorted + max_loan_rows);
    tiles = reinterpret_cast<int*>(all + max_loan_rows), chosen = tiles + max_loan_rows;
    const int rows = static_cast<int>(params.tile.rows()), i = threadIdx.x;
    bool is_stored = __ldcg(&stored_loans.rows) == rows && __ldcg(&stored_loans.round) == round();
    if (i < rows) {
      tiles[i] = tiles_at(first_position(params.tile, i));
      is_stored &= __ldcg(&stored_loans.tiles[i]) == tiles[i];
      reinterpret_cast<int2*>(all)[i] = __ldcg(reinterpret_cast<const int2*>(stored_loans.loans) + i);
    }
    if (i == 0) *chosen = loan_shares;
    is_new = !__syncthreads_and(is_stored);
    if (is_new)
      deal_in_cta(sorted, all, tiles, chosen, rows, round());
    else if (i == 0)
      *chosen = __ldcg(&stored_loans.count);
    __syncthreads();
    if (i < 32) plan_cluster();
  }
  /// A thread of the last CTA that has read the stored loans.
  __device__ __forceinline__ void store_loans() const {
    if (!is_new) return;
    const int rows = static_cast<int>(p->tile.rows());
    stored_loans.rows = rows, stored_loans.round = round(), stored_loans.count = *chosen;
    for (int i = 0; i < rows; ++i) stored_loans.tiles[i] = tiles[i], stored_loans.loans[i] = all[i];
  }
  __device__ __forceinline__ bool borrows() const { return loans->loan < loans->loans_end; }
  /// While it borrows: the row that the next tiles are of.
  __device__ __forceinline__ int lender_row() const { return all[loans->loan].lender; }
  /// These tiles: [first, end) of that row.
  __device__ __forceinline__ int first_lent_tile() const { return all[loans->loan].first * round(); }
  __device__ __forceinline__ int lent_tiles_end() const { return first_lent_tile() + all[loans->loan].count * round(); }
  /// Where the partial of this CTA for them lies.
  __device__ __forceinline__ float* partial_of_loan() const { return partial(loans->loan) + cta * partial_floats(); }
  /// The partial of this CTA, and what it has stored of the tiles, is there. All threads.
  __device__ __forceinline__ void end_loan() const {
    __threadfence();
    __syncthreads();
    if (threadIdx.x != 0) return;
    atomicAdd(p->arrivals + work_item, 1u);
    ++loans->loan;
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
  __device__ __forceinline__ int round() const { return fused_warps * p->cluster; }
  __device__ __forceinline__ float* partial(int number) const {
    return p->partials +
           std::int64_t{(group * static_cast<int>(p->tile.rows()) + number) * p->cluster} * partial_floats();
  }
  __device__ __forceinline__ int tiles_at(std::int64_t t) const {
    const LayerShape& s = p->shape;
    const int end = static_cast<int>(t) + 1, tokens = end < s.rules.l ? 0 : p->stride(end - s.rules.l) + 1;
    return p->segment(tokens + static_cast<int>(s.lse.segment) - 1) * tiles_per_span(cmp, s);
  }
  // The loans in which f is the own row: the first and one past the last, which follow one another.
  template <class F>
  __device__ __forceinline__ int2 loans_where(int count, F f) const {
    int first = count, found = 0;
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < count; i += 32)
      if (f(all[i]) == own_row()) first = min(first, i), ++found;
    first = __reduce_min_sync(0xffffffffu, first);
    return make_int2(first, first + __reduce_add_sync(0xffffffffu, found));
  }
  __device__ __forceinline__ void plan_cluster() const {
    const int count = *chosen, own = own_row(),
              lent = sum_over(count, [&](int i) { return all[i].lender == own ? all[i].count : 0; });
    const int2 as_lender = loans_where(count, [](Loan loan) { return loan.lender; }),
               as_borrower = loans_where(count, [](Loan loan) { return loan.borrower; });
    if (threadIdx.x > 0) return;
    const int step = p->log.number ? static_cast<int>(*p->log.number) : 0;
    *loans = {lent * round(), as_lender.y - as_lender.x, as_lender.x, as_borrower.x, as_borrower.y, step};
  }
};

}  // namespace nsa::gpu
