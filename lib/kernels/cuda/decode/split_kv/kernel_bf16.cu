// The decode kernels of bf16 storage: a file a type, because each takes long to compile.

#include "kernels/cuda/decode/split_kv/kernel.cuh"

namespace nsa::gpu {

void launch_decode_bf16(const DecodeParams& p, Stream* stream) {
  if (p.shape.d_k == 64) return launch_split_kv<WarpTileMma<__nv_bfloat16, 64, 64>>(p, stream);
  if (p.shape.d_k == 128) return launch_split_kv<WarpTileMma<__nv_bfloat16, 128, 128>>(p, stream);
  return launch_split_kv<WarpTileMma<__nv_bfloat16, 192, 128>>(p, stream);
}

}  // namespace nsa::gpu
