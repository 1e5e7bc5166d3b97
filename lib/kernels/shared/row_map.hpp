#pragma once
// Memory layout of a sharded sequence.
//
// A sequence of rows (tokens, or compressed tokens) is cut into chunks of `chunk` rows that are dealt round-robin over
// `kv` ranks: chunk c belongs to rank c % kv and is that rank's (c / kv)-th chunk. A rank may store copies of the
// `halo` rows that precede a chunk in front of it, and have free rows after it: a chunk takes `stride` rows of memory.
// In buffers gathered from all ranks the rows of consecutive ranks are `rank_stride` elements apart. A ring keeps the
// last `ring` rows only.

#include <cstdint>

#include "kernels/shared/portable.hpp"

namespace nsa {

constexpr std::int32_t all_ranks = -1;

struct RowMap {
  std::int64_t chunk = INT64_MAX;   ///< rows of a chunk; INT64_MAX: one chunk
  std::int64_t stride = INT64_MAX;  ///< rows of memory of a chunk: halo + chunk + free rows
  std::int32_t halo = 0;            ///< halo rows stored in front of each chunk
  std::int32_t kv = 1;              ///< ranks the chunks are dealt over
  std::int32_t rank = all_ranks;    ///< rank whose rows the buffer holds; all_ranks: of all
  std::int64_t ring = 0;            ///< > 0: row i is at i % ring, and the chunks only define the owner
  std::int64_t slot_begin = 0;      ///< ring only: this rank reads the slots [slot_begin, slot_end)
  std::int64_t slot_end = INT64_MAX;
};

/// Chunk of row i.
NSA_HD std::int64_t chunk_of(const RowMap& m, std::int64_t i) { return i / m.chunk; }
/// First row of chunk c. A map of one chunk has c = 0 only.
NSA_HD std::int64_t chunk_begin(const RowMap& m, std::int64_t c) { return c == 0 ? 0 : c * m.chunk; }
/// Rank that owns chunk c.
NSA_HD std::int32_t owner_of_chunk(const RowMap& m, std::int64_t c) { return static_cast<std::int32_t>(c % m.kv); }

/// Whether the buffer holds chunk c.
NSA_HD bool has_chunk(const RowMap& m, std::int64_t c) { return m.rank == all_ranks || owner_of_chunk(m, c) == m.rank; }

/// Whether this rank reads row i in the buffer.
NSA_HD bool has_row(const RowMap& m, std::int64_t i) {
  if (m.ring > 0) return i % m.ring >= m.slot_begin && i % m.ring < m.slot_end;
  return has_chunk(m, chunk_of(m, i));
}

/// Memory row of row i as a row of chunk c or of its halo.
NSA_HD std::int64_t row_in_chunk(const RowMap& m, std::int64_t c, std::int64_t i) {
  if (m.ring > 0) return i % m.ring;
  return (c / m.kv) * m.stride + m.halo + (i - c * m.chunk);
}

/// Memory row of row i in its own chunk.
NSA_HD std::int64_t row_of(const RowMap& m, std::int64_t i) { return row_in_chunk(m, chunk_of(m, i), i); }

/// Number of chunks that a rank owns among the first `rows` rows of the sequence.
NSA_HD std::int64_t owned_chunks(const RowMap& m, std::int64_t rows, std::int32_t rank) {
  const std::int64_t chunks = rows == 0 ? 0 : (rows - 1) / m.chunk + 1;
  return chunks > rank ? (chunks - rank - 1) / m.kv + 1 : 0;
}

/// Rows allocated after the last plane of a cache: a matrix product reads four rows at a time and may read these.
constexpr std::int64_t padding_rows = 3;

/// Where the memory rows of a paged cache lie: row m of a sequence is row m % rows of the page that entry m / rows of
/// its table names. A page holds the rows of all groups: data[page][group][rows][width]. Sequences may share pages,
/// which are the same entries of each; the first sequence writes them.
struct PageTable {
  const std::int32_t* pages = nullptr;    ///< [sequence][per_sequence], the backend's memory; -1: the sequence has no
                                          ///< page there. Null: rows are contiguous
  const std::int32_t* on_host = nullptr;  ///< the same in host memory
  std::int32_t per_sequence = 0;
  std::int32_t rows = 1;            ///< of a page
  std::int32_t groups = 1;          ///< planes of a sequence
  std::int32_t first_sequence = 0;  ///< of the view: the sequence of plane 0
};

/// Entries of the sequence that plane p belongs to; null where rows are contiguous.
NSA_HD const std::int32_t* pages_of_plane(const PageTable& t, std::int64_t p) {
  return t.pages ? t.pages + (t.first_sequence + p / t.groups) * t.per_sequence : nullptr;
}

/// Row m of a plane in rows from where the plane begins. `pages`: of the plane.
NSA_HD std::int64_t row_in_pages(const PageTable& t, const std::int32_t* pages, std::int64_t m) {
  return pages ? std::int64_t{pages[m / t.rows]} * t.groups * t.rows + m % t.rows : m;
}

/// Rows of a sharded K or V cache: data[plane][row][width], plane = b * groups + g, or in pages, in storage type; or,
/// of a quantised cache, in E4M3 with scales[plane][scales_of_plane] (shared/e4m3.hpp), or one for each row of the
/// pages; data and scales of a rank are `rank_stride` bytes from those of the next.
struct KvView {
  void* data = nullptr;
  RowMap map;
  std::int64_t plane_stride = 0;   ///< elements between planes; of a paged cache the elements that a plane may have
  std::int64_t rank_stride = 0;    ///< elements between ranks of a gathered buffer (map.rank == all_ranks, kv > 1)
  std::int32_t width = 0;          ///< Dk or Dv
  PageTable pages = {};            ///< of this rank's memory rows
  std::uint8_t* scales = nullptr;  ///< of a quantised cache; null: the rows are in storage type
  bool rounded = false;            ///< storage type whose values are those of a quantised cache
};

/// Element at which plane p begins.
NSA_HD std::int64_t plane_offset(const KvView& v, std::int64_t p) {
  return v.pages.pages ? p % v.pages.groups * v.pages.rows * v.width : p * v.plane_stride;
}

/// Element offset in plane p of row i as a row of chunk c or of its halo.
NSA_HD std::int64_t offset_in_chunk(const KvView& v, std::int64_t p, std::int64_t c, std::int64_t i) {
  const std::int64_t from_rank =
      v.map.ring == 0 && v.map.rank == all_ranks ? owner_of_chunk(v.map, c) * v.rank_stride : 0;
  return from_rank + plane_offset(v, p) +
         row_in_pages(v.pages, pages_of_plane(v.pages, p), row_in_chunk(v.map, c, i)) * v.width;
}

/// Element offset in plane p of row i in its own chunk.
NSA_HD std::int64_t offset_of(const KvView& v, std::int64_t p, std::int64_t i) {
  return offset_in_chunk(v, p, chunk_of(v.map, i), i);
}

/// Whether plane p has memory for row i as a row of chunk c.
NSA_HD bool has_page(const KvView& v, std::int64_t p, std::int64_t c, std::int64_t i) {
  const std::int32_t* own = pages_of_plane(v.pages, p);
  return !own || own[row_in_chunk(v.map, c, i) / v.pages.rows] >= 0;
}

/// Whether plane p writes row i as a row of chunk c: it has memory there, and not in a page of the first sequence.
NSA_HD bool writes_row(const KvView& v, std::int64_t p, std::int64_t c, std::int64_t i) {
  const std::int32_t* own = pages_of_plane(v.pages, p);
  if (!own) return true;
  const std::int64_t entry = row_in_chunk(v.map, c, i) / v.pages.rows;
  return own[entry] >= 0 && (own == v.pages.pages || own[entry] != v.pages.pages[entry]);
}

/// Whether the rows are E4M3 with scales.
NSA_HD bool is_quantised(const KvView& v) { return v.scales != nullptr; }

/// Scales of a plane of `rows` rows: whole 16-byte vectors.
NSA_HD std::int64_t scales_of_plane(std::int64_t rows) { return (rows + 15) / 16 * 16; }

/// Index in v.scales of the row's scale, as offset_in_chunk.
NSA_HD std::int64_t scale_in_chunk(const KvView& v, std::int64_t p, std::int64_t c, std::int64_t i) {
  const std::int64_t from_rank =
      v.map.ring == 0 && v.map.rank == all_ranks ? owner_of_chunk(v.map, c) * v.rank_stride : 0;
  if (v.pages.pages) return offset_in_chunk(v, p, c, i) / v.width;
  return from_rank + p * scales_of_plane(v.plane_stride / v.width) + row_in_chunk(v.map, c, i);
}

/// Index in v.scales of the scale of row i in its own chunk.
NSA_HD std::int64_t scale_of(const KvView& v, std::int64_t p, std::int64_t i) {
  return scale_in_chunk(v, p, chunk_of(v.map, i), i);
}

}  // namespace nsa
