#pragma once
// A row's K/V of one branch as units of rows that lie one after the other: cmp LSE leaves, sel chosen blocks, win runs
// of 64 positions (of a ring: of slots, in whatever order the positions lie).

#include "kernels/cuda/attention/split_kv.cuh"

namespace nsa::gpu {

/// Rows one after the other.
struct Unit {
  std::int64_t row = 0;  ///< of the first token
  int count = 0;
  int owner = 0;            ///< whose part of a gathered buffer
  std::int64_t column = 0;  ///< cmp: of the first token's raw score
};

/// Ranks that the chunks a buffer lacks are on, itself included: 1 where it has them all.
__device__ __forceinline__ int shards_of(const RowMap& map) { return map.rank == all_ranks ? 1 : map.kv; }

/// The leaf that is this rank's u-th.
__device__ __forceinline__ std::int64_t leaf_at(const RowMap& map, std::int64_t u) {
  return map.rank == all_ranks ? u : u * map.kv + map.rank;
}

__device__ __forceinline__ int at_most(std::int64_t left, std::int64_t most) {
  return static_cast<int>(left < 0 ? 0 : left < most ? left : most);
}

/// Rows [begin, end) of the window of position t: positions, or the slots of a ring that this rank reads.
struct WindowRows {
  std::int64_t begin, end;
};
__device__ __forceinline__ WindowRows window_rows(const BlockRules& r, const RowMap& map, std::int64_t t) {
  if (map.ring == 0) return {window_begin(r, t), t + 1};
  std::int64_t end = t + 1 < map.ring ? t + 1 : map.ring;
  return {map.slot_begin, end < map.slot_end ? end : map.slot_end};
}

/// Tokens [begin, end) of one chunk (of a ring: its slots).
__device__ __forceinline__ Unit rows_from(const RowMap& map, std::int64_t begin, std::int64_t end) {
  const int count = at_most(end - begin, INT32_MAX);
  if (map.ring > 0 || map.chunk == INT64_MAX) return {begin, count, 0, begin};
  const std::int64_t c = chunk_of(map, begin), row = row_in_chunk(map, c, begin);
  if (map.rank == all_ranks) return {row, count, owner_of_chunk(map, c), begin};
  return {row, has_chunk(map, c) ? count : 0, 0, score_column(map, c, begin)};
}

/// Units of the row at position t; n: its compressed tokens.
template <Branch B>
__device__ __forceinline__ int unit_count(const LayerShape& s, const RowMap& map, std::int64_t t, std::int64_t n) {
  if constexpr (B == cmp) {
    const int before = shards_of(map) > 1 ? map.halo : 0;
    return static_cast<int>(shards_of(map) > 1 ? owned_chunks(map, n + before, map.rank)
                                               : (n + s.lse.segment - 1) / s.lse.segment);
  } else if constexpr (B == sel) {
    return s.rules.n_sel;
  } else {
    const WindowRows rows = window_rows(s.rules, map, t);
    return rows.end > rows.begin ? static_cast<int>((rows.end - 1) / window_unit - rows.begin / window_unit + 1) : 0;
  }
}

/// The u-th of them. `selected`: sel alone.
template <Branch B>
__device__ __forceinline__ Unit unit_at(const LayerShape& s, const RowMap& map, std::int64_t t, std::int64_t n,
                                        const std::int32_t* selected, int u) {
  if constexpr (B == cmp) {
    const std::int64_t begin = leaf_at(map, u) * s.lse.segment, end = begin + s.lse.segment;
    return rows_from(map, begin, end < n ? end : n);
  } else if constexpr (B == sel) {
    const std::int64_t begin = std::int64_t{selected[u]} * s.rules.l_sel, end = begin + s.rules.l_sel;
    return begin < 0 ? Unit{} : rows_from(map, begin, end < t + 1 ? end : t + 1);
  } else {
    const WindowRows rows = window_rows(s.rules, map, t);
    const std::int64_t from = (rows.begin / window_unit + u) * window_unit, to = from + window_unit;
    return rows_from(map, rows.begin > from ? rows.begin : from, rows.end < to ? rows.end : to);
  }
}

/// A warp takes a unit by tiles of 32 tokens, `tiles_per_unit` of them.
constexpr int tile_rows = 32;
__host__ __device__ inline int tiles_per_unit(Branch branch, const LayerShape& s) {
  const std::int64_t tokens = branch == cmp ? s.lse.segment : branch == sel ? s.rules.l_sel : window_unit;
  return static_cast<int>((tokens + tile_rows - 1) / tile_rows);
}

/// The units of one row as tiles, one after the other.
template <Branch B>
struct Tiles {
  const LayerShape& s;
  const RowMap& map;
  const std::int32_t* selected;  // sel
  int t, n, per_unit, count;
  bool whole;  // rows lie where their positions say

