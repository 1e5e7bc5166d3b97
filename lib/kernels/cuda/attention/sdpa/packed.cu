// Packed SDPA of the selected branch: jobs of gather and attention over packed rows.
//
// Bytes: three times those of the selected K and V: read, written packed, read again. Bound: memory bandwidth. A job
// takes as many (row, group) as its scratch holds; one launch of each kernel does the whole tile where that is at most
// 1 GiB (sizes/sdpa.cpp).

#include <algorithm>

#include "kernels/cuda/attention/sdpa/packed.cuh"
#include "kernels/cuda/attention/stages.cuh"
#include "kernels/cuda/decode/split_kv/stages.cuh"
#include "kernels/cuda/sizes/sdpa.hpp"

namespace nsa::gpu {

namespace {

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
    const PackedRows packed{first, std::min(items_a_launch, items - first), selected_columns(a.shape, a.tile), k,
                            v,     reinterpret_cast<std::int32_t*>(lengths)};
    run_job(a, packed, attention, bytes.attention, stream);
  }
}

}  // namespace nsa::gpu
