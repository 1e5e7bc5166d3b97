#include "kernels/cuda/sizes/accepts.hpp"

#include "kernels/cuda/sizes/limits.hpp"
#include "kernels/cuda/sizes/sdpa.hpp"
#include "kernels/cuda/sizes/work.hpp"

namespace nsa::gpu {

bool decode_accepts(const LayerShape& s, const QueryTile& tile) {
  return tile.is_step() && static_cast<bool>(split_kv_instance(s));
}

bool fp8_step_accepts(const LayerShape& s) {
  const bool all = s.kv_precision == KvPrecision::fp8_e4m3 && s.cmp_precision == KvPrecision::fp8_e4m3,
             tuned = s.dtype == DType::bf16 && s.d_k == 128 && s.d_v == 128 &&
                     s.heads_per_group <= decode_heads(s.dtype) && s.rules.n_sel <= warp_top_n;
  // Scales are read four at a time: every KV tile begins at a multiple of four rows.
  return limits().capability >= 90 && all && tuned && scores_by_tile(s) && s.rules.l_sel % 4 == 0 &&
         s.phi == PhiKind::mean;
}

bool rows_accept(const LayerShape& s, const QueryTile&) {
  const bool sized = (s.d_k == 64 && s.d_v == 64) || ((s.d_k == 128 || s.d_k == 192) && s.d_v == 128);
  return sized && s.dtype != DType::f32;
}

// A CUDA build for other GPUs only has no such kernels. A build without CUDA plans for one that has them.
bool tiles_shape(const LayerShape& s) {
#ifdef NSA_NO_SM90A
  (void)s;
  return false;
#else
  const BlockRules& r = s.rules;
  const int ratio = r.l_sel / r.d;
  return limits().capability == 90 && s.dtype != DType::f32 && s.d_k % 16 == 0 && s.d_v % 16 == 0 && s.d_k <= 256 &&
         s.d_v <= 256 && dense_tile_tokens % ratio == 0 && (r.l - 1) / r.d <= prefill_max_halo &&
         s.lse.segment % 8 == 0 && r.n_sel <= prefill_max_blocks;
#endif
}

bool selected_tiles_shape(const LayerShape& s) {
  const BlockRules& r = s.rules;
  return tiles_shape(s) && (r.l_sel == selected_block_tokens || r.l_sel == 2 * selected_block_tokens) &&
         blocks_of(r) <= prefill_max_blocks;
}

bool gather_accepts(const LayerShape& s) {
  const int storage = static_cast<int>(size_of(s.dtype));
  return s.d_k * storage % 16 == 0 && s.d_v * storage % 16 == 0;
}

bool packed_accepts(const LayerShape& s, const QueryTile& tile) {
  QueryTile row = tile;
  row.tokens = 1;
  return tile.max_positions > 0 && gather_accepts(s) && decode_accepts(s, row);
}

}  // namespace nsa::gpu
