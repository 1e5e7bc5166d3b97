#pragma once
// The K/V rows of one branch that a query row attends, as spans of contiguous rows: LSE segments (cmp), selected blocks
// (sel), runs of 64 positions (win; for a ring that the window fills runs of slots, whatever the order of positions). A
// span is read as KV tiles of 32 rows.

#include "kernels/cuda/attention/split_kv.cuh"

namespace nsa::gpu {

/// Contiguous rows: a span or a tile of it.
struct KvRows {
  std::int64_t row = 0;  ///< of the first token
  int count = 0;
  int owner = 0;            ///< rank whose part of a gathered buffer holds them
  std::int64_t column = 0;  ///< cmp: of the first token's raw score
};

/// Ranks the chunks are spread over: 1 where the buffer holds all of them.
__device__ __forceinline__ int shards_of(const RowMap& map) { return map.rank == all_ranks ? 1 : map.kv; }

/// Index of this rank's u-th LSE segment.
__device__ __forceinline__ std::int64_t segment_at(const RowMap& map, std::int64_t u) {
  return map.rank == all_ranks ? u : u * map.kv + map.rank;
}

__device__ __forceinline__ int clamp_count(std::int64_t left, std::int64_t limit) {
  return static_cast<int>(left < 0 ? 0 : left < limit ? left : limit);
}

/// Whether the window reads all slots of its ring, once it is full.
__device__ __forceinline__ bool fills_ring(const BlockRules& r, const RowMap& map) {
  return map.ring > 0 && map.ring == r.w;
}

/// Rows [begin, end) of the window of position t: positions, or the slots that this rank reads of a ring that it fills.
struct WindowRows {
  std::int64_t begin, end;
};
__device__ __forceinline__ WindowRows window_rows(const BlockRules& r, const RowMap& map, std::int64_t t) {
  if (!fills_ring(r, map)) return {window_begin(r, t), t + 1};
  std::int64_t end = t + 1 < map.ring ? t + 1 : map.ring;
  return {map.slot_begin, end < map.slot_end ? end : map.slot_end};
}

/// Rows of the positions [begin, end) of one span of a ring that the window does not fill.
__device__ __forceinline__ KvRows rows_in_ring(const RowMap& map, int begin, int end) {
  const int slot = begin % static_cast<int>(map.ring);
  const bool held = slot >= map.slot_begin && slot < map.slot_end;
  return {slot, held ? end - begin : 0, 0, slot};
}

/// Rows of tokens [begin, end), all of one chunk (for a ring: of slots). None where this rank does not hold the chunk.
__device__ __forceinline__ KvRows rows_of_range(const RowMap& map, std::int64_t begin, std::int64_t end) {
  const int count = clamp_count(end - begin, INT32_MAX);
  if (map.ring > 0 || map.chunk == INT64_MAX) return {begin, count, 0, begin};
  const std::int64_t c = chunk_of(map, begin), row = row_in_chunk(map, c, begin);
  if (map.rank == all_ranks) return {row, count, owner_of_chunk(map, c), begin};
  return {row, has_chunk(map, c) ? count : 0, 0, score_column(map, c, begin)};
}

/// Spans of the query row at position t, which has n compressed tokens.
template <Branch B>
__device__ __forceinline__ int span_count(const LayerShape& s, const RowMap& map, std::int64_t t, std::int64_t n) {
  if constexpr (B == cmp) {
    const int halo = shards_of(map) > 1 ? map.halo : 0;
    return static_cast<int>(shards_of(map) > 1 ? owned_chunks(map, n + halo, map.rank)
                                               : (n + s.lse.segment - 1) / s.lse.segment);
  } else if constexpr (B == sel) {
    return s.rules.n_sel;
  } else {
    const WindowRows rows = window_rows(s.rules, map, t);
    return rows.end > rows.begin ? static_cast<int>((rows.end - 1) / window_span - rows.begin / window_span + 1) : 0;
  }
}

/// The u-th of them. `selected` is read by sel only.
template <Branch B>
__device__ __forceinline__ KvRows span_at(const LayerShape& s, const RowMap& map, std::int64_t t, std::int64_t n,
                                          const std::int32_t* selected, int u) {
  if constexpr (B == cmp) {
    const std::int64_t begin = segment_at(map, u) * s.lse.segment, end = begin + s.lse.segment;
    return rows_of_range(map, begin, end < n ? end : n);
  } else if constexpr (B == sel) {
    const std::int64_t begin = std::int64_t{selected[u]} * s.rules.l_sel, end = begin + s.rules.l_sel;
    return begin < 0 ? KvRows{} : rows_of_range(map, begin, end < t + 1 ? end : t + 1);
  } else {
    const WindowRows rows = window_rows(s.rules, map, t);
    const std::int64_t from = (rows.begin / window_span + u) * window_span, to = from + window_span;
    return rows_of_range(map, rows.begin > from ? rows.begin : from, rows.end < to ? rows.end : to);
  }
}

/// The KV tiles of one query row, span after span.
template <Branch B>
struct KvTiles {
  const LayerShape& s;
  const RowMap& map;
  const std::int32_t* selected;  // sel
  // Of paged cmp and sel: the table, and the entries of the sequence. An LSE segment is a page; a page of sel holds
  // whole blocks.
  const PageTable* table = nullptr;
  const std::int32_t* pages = nullptr;
  int t, n, per_span, count;
  bool contiguous;  // row = position (or ring slot): no division is needed

