// A decode step in one launch, fp32 storage.

#include "kernels/cuda/decode/fused/kernel.cuh"

namespace nsa::gpu {

int active_clusters_f32(const LayerShape& s, int cluster) {
  return count_active_clusters<WarpTileScalar<64, 64>>(s, cluster);
}

void launch_fused_decode_f32(const FusedDecodeParams& p, Stream* stream) {
  launch_fused_decode_of<WarpTileScalar<64, 64>>(p, stream);
}

}  // namespace nsa::gpu
