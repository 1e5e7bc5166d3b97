#pragma once
// Outputs of a KV tile that rank reads: raw scores or block sums.

#include "kernels/cuda/attention/kv_tiles.cuh"
#include "kernels/cuda/attention/online_softmax.cuh"
#include "kernels/cuda/decode/split_kv/instances.cuh"
#include "kernels/cuda/decode/split_kv/params.cuh"
#include "kernels/cuda/primitives/cp_async_ring.cuh"

namespace nsa::gpu {

static_assert(tile_rows == slot_rows);

/// Destination of the raw scores of a tile: address of the first head and column, elements between heads.
struct ScoreOutput {
  float* first = nullptr;
  std::int64_t pitch = 0;
  bool keep = false;  ///< store with the L2 policy `policy`
  std::uint64_t policy = 0;
};

/// Destination of block sums instead (attention/block_sums.cuh), and of the raw score of the tile's last token.
struct BlockSumOutput {
  float* sums = nullptr;  ///< null: not stored
  float* last = nullptr;  ///< halo score of the next tile; null: not stored
  bool keep = false;
  std::uint64_t policy = 0;
};

__device__ __forceinline__ void store_word_with_policy(float* to, float x, std::uint64_t policy) {
  asm volatile("st.global.L2::cache_hint.f32 [%0], %1, %2;" ::"l"(to), "f"(x), "l"(policy) : "memory");
}
__device__ __forceinline__ void store_pair_with_policy(float* to, float x, float y, std::uint64_t policy) {
  asm volatile("st.global.L2::cache_hint.v2.f32 [%0], {%1, %2}, %3;" ::"l"(to), "f"(x), "f"(y), "l"(policy) : "memory");
}
__device__ __forceinline__ void store_four_with_policy(float* to, float4 x, std::uint64_t policy) {
  asm volatile("st.global.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to), "f"(x.x), "f"(x.y), "f"(x.z),
               "f"(x.w), "l"(policy)
               : "memory");
}
__device__ __forceinline__ void store_pair(const ScoreOutput& rows, float* to, float x, float y) {
  if (rows.keep)
    store_pair_with_policy(to, x, y, rows.policy);
  else
    *reinterpret_cast<float2*>(to) = make_float2(x, y);
}
__device__ __forceinline__ void store_word(const BlockSumOutput& rows, float* to, float x) {
  if (rows.keep)
    store_word_with_policy(to, x, rows.policy);
  else
    *to = x;
}
__device__ __forceinline__ void store_four(const BlockSumOutput& rows, float* to, float4 x) {
  if (rows.keep)
    store_four_with_policy(to, x, rows.policy);
  else
    *reinterpret_cast<float4*>(to) = x;
}

}  // namespace nsa::gpu
