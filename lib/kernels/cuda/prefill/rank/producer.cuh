#pragma once
// Prefill's block scores (prefill/rank/block_scores.cuh): parameters, and the warp that loads queries and K_cmp.

#include "kernels/cuda/prefill/prefill.cuh"

namespace nsa::gpu::block_scoring {

template <int DK>
constexpr int slots = DK > 192   ? 1
                      : DK > 128 ? 2
                                 : 4;
constexpr int consumer_warpgroups = 4;  // the products of one overlap with the exponentials of the others
constexpr int item_rows = consumer_warpgroups * warpgroup_rows, threads = 128 * (consumer_warpgroups + 1);
constexpr int quad_tokens = 4;  // of a block, where l' = 4 d

template <int DK>
using Shared = DenseShared<DK, DK, slots<DK>, consumer_warpgroups>;

struct BlockScoreParams {
  DenseWork work;
  KvTensorMaps kv;  // K_cmp
  const float* ms;  // [rows][H][2], from the part's first head on
  float* scores;    // [rows][G][pitch]
  std::int64_t pitch;
  PrefillPart part;  // the last member: prefill/dense/producer.cuh
};

__device__ __forceinline__ int kv_tile_count(const BlockRules& r, const DenseWorkItem& item) {
  return (visible_compressed_tokens(r, item.last_t) + dense_tile_tokens - 1) / dense_tile_tokens;
}

// The producer thread: a tile of K_cmp whose rows are permuted to the first tokens of its 32 quadruples, then the
// second tokens, and so on.
template <int DK>
__device__ __forceinline__ void load_quads(const BlockScoreParams& p, const Shared<DK>& shared,
                                           const PipelineState<slots<DK>>& state, int plane, int begin) {
  constexpr int box_bytes = Shared<DK>::Storage::tile_box;
  mbarrier_wait(shared.empty(state.slot), state.phase ^ 1);
  mbarrier_arrive_expect_tx(shared.full(state.slot), DK / box_columns * box_bytes);
  for (int at = 0; at < dense_tile_tokens; at += p.kv.box_rows) {
    const RowCoordinate from = row_coordinate(p.kv.map, begin + at);
    for (int i = 0; i < min(quad_tokens, p.kv.box_rows); ++i) {
      const int row = (at + i) % quad_tokens * (dense_tile_tokens / quad_tokens) + (at + i) / quad_tokens;
      for (int box = 0; box < DK / box_columns; ++box)
        tma_load(shared.slot(state.slot) + box * box_bytes + row * 128, &p.kv.k, shared.full(state.slot),
                 box * box_columns, from.row + i, plane, from.rank);
    }
  }
}

template <int DK, bool Tuned, bool Quads>
__device__ __forceinline__ void produce(const BlockScoreParams& p, const Shared<DK>& shared,
                                        std::int64_t first_position) {
  PipelineState<slots<DK>> state;
  int phase = 0;
  for (int index = blockIdx.x; index < p.work.items; index += gridDim.x, phase ^= 1) {
    const DenseWorkItem item(p.work, index, first_position);
    shared.load_queries(p.work, item, phase, Tuned ? warpgroup_queries : warpgroup_rows / p.part.query_rows);
    const int tiles = kv_tile_count(p.work.shape.rules, item);
    for (int tile = 0; tile < tiles; ++tile, state.advance())
      if constexpr (Quads)
        load_quads(p, shared, state, item.plane, tile * dense_tile_tokens);
      else
        shared.template load_tile<DK>(p.kv, p.kv.k, state, item.plane, tile * dense_tile_tokens);
  }
}

}  // namespace nsa::gpu::block_scoring
