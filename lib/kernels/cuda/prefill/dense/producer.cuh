#pragma once
// Prefill's compressed and window branches (prefill/dense/kernel.cu): the KV tiles of a work item, and the producer.

#include "kernels/cuda/prefill/prefill.cuh"

namespace nsa::gpu::dense {

/// Of a KV tile. 64 where o has 256 columns: its registers leave room for 64 x 64 scores.
template <int DK>
constexpr int tile_tokens = DK > 192 ? 64 : dense_tile_tokens;
/// Of one K or V tile: as many as fit.
template <int DK>
constexpr int slots = DK > 192   ? 5
                      : DK > 128 ? 3
                                 : 6;
constexpr int consumer_warpgroups = 2;
constexpr int item_rows = consumer_warpgroups * warpgroup_rows, threads = 128 * (consumer_warpgroups + 1);

template <int DK, int DV>
using Shared = DenseShared<DK, DV, slots<DK>, consumer_warpgroups, tile_tokens<DK>>;

// What a kernel computes: a branch's partials, cmp's (m, sum) alone, or win and then cmp of each item, normalised,
// multiplied by the gates and added.
enum class Job { cmp, win, cmp_ms, gated };

struct DenseAttentionParams {
  DenseWork work;
  KvTensorMaps kv[branches];
  std::int64_t* reads[branches];  // null: counted by another part
  Partials out;                   // gated: `o` is the sum of both branches, `ms` is cmp's
  const float* gate;              // gated
  PrefillPart part;  // the last member, so that tuned instances, which do not read it, keep their machine code
};

// Tokens [begin, end) that position t attends.
struct TokenRange {
  std::int64_t begin, end;
};
template <Branch B>
__device__ __forceinline__ TokenRange visible_tokens(const BlockRules& r, std::int64_t t) {
  if constexpr (B == cmp) return {0, visible_compressed_tokens(r, t)};
  return {window_begin(r, t), t + 1};
}

// A work item's KV tiles: `tiles` whole ones from `begin`, then one of 16 tokens where that is enough (`narrow`).
template <int TileTokens>
struct KvTileRange {
  std::int64_t begin;
  int tiles;
  bool narrow;
  __device__ __forceinline__ int count() const { return tiles + narrow; }
  __device__ __forceinline__ std::int64_t tile_begin(int tile) const { return begin + std::int64_t{tile} * TileTokens; }
};
template <Branch B, int TileTokens>
__device__ __forceinline__ KvTileRange<TileTokens> kv_tiles(const DenseAttentionParams& p, const DenseWorkItem& item) {
  const BlockRules& r = p.work.shape.rules;
  const std::int64_t first = visible_tokens<B>(r, item.t).begin, end = visible_tokens<B>(r, item.last_t).end;
  const bool unaligned = B == win && p.kv[B].map.chunk == INT64_MAX;
  const std::int64_t begin = unaligned ? first : first / TileTokens * TileTokens;
  const int tokens = static_cast<int>(end - begin), rest = tokens % TileTokens;
  const bool narrow = unaligned && tokens > TileTokens && rest > 0 && rest <= narrow_tile_tokens;
  return {begin, tokens / TileTokens + (rest > 0 && !narrow), narrow};
}

// K of tile j + 1 comes before V of tile j. `WithValues`: V too.
template <int DK, int DV, Branch B, bool WithValues>
__device__ __forceinline__ void load_kv_tiles(const DenseAttentionParams& p, const Shared<DK, DV>& shared,
                                              PipelineState<slots<DK>>& state, const DenseWorkItem& item) {
  const KvTensorMaps& kv = p.kv[B];
  const auto range = kv_tiles<B, tile_tokens<DK>>(p, item);
  const auto load = [&]<int Width>(const CUtensorMap& map, const CUtensorMap& narrow, int tile) {
    if (tile < range.tiles)
      shared.template load_tile<Width>(kv, map, state, item.plane, range.tile_begin(tile));
    else
      shared.template load_narrow_tile<Width>(narrow, state, item.plane, range.tile_begin(tile));
    state.advance();
  };
  for (int tile = 0; tile < range.count(); ++tile) {
    load.template operator()<DK>(kv.k, kv.narrow_k, tile);
    if (WithValues && tile > 0) load.template operator()<DV>(kv.v, kv.narrow_v, tile - 1);
  }
  if (WithValues && range.count() > 0) load.template operator()<DV>(kv.v, kv.narrow_v, range.count() - 1);
}

// The producer thread: queries and KV tiles of all work items of the CTA.
template <int DK, int DV, bool Tuned, Job J>
__device__ __forceinline__ void produce(const DenseAttentionParams& p, const Shared<DK, DV>& shared,
                                        std::int64_t first_position) {
  PipelineState<slots<DK>> state;
  int phase = 0;
  for (int index = blockIdx.x; index < p.work.items; index += gridDim.x, phase ^= 1) {
    const DenseWorkItem item(p.work, index, first_position);
    shared.load_queries(p.work, item, phase, Tuned ? warpgroup_queries : warpgroup_rows / p.part.query_rows);
    if constexpr (J == Job::win || J == Job::gated) load_kv_tiles<DK, DV, win, true>(p, shared, state, item);
    if constexpr (J != Job::win) load_kv_tiles<DK, DV, cmp, J != Job::cmp_ms>(p, shared, state, item);
  }
}

}  // namespace nsa::gpu::dense
