// A decode step in one launch, fp32 storage.

#include "kernels/cuda/decode/fused/kernel.cuh"

namespace nsa::gpu {

int step_clusters_f32(const LayerShape& s, int cluster) { return count_clusters<Scalars<64, 64>>(s, cluster); }

void launch_step_f32(const StepParams& p, Stream* stream) { launch_step_of<Scalars<64, 64>>(p, stream); }

}  // namespace nsa::gpu
