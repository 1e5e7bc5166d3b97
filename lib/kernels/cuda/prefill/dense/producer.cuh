#pragma once
// Prefill's compressed and window branches (prefill/dense/kernel.cu): which tiles an item has, and the side that
// streams them.

#include "kernels/cuda/prefill/prefill.cuh"

namespace nsa::gpu::dense {

constexpr int slots = 6;
constexpr int groups = 2;  // warpgroups that multiply
constexpr int queries = groups * group_queries, threads = 128 * (groups + 1);

template <int DK, int DV>
using Layout = DenseLayout<DK, DV, slots, groups>;
template <int DK, int DV>
using Shared = DenseShared<DK, DV, slots, groups>;

// What a kernel does: a branch to partials, cmp's (m, sum) alone, or win and then cmp of each item, normalised, weighed
// with the gates and added up.
enum class Job { cmp, win, cmp_ms, gated };

struct Params {
  DenseParams d;
  DenseSource source[branches];
  std::int64_t* reads[branches];
  Partials out;       // gated: `o` is the sum over both, `ms` cmp's
  const float* gate;  // gated
};

// Tokens [begin, end) that position t attends.
struct Span {
  std::int64_t begin, end;
};
template <Branch B>
__device__ __forceinline__ Span span_of(const BlockRules& r, std::int64_t t) {
  if constexpr (B == cmp) return {0, tokens_seen(r, t)};
  return {window_begin(r, t), t + 1};
}

// An item's tiles: `tiles` of 128 tokens from `begin`, then one of 16 where that will do (`narrow`).
struct Walk {
  std::int64_t begin;
  int tiles;
  bool narrow;
  __device__ __forceinline__ int count() const { return tiles + narrow; }
  __device__ __forceinline__ std::int64_t at(int tile) const { return begin + std::int64_t{tile} * dense_tokens; }
};
template <Branch B>
__device__ __forceinline__ Walk walk_of(const Params& p, const DenseItem& item) {
  const BlockRules& r = p.d.shape.rules;
  const std::int64_t first = span_of<B>(r, item.t).begin, end = span_of<B>(r, item.last).end;
  const bool anywhere = B == win && p.source[B].map.chunk == INT64_MAX;
  const std::int64_t begin = anywhere ? first : first / dense_tokens * dense_tokens;
  const int tokens = static_cast<int>(end - begin), rest = tokens % dense_tokens;
  const bool narrow = anywhere && tokens > dense_tokens && rest > 0 && rest <= narrow_tokens;
  return {begin, tokens / dense_tokens + (rest > 0 && !narrow), narrow};
}

template <int DK, int DV, Branch B, bool Weigh>
__device__ __forceinline__ void stream(const Params& p, const Shared<DK, DV>& shared, Turn<slots>& turn,
                                       const DenseItem& item) {
  const DenseSource& from = p.source[B];
  const Walk walk = walk_of<B>(p, item);
  const auto copy = [&]<int Width>(const CUtensorMap& map, const CUtensorMap& narrow, int tile) {
    if (tile < walk.tiles)
      shared.template stream_tile<Width>(from, map, turn, item.plane, walk.at(tile));
    else
      shared.template stream_narrow<Width>(narrow, turn, item.plane, walk.at(tile));
    turn.next();
  };
  for (int tile = 0; tile < walk.count(); ++tile) {
    copy.template operator()<DK>(from.k, from.narrow_k, tile);
    if (Weigh && tile > 0) copy.template operator()<DV>(from.v, from.narrow_v, tile - 1);
  }
  if (Weigh && walk.count() > 0) copy.template operator()<DV>(from.v, from.narrow_v, walk.count() - 1);
}

template <int DK, int DV, Job J>
__device__ __forceinline__ void stream(const Params& p, const Shared<DK, DV>& shared, std::int64_t first_position) {
  Turn<slots> turn;
  int phase = 0;
  for (int index = blockIdx.x; index < p.d.items; index += gridDim.x, phase ^= 1) {
    const DenseItem item(p.d, index, first_position);
    shared.stream_queries(p.d, item, phase);
    if constexpr (J == Job::win || J == Job::gated) stream<DK, DV, win, true>(p, shared, turn, item);
    if constexpr (J != Job::win) stream<DK, DV, cmp, J != Job::cmp_ms>(p, shared, turn, item);
  }
}

}  // namespace nsa::gpu::dense