  __device__ __forceinline__ KvTiles(const LayerShape& shape, const RowMap& row_map, std::int64_t position)
      : s(shape), map(row_map), selected(nullptr), t(static_cast<int>(position)) {
    n = B == cmp ? static_cast<int>(compressed_tokens(s.rules, position)) : 0;
    per_span = tiles_per_span(B, s);
    count = span_count<B>(s, map, position, n) * per_span;
    contiguous = map.chunk == INT64_MAX || map.ring > 0;
  }
  __device__ __forceinline__ KvRows operator()(int i) const {
    KvRows rows = memory_rows(i);
    if (B != win && pages) rows.row = row_in_page(rows, i);
    return rows;
  }

 private:
  // Where the row lies, from the begin of the plane. A block of no rows may have no page.
  __device__ __forceinline__ std::int64_t row_in_page(const KvRows& rows, int i) const {
    if (B == sel && rows.count <= 0) return rows.row;
    const int m = static_cast<int>(rows.row), entry = B == cmp ? i / per_span : m / table->rows;
    return std::int64_t{pages[entry]} * table->groups * table->rows + m - entry * table->rows;
  }
  __device__ __forceinline__ KvRows memory_rows(int i) const {
    const int u = per_span == 2 ? i / 2 : i / per_span, at = (i - u * per_span) * tile_rows;
    if (!contiguous) {
      if constexpr (B == cmp)
        if (map.rank != all_ranks && map.chunk == s.lse.segment) {  // a segment is a chunk, and this is the u-th here
          const int row = u * static_cast<int>(map.stride) + map.halo,
                    column = u * static_cast<int>(score_stride(map)) + static_cast<int>(score_halo_columns(map)),
                    left = n - (u * map.kv + map.rank) * static_cast<int>(s.lse.segment);
          return {row + at, min(tile_rows, min(static_cast<int>(s.lse.segment), left) - at), 0, column + at};
        }
      return chunked_tile(s, map, t, n, selected, u, at);
    }
    int begin, end;
    if constexpr (B == cmp) {
      begin = u * static_cast<int>(s.lse.segment), end = min(begin + static_cast<int>(s.lse.segment), n);
    } else if constexpr (B == sel) {
      begin = selected[u] * s.rules.l_sel, end = begin < 0 ? begin : min(begin + s.rules.l_sel, t + 1);
    } else {
      const WindowRows rows = window_rows(s.rules, map, t);
      const int first = static_cast<int>(rows.begin), from = (first / window_span + u) * window_span;
      begin = max(first, from), end = min(from + window_span, static_cast<int>(rows.end));
      if (map.ring > 0 && map.ring != s.rules.w) {
        const KvRows span = rows_in_ring(map, begin, end);
        return {span.row + at, min(tile_rows, span.count - at), 0, span.row + at};
      }
    }
    return {begin + at, min(tile_rows, end - begin - at), 0, begin + at};
  }
  // Out of line because it divides by the chunk size.
  static __device__ __noinline__ KvRows chunked_tile(const LayerShape& s, const RowMap& map, int t, int n,
                                                     const std::int32_t* selected, int u, int at) {
    const KvRows span = span_at<B>(s, map, t, n, selected, u);
    return {span.row + at, min(tile_rows, span.count - at), span.owner, span.column + at};
  }
};

/// Upper bound of the KV tiles of a work item on this rank.
inline std::int64_t max_kv_tiles(Branch branch, const LayerShape& s, const RowMap& map, std::int64_t positions) {
  const std::int64_t tokens = compressed_tokens(s.rules, positions - 1);
  const std::int64_t window_rows_count =
      map.ring == s.rules.w ? std::min<std::int64_t>(map.slot_end, map.ring) - map.slot_begin : s.rules.w;
  const std::int64_t spans = branch == sel                         ? s.rules.n_sel
                             : branch == win                       ? window_rows_count / window_span + 2
                             : map.rank != all_ranks && map.kv > 1 ? owned_chunks(map, tokens + map.halo, map.rank)
                                                                   : (tokens + s.lse.segment - 1) / s.lse.segment;
  return std::max<std::int64_t>(1, spans) * tiles_per_span(branch, s);
}

}  // namespace nsa::gpu
