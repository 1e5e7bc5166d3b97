// Gather of the selected tokens into packed rows.
//
// Bytes: each token's K and V once from the cache (mostly from the L2, since rows share blocks) and once to the packed
// rows. Bound: memory bandwidth of the writes. Tiling: a CTA takes every splits-th block of a (row, group). The tokens
// of a block are contiguous on both sides, so a thread copies 16-byte vectors at equal offsets, four loads in flight.

#include "kernels/cuda/attention/sdpa/packed.cuh"

#include <algorithm>

namespace nsa::gpu {

namespace {

constexpr int threads = 256;
constexpr int loads = 4;  // in flight a thread

struct GatherParams {
  AttendArgs a;
  PackedRows packed;
  int storage;  // bytes of an element
};

__device__ __forceinline__ void copy_rows(void* to, const void* from, int bytes) {
  const auto* source = static_cast<const uint4*>(from);
  auto* target = static_cast<uint4*>(to);
  const int vectors = bytes / 16;
  for (int first = threadIdx.x; first < vectors; first += loads * threads) {
    uint4 x[loads];
#pragma unroll
    for (int i = 0; i < loads; ++i)
      if (first + i * threads < vectors) x[i] = source[first + i * threads];
#pragma unroll
    for (int i = 0; i < loads; ++i)
      if (first + i * threads < vectors) target[first + i * threads] = x[i];
  }
}

// Tokens of the block that the row attends; none of -1.
__device__ __forceinline__ int tokens_of(const BlockRules& r, std::int64_t block, std::int64_t t) {
  if (block < 0) return 0;
  const std::int64_t left = t + 1 - block * r.l_sel;
  return static_cast<int>(left < r.l_sel ? left : r.l_sel);
}

__global__ void __launch_bounds__(threads) gather_kernel(const __grid_constant__ GatherParams p) {
  griddep_wait();
  const LayerShape& s = p.a.shape;
  const BlockRules& r = s.rules;
  const std::int64_t matrix = blockIdx.y, item = p.packed.first + matrix;
  const TileRow row = tile_row(p.a.tile, item / s.groups);
  const std::int64_t g = item % s.groups, plane = (p.a.tile.batch_begin + row.sequence) * s.groups + g;
  const std::int32_t* selected = p.a.selected + item * r.n_sel;
  const auto copy_block = [&](const KvView& view, void* packed, int u, std::int64_t block, int tokens) {
    const int row_bytes = view.width * p.storage;
    char* to = static_cast<char*>(packed) + (matrix * p.packed.columns + std::int64_t{u} * r.l_sel) * row_bytes;
    const char* from = static_cast<const char*>(view.data) + offset_of(view, plane, block * r.l_sel) * p.storage;
    copy_rows(to, from, tokens * row_bytes);
  };
  int counted = 0;
  for (int u = blockIdx.x; u < r.n_sel; u += gridDim.x) {
    const std::int64_t block = selected[u];
    const int tokens = tokens_of(r, block, row.t);
    if (tokens <= 0) break;  // blocks are ascending, -1 comes last
    copy_block(p.a.k, p.packed.k, u, block, tokens);
    copy_block(p.a.v, p.packed.v, u, block, tokens);
    counted += tokens;
    // Only the last block may be cut, so the tokens before it are whole blocks.
    const bool last = u + 1 == r.n_sel || tokens_of(r, selected[u + 1], row.t) <= 0;
    if (last && threadIdx.x == 0) p.packed.lengths[matrix] = u * r.l_sel + tokens;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0 && counted == 0) p.packed.lengths[matrix] = 0;
  if (threadIdx.x == 0 && counted > 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(p.a.reads) + row.sequence * s.groups + g,
              static_cast<unsigned long long>(counted));
}

}  // namespace

bool gather_accepts(const LayerShape& s) {
  const int storage = static_cast<int>(size_of(s.dtype));
  return s.d_k * storage % 16 == 0 && s.d_v * storage % 16 == 0;
}

bool gather_reads(const RowMap& map) { return map.ring == 0 && map.rank == all_ranks; }

void gather_selected(const AttendArgs& a, const PackedRows& packed, Stream* stream) {
  const std::int64_t wanted = (16 * limits().sms + packed.count - 1) / packed.count;  // CTAs: two waves of eight an SM
  const auto splits = static_cast<unsigned>(std::clamp<std::int64_t>(wanted, 1, a.shape.rules.n_sel));
  const GatherParams p{a, packed, static_cast<int>(size_of(a.shape.dtype))};
  launch_pdl(gather_kernel, dim3(splits, static_cast<unsigned>(packed.count)), threads, 0, stream, 1, p);
}

}  // namespace nsa::gpu
