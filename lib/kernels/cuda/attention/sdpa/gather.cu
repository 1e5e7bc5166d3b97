// Gather of the selected tokens into packed rows.
//
// Bytes: each token's K and V once from the cache (mostly from the L2, since rows share blocks) and once to the packed
// rows. Bound: memory bandwidth of the writes. Tiling: a CTA a block of a (row, group). Its tokens are contiguous on
// both sides, so threads copy 16-byte vectors at equal offsets, eight loads in flight each.

#include "kernels/cuda/attention/sdpa/packed.cuh"

namespace nsa::gpu {

namespace {

constexpr int threads = 128;
constexpr int loads = 8;  // in flight a thread

struct GatherParams {
  AttendArgs a;
  PackedRows packed;
  int storage;  // bytes of an element
};

// Tokens of the block that the row attends; none of -1.
__device__ __forceinline__ int tokens_of(const BlockRules& r, int block, std::int64_t t) {
  if (block < 0) return 0;
  const std::int64_t left = t + 1 - std::int64_t{block} * r.l_sel;
  return left < 0 ? 0 : static_cast<int>(left < r.l_sel ? left : r.l_sel);
}

// Source and target of a block's K or V, and their 16-byte vectors.
struct BlockCopy {
  const uint4* from;
  uint4* to;
  int vectors;
  __device__ __forceinline__ BlockCopy(const GatherParams& p, const KvView& view, void* packed, std::int64_t plane,
                                       int block, int tokens) {
    const int l_sel = p.a.shape.rules.l_sel, row_bytes = view.width * p.storage;
    const std::int64_t first = std::int64_t{block} * l_sel,  // offset_of() without its divisions where it can be
        offset = view.map.chunk == INT64_MAX && !view.pages.pages ? plane * view.plane_stride + first * view.width
                                                                  : offset_of(view, plane, first);
    from = reinterpret_cast<const uint4*>(static_cast<const char*>(view.data) + offset * p.storage);
    to = reinterpret_cast<uint4*>(static_cast<char*>(packed) +
                                  (blockIdx.y * p.packed.columns + std::int64_t{blockIdx.x} * l_sel) * row_bytes);
    vectors = tokens * row_bytes / 16;
  }
};

__device__ __forceinline__ void run(const BlockCopy& k, const BlockCopy& v) {
  const int all = k.vectors + v.vectors;
  for (int first = threadIdx.x; first < all; first += loads * threads) {
    uint4 x[loads];
#pragma unroll
    for (int i = 0; i < loads; ++i)
      if (const int at = first + i * threads; at < all) x[i] = at < k.vectors ? k.from[at] : v.from[at - k.vectors];
#pragma unroll
    for (int i = 0; i < loads; ++i)
      if (const int at = first + i * threads; at < all) (at < k.vectors ? k.to[at] : v.to[at - k.vectors]) = x[i];
  }
}

__global__ void __launch_bounds__(threads) gather_kernel(const __grid_constant__ GatherParams p) {
  griddep_wait();
  const BlockRules& r = p.a.shape.rules;
  const int groups = p.a.shape.groups, u = blockIdx.x, item = static_cast<int>(p.packed.first) + blockIdx.y;
  const TileRow row = tile_row(p.a.tile, item / groups);
  const int g = item % groups;
  const std::int32_t* selected = p.a.selected + std::int64_t{item} * r.n_sel;
  const int block = selected[u], next = u + 1 < r.n_sel ? selected[u + 1] : -1;
  const int tokens = tokens_of(r, block, row.t);
  // Blocks are ascending and -1 comes last, so that only the last one may be cut.
  const bool last = tokens > 0 ? tokens_of(r, next, row.t) == 0 : u == 0;
  if (last && threadIdx.x == 0) p.packed.lengths[blockIdx.y] = u * r.l_sel + tokens;
  if (tokens == 0) return;
  const std::int64_t plane = (p.a.tile.batch_begin + row.sequence) * groups + g;
  run(BlockCopy(p, p.a.k, p.packed.k, plane, block, tokens), BlockCopy(p, p.a.v, p.packed.v, plane, block, tokens));
  if (threadIdx.x == 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(p.a.reads) + row.sequence * groups + g,
              static_cast<unsigned long long>(tokens));
}

}  // namespace

bool gather_reads(const RowMap& map) { return map.ring == 0 && map.rank == all_ranks; }

void gather_selected(const AttendArgs& a, const PackedRows& packed, Stream* stream) {
  const std::int64_t blocks = packed.columns / a.shape.rules.l_sel;
  const GatherParams p{a, packed, static_cast<int>(size_of(a.shape.dtype))};
  launch_pdl(gather_kernel, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(packed.count)), threads, 0,
             stream, 1, p);
}

}  // namespace nsa::gpu
