// Sharded decode kernels of bf16, the storage type that they are built for.

#include "kernels/cuda/decode/sharded/kernel.cuh"

namespace nsa::gpu {

template int active_sharded_clusters<DType::bf16>(const LayerShape& s, int cluster);
template int resident_sharded_items<DType::bf16>(const ShardedDecodeParams& p);
template void launch_sharded_decode<DType::bf16>(const ShardedDecodeParams& p, Stream* stream);

}  // namespace nsa::gpu
