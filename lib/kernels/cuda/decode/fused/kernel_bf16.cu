// A decode step in one launch, bf16 storage.

#include "kernels/cuda/decode/fused/kernel.cuh"

namespace nsa::gpu {

int active_clusters_bf16(const LayerShape& s, int cluster) {
  if (s.d_k == 64) return count_active_clusters<WarpTileMma<__nv_bfloat16, 64, 64>>(s, cluster);
  if (s.d_k == 128) return count_active_clusters<WarpTileMma<__nv_bfloat16, 128, 128>>(s, cluster);
  return count_active_clusters<WarpTileMma<__nv_bfloat16, 192, 128>>(s, cluster);
}

void launch_fused_decode_bf16(const FusedDecodeParams& p, Stream* stream) {
  if (p.shape.d_k == 64) return launch_fused_decode_of<WarpTileMma<__nv_bfloat16, 64, 64>>(p, stream);
  if (p.shape.d_k == 128) return launch_fused_decode_of<WarpTileMma<__nv_bfloat16, 128, 128>>(p, stream);
  return launch_fused_decode_of<WarpTileMma<__nv_bfloat16, 192, 128>>(p, stream);
}

}  // namespace nsa::gpu