  __device__ __forceinline__ Tiles(const LayerShape& shape, const RowMap& row_map, std::int64_t position)
      : s(shape), map(row_map), selected(nullptr), t(static_cast<int>(position)) {
    n = B == cmp ? static_cast<int>(compressed_tokens(s.rules, position)) : 0;
    per_unit = tiles_per_unit(B, s);
    count = unit_count<B>(s, map, position, n) * per_unit;
    whole = map.chunk == INT64_MAX || map.ring > 0;
  }
  __device__ __forceinline__ Unit operator()(int i) const {
    const int u = per_unit == 2 ? i / 2 : i / per_unit, at = (i - u * per_unit) * tile_rows;
    if (!whole) {
      if constexpr (B == cmp)
        if (map.rank != all_ranks && map.chunk == s.lse.segment) {  // a leaf is a chunk, and this is the u-th here
          const int row = u * static_cast<int>(map.stride) + map.halo,
                    column = u * static_cast<int>(score_stride(map)) + static_cast<int>(score_halo_columns(map)),
                    left = n - (u * map.kv + map.rank) * static_cast<int>(s.lse.segment);
          return {row + at, min(tile_rows, min(static_cast<int>(s.lse.segment), left) - at), 0, column + at};
        }
      return cut(s, map, t, n, selected, u, at);
    }
    int begin, end;
    if constexpr (B == cmp) {
      begin = u * static_cast<int>(s.lse.segment), end = min(begin + static_cast<int>(s.lse.segment), n);
    } else if constexpr (B == sel) {
      begin = selected[u] * s.rules.l_sel, end = begin < 0 ? begin : min(begin + s.rules.l_sel, t + 1);
    } else {
      const WindowRows rows = window_rows(s.rules, map, t);
      const int first = static_cast<int>(rows.begin), from = (first / window_unit + u) * window_unit;
      begin = max(first, from), end = min(from + window_unit, static_cast<int>(rows.end));
    }
    return {begin + at, min(tile_rows, end - begin - at), 0, begin + at};
  }

 private:
  // Out of line: divisions by what a chunk holds.
  static __device__ __noinline__ Unit cut(const LayerShape& s, const RowMap& map, int t, int n,
                                          const std::int32_t* selected, int u, int at) {
    const Unit unit = unit_at<B>(s, map, t, n, selected, u);
    return {unit.row + at, min(tile_rows, unit.count - at), unit.owner, unit.column + at};
  }
};

/// (m, sum) with m in powers of two. The maximum of no token is neg_inf.
struct Sum2 {
  float m = neg_inf, s = 0.0f;
};
// Roundings spelled out, here and where scores are scaled: different kernels have to leave the same bits.
__device__ __forceinline__ Sum2 merge2(Sum2 a, Sum2 b) {
  const float m = fmaxf(a.m, b.m);
  return {m, __fmaf_rn(a.s, exp2_fast(a.m - m), __fmul_rn(b.s, exp2_fast(b.m - m)))};
}
/// As the interface has it: natural, -inf for nothing.
__device__ __forceinline__ float2 to_natural_log(Sum2 x) {
  return make_float2(x.s > 0.0f ? x.m * 0.6931471805599453f : -INFINITY, x.s);
}

/// Tiles of a list at most, on this rank.
inline std::int64_t decode_tiles(Branch branch, const LayerShape& s, const RowMap& map, std::int64_t positions) {
  const std::int64_t tokens = compressed_tokens(s.rules, positions - 1);
  const std::int64_t window =
      map.ring > 0 ? std::min<std::int64_t>(map.slot_end, map.ring) - map.slot_begin : s.rules.w;
  const std::int64_t units = branch == sel                         ? s.rules.n_sel
                             : branch == win                       ? window / window_unit + 2
                             : map.rank != all_ranks && map.kv > 1 ? owned_chunks(map, tokens + map.halo, map.rank)
                                                                   : (tokens + s.lse.segment - 1) / s.lse.segment;
  return std::max<std::int64_t>(1, units) * tiles_per_unit(branch, s);
}

}  // namespace nsa::gpu
