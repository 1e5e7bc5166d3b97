// Fused decode kernel of E4M3 rows: one instance, of 128 columns and bf16 queries. It is that of a whole layer, which
// also runs a step that appends nothing: each instance takes long to compile.

#include "kernels/cuda/decode/fp8/tile_pipeline.cuh"
#include "kernels/cuda/decode/fused/kernel.cuh"

namespace nsa::gpu {

namespace {

using WarpTile = WarpTileFp8<__nv_bfloat16, 128, 128>;

template <int W>
constexpr auto* kernel = fused_decode_kernel<WarpTile, W, true, FusedAppendParams>;

}  // namespace

int active_clusters_fp8(const LayerShape& s, int cluster) {
  return count_active_clusters<kernel<fused_warps_fp8>, WarpTile, fused_warps_fp8>(s, cluster);
}

void launch_fused_decode_fp8(const FusedAppendParams& p, Stream* stream) {
  const dim3 grid(static_cast<unsigned>(p.tile.rows() * p.shape.groups * p.cluster));
  if (p.warps == fused_warps_fp8)
    launch_pdl(kernel<fused_warps_fp8>, grid, 32 * fused_warps_fp8,
               FusedSharedLayout<WarpTile, fused_warps_fp8>::bytes(p.shape), stream, p.cluster, p);
  else
    launch_pdl(kernel<fused_warps_small>, grid, 32 * fused_warps_small,
               FusedSharedLayout<WarpTile, fused_warps_small>::bytes(p.shape), stream, p.cluster, p);
}

}  // namespace nsa::gpu
