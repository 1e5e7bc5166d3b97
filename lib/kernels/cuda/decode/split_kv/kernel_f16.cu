// The decode kernels of f16 storage: a file a type, because each takes long to compile.

#include "kernels/cuda/decode/split_kv/kernel.cuh"

namespace nsa::gpu {

void launch_decode_f16(const DecodeParams& p, Stream* stream) {
  if (p.shape.d_k == 64) return launch_split_kv<WarpTileMma<__half, 64, 64>>(p, stream);
  if (p.shape.d_k == 128) return launch_split_kv<WarpTileMma<__half, 128, 128>>(p, stream);
  return launch_split_kv<WarpTileMma<__half, 192, 128>>(p, stream);
}

}  // namespace nsa::gpu
