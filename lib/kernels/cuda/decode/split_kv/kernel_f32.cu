// The decode kernels of fp32 storage.

#include "kernels/cuda/decode/split_kv/kernel.cuh"

namespace nsa::gpu {

void launch_decode_f32(const DecodeParams& p, Stream* stream) {
  if (p.shape.d_k == 64) return launch_split_kv<WarpTileScalar<64, 64>>(p, stream);
  return launch_split_kv<WarpTileScalar<128, 128>>(p, stream);
}

}  // namespace nsa::gpu
