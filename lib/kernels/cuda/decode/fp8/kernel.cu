// Fused decode kernels of E4M3 rows: 128 columns and bf16 queries, with pages or without. They are those of a whole
// layer, which also run a step that appends nothing: each instance takes long to compile.

#include <algorithm>

#include "kernels/cuda/decode/fp8/tile_pipeline.cuh"
#include "kernels/cuda/decode/fused/launch.cuh"

namespace nsa::gpu {

namespace {

using WarpTile = WarpTileFp8<__nv_bfloat16, 128, 128>;

template <int W, class Params>
constexpr auto* kernel = fused_decode_kernel<WarpTile, W, true, Params>;

template <int W, class Params>
void launch(const Params& p, Stream* stream) {
  const dim3 grid(static_cast<unsigned>(p.tile.rows() * p.shape.groups * p.cluster));
  launch_pdl(kernel<W, Params>, grid, 32 * W, FusedSharedLayout<WarpTile, W>::bytes(p.shape), stream, p.cluster, p);
}

template <class Params>
void launch_warps(const Params& p, Stream* stream) {
  if (p.warps == fused_warps_fp8) return launch<fused_warps_fp8>(p, stream);
  p.warps == fused_warps ? launch<fused_warps>(p, stream) : launch<fused_warps_small>(p, stream);
}

// The fewer of both kernels: it is not known here whether the caches are in pages.
template <int W>
int count_active(const LayerShape& s, int cluster) {
  return std::min(count_active_clusters<kernel<W, FusedAppendParams>, WarpTile, W>(s, cluster),
                  count_active_clusters<kernel<W, FusedContiguousParams>, WarpTile, W>(s, cluster));
}

}  // namespace

int active_clusters_fp8(const LayerShape& s, int cluster) { return count_active<fused_warps_fp8>(s, cluster); }

void launch_fused_decode_fp8(const FusedAppendParams& p, Stream* stream) {
  if (p.pages.table[0]) return launch_warps(p, stream);
  FusedContiguousParams contiguous;
  static_cast<FusedAppendParams&>(contiguous) = p;
  launch_warps(contiguous, stream);
}

}  // namespace nsa::gpu
