#pragma once
// Which shapes the CUDA kernels accept. Whether a kernel reads the layout of a cache is asked where it is launched.

#include "kernels/interface/layer_shape.hpp"

namespace nsa::gpu {

/// One query row a sequence; tensor cores, fp32 scalar. decode/split_kv/branch.cu
bool decode_accepts(const LayerShape&, const QueryTile&);

/// Shapes with FP8 caches that a fused decode step reads. decode/fp8/kernel.cu
bool fp8_step_accepts(const LayerShape&);

/// Query rows one by one, 16-bit storage, tensor cores. attention/rows/kernel.cu
bool rows_accept(const LayerShape&, const QueryTile&);

/// Tiled prefill: dense tiles for cmp and win, shared blocks for sel, block scores. 16-bit storage, capability 9.0.
bool tiles_shape(const LayerShape&);
/// tiles_shape, and selection blocks of one or two KV slots. prefill/selected/kernel.cu
bool selected_tiles_shape(const LayerShape&);

/// Matrix products under a mask: where the scores of one row over all tokens fit the budget. attention/sdpa/gemm.cu
bool masked_accepts(const LayerShape&, const QueryTile&);

/// Rows that are whole 16-byte vectors. attention/sdpa/gather.cu
bool gather_accepts(const LayerShape&);
/// Packed SDPA of sel. attention/sdpa/packed.cu
bool packed_accepts(const LayerShape&, const QueryTile&);

constexpr int dense_tile_tokens = 128;  ///< of a K or V tile of prefill/dense
/// Blocks that a query selects: of l' tokens for prefill/rank, of 64 for prefill/selected.
constexpr int prefill_max_blocks = 64;
constexpr int prefill_max_halo = 64;       ///< compressed tokens of the previous block that overlap a block
constexpr int selected_block_tokens = 64;  ///< of a KV slot of prefill/selected
constexpr int blocks_of(const BlockRules& r) { return r.n_sel * (r.l_sel / selected_block_tokens); }

/// Floats between the block scores of two rows that prefill's rank stage forms.
constexpr std::int64_t block_score_pitch(const BlockRules& r, std::int64_t positions) {
  return ((positions - 1) / r.l_sel + 1 + 31) / 32 * 32;
}

}  // namespace nsa::gpu
