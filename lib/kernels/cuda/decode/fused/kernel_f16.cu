// A decode step in one launch, f16 storage.

#include "kernels/cuda/decode/fused/kernel.cuh"

namespace nsa::gpu {

int active_clusters_f16(const LayerShape& s, int cluster) {
  if (s.d_k == 64) return count_active_clusters<WarpTileMma<__half, 64, 64>>(s, cluster);
  if (s.d_k == 128) return count_active_clusters<WarpTileMma<__half, 128, 128>>(s, cluster);
  return count_active_clusters<WarpTileMma<__half, 192, 128>>(s, cluster);
}

void launch_fused_decode_f16(const FusedDecodeParams& p, Stream* stream) {
  if (p.shape.d_k == 64) return launch_fused_decode_of<WarpTileMma<__half, 64, 64>>(p, stream);
  if (p.shape.d_k == 128) return launch_fused_decode_of<WarpTileMma<__half, 128, 128>>(p, stream);
  return launch_fused_decode_of<WarpTileMma<__half, 192, 128>>(p, stream);
}

}  // namespace nsa::gpu
