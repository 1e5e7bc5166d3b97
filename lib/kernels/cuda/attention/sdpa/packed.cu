// Packed SDPA of the selected branch: jobs of gather and attention over packed rows.
//
// Bytes: three times those of the selected K and V: read, written packed, read again. Bound: memory bandwidth. A job
// takes as many (row, group) as its scratch holds; one launch of each kernel does the whole tile where that is at most
// `budget`.

#include <algorithm>

#include "kernels/cuda/attention/sdpa/packed.cuh"
#include "kernels/cuda/attention/stages.cuh"
#include "kernels/cuda/decode/split_kv/stages.cuh"

namespace nsa::gpu {

namespace {

constexpr std::size_t budget = std::size_t{1} << 30;
constexpr std::int64_t max_job_items = 65535;  // the limit of a grid's y

std::size_t padded(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

std::int64_t packed_columns(const LayerShape& s, const QueryTile& tile) {
  return std::min<std::int64_t>(s.rules.n_sel, eligible_blocks(s.rules, tile.max_positions - 1)) * s.rules.l_sel;
}

/// A (row, group) as a sequence of its own with one query row.
LayerShape shape_of_job(const LayerShape& s, std::int64_t columns) {
  LayerShape job = s;
  job.groups = 1;
  job.rules.w = static_cast<std::int32_t>(columns);
  return job;
}
QueryTile tile_of_job(const QueryTile& tile, std::int64_t items, std::int64_t columns) {
  QueryTile job;
  job.batches = static_cast<std::int32_t>(items);
  job.first_position = tile.first_position;
  job.max_positions = columns;
  return job;
}

/// Scratch of a job of so many work items.
struct JobBytes {
  std::size_t k, v, lengths, attention;
  JobBytes(const LayerShape& s, const QueryTile& tile, std::int64_t items) {
    const std::int64_t columns = packed_columns(s, tile);
    const std::size_t rows = items * columns * size_of(s.dtype);
    k = padded(rows * s.d_k);
    v = padded(rows * s.d_v);
    lengths = padded(items * sizeof(std::int32_t));
    attention = padded(decode_scratch(shape_of_job(s, columns), tile_of_job(tile, items, columns)));
  }
  std::size_t sum() const { return k + v + lengths + attention; }
};

/// Most work items of a job that `bytes` hold.
std::int64_t items_that_fit(const LayerShape& s, const QueryTile& tile, std::size_t bytes) {
  std::int64_t fit = 0, too_many = std::min(tile.rows() * s.groups, max_job_items) + 1;
  while (too_many - fit > 1) {
    const std::int64_t middle = fit + (too_many - fit) / 2;
    (JobBytes(s, tile, middle).sum() <= bytes ? fit : too_many) = middle;
  }
  return fit;
}

KvView packed_view(void* data, std::int64_t columns, int width) {
  KvView view;
  view.data = data;
  view.plane_stride = columns * width;
  view.width = width;
  return view;
}

void run_job(const AttendArgs& a, const PackedRows& packed, void* scratch, std::size_t bytes, Stream* stream) {
  gather_selected(a, packed, stream);
  const LayerShape& s = a.shape;
  const std::int64_t head = packed.first * s.heads_per_group;
  AttendArgs job = a;
  job.shape = shape_of_job(s, packed.columns);
  job.tile = tile_of_job(a.tile, packed.count, packed.columns);
  job.q = static_cast<const char*>(a.q) + head * s.d_k * size_of(s.dtype);
  job.k = packed_view(packed.k, packed.columns, s.d_k);
  job.v = packed_view(packed.v, packed.columns, s.d_v);
  job.out = {a.out.o + head * s.d_v, a.out.ms + head * 2};
  job.reads = nullptr;  // the gather counts
  job.selected = nullptr;
  job.scratch = scratch;
  job.scratch_bytes = bytes;
  attend_rows_of_length(sel, job, packed.lengths, stream);
}

}  // namespace

bool packed_accepts(const LayerShape& s, const QueryTile& tile) {
  QueryTile row = tile;
  row.tokens = 1;
  return tile.max_positions > 0 && gather_accepts(s) && decode_accepts(s, row);
}

std::size_t packed_scratch(const LayerShape& s, const QueryTile& tile) {
  if (!packed_accepts(s, tile) || tile.rows() == 0) return 0;
  const std::int64_t items = std::max<std::int64_t>(1, items_that_fit(s, tile, budget));
  return JobBytes(s, tile, items).sum();
}

bool packed_fits(const AttendArgs& a) {
  return packed_accepts(a.shape, a.tile) && gather_reads(a.k.map) &&
         items_that_fit(a.shape, a.tile, a.scratch_bytes) > 0;
}

void attend_packed(const AttendArgs& a, Stream* stream) {
  const std::int64_t items = a.tile.rows() * a.shape.groups,
                     items_a_launch = items_that_fit(a.shape, a.tile, a.scratch_bytes);
  const JobBytes bytes(a.shape, a.tile, items_a_launch);
  char* const k = static_cast<char*>(a.scratch);
  char *const v = k + bytes.k, *const lengths = v + bytes.v, *const attention = lengths + bytes.lengths;
  for (std::int64_t first = 0; first < items; first += items_a_launch) {
    const PackedRows packed{first, std::min(items_a_launch, items - first), packed_columns(a.shape, a.tile), k,
                            v,     reinterpret_cast<std::int32_t*>(lengths)};
    run_job(a, packed, attention, bytes.attention, stream);
  }
}

}  // namespace nsa::gpu
