// In which decode steps of ragged batches rows lend KV tiles, and their arguments.

#include "kernels/cuda/attention/kv_tiles.cuh"
#include "kernels/cuda/decode/loans/params.cuh"

namespace nsa::gpu {

namespace {

int resident_clusters(const LayerShape& s, int cluster) {
  return s.dtype == DType::bf16 ? active_loan_clusters<DType::bf16>(s, cluster)
                                : active_loan_clusters<DType::f16>(s, cluster);
}

// Whether there is a kernel for the shape: a tuned one, which scores blocks by sums.
bool has_kernel(const LayerShape& s) {
  return limits().capability >= 90 && s.dtype != DType::f32 && s.kv_precision != KvPrecision::fp8_e4m3 &&
         fused_instance(s).tuned && scores_by_tile(s);
}

void divide_loans(FusedDecodeParams& p) {
  DivisionLimits within{resident_clusters, max_kv_tiles(cmp, p.shape, RowMap{}, p.tile.max_positions)};
  within.one_wave = within.lends = true;
  within.only_warps = fused_warps;
  divide_work(p, within);
}

// Whether the longest row alone would keep its cluster busy, after the others, for longer than loans take.
bool longest_delays(const LayerShape& s, const QueryTile& tile, int cluster) {
  constexpr double loans = 8e-6, bandwidth = 4.3e12;  // s, bytes/s of an H200
  const double tokens = static_cast<double>(compressed_tokens(s.rules, tile.max_positions - 1) -
                                            compressed_tokens(s.rules, tile.mean_positions - 1));
  return tokens * (s.d_k + s.d_v) * static_cast<double>(size_of(s.dtype)) * limits().sms / cluster / bandwidth > loans;
}

}  // namespace

int loan_cluster(const LayerShape& s, const QueryTile& tile) {
  if (!tile.ragged() || tile.tokens != 1 || tile.rows() == 0 || tile.rows() > max_loan_rows ||
      tile.rows() * s.groups > max_split_rows || !has_kernel(s))
    return 0;
  FusedDecodeParams p{};
  p.shape = s, p.tile = tile;
  divide_loans(p);
  // The last segment, and so the token that completes, stays with its row.
  const bool whole_segments = fused_warps * p.cluster % tiles_per_span(cmp, s) == 0;
  return p.cluster > 0 && whole_segments && longest_delays(s, tile, p.cluster) ? p.cluster : 0;
}

FusedLoanParams loan_params(const FusedAppendParams& of, const AttentionArgs& a) {
  FusedLoanParams p;
  static_cast<FusedAppendParams&>(p) = of;
  p.cluster = 0;
  if (!p.block_sums.memory || loan_cluster(p.shape, p.tile) == 0) return p;
  divide_loans(p);
  p.partials = static_cast<float*>(a.attend[cmp].scratch) + tile_lse_floats(p.shape, p.tile);
  p.arrivals = arrival_counters(win);
  return p;
}

bool try_loan_decode(const AttentionArgs& a, Stream* stream) {
  if (!a.combine.tile.ragged() || !fused_decode_accepts(a)) return false;
  FusedAppendParams step;
  static_cast<FusedDecodeParams&>(step) = fused_decode_params(a);
  const FusedLoanParams p = loan_params(step, a);
  if (p.cluster == 0) return false;
  launch_loans(p, stream);
  return true;
}

void launch_loans(const FusedLoanParams& p, Stream* stream) {
  p.shape.dtype == DType::bf16 ? launch_loan_decode<DType::bf16>(p, stream) : launch_loan_decode<DType::f16>(p, stream);
}

}  // namespace nsa::gpu
