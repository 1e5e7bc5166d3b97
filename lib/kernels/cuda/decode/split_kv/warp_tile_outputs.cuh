#pragma once
// Where a decode engine leaves what rank reads of a tile.

#include "kernels/cuda/attention/kv_tiles.cuh"
#include "kernels/cuda/decode/split_kv/params.cuh"
#include "kernels/cuda/primitives/cp_async_ring.cuh"

namespace nsa::gpu {

static_assert(tile_rows == slot_rows);

/// Where the raw scores of a tile go: row of the first head, elements between heads, first column.
struct ScoreRows {
  float* first = nullptr;
  std::int64_t pitch = 0;
  bool keep = false;  ///< in the L2, with `policy`
  std::uint64_t policy = 0;
};

/// Where the sums of a tile's blocks go instead (attention/block_sums.cuh), and the raw score of its last token.
struct SumRows {
  float* sums = nullptr;  ///< null: nowhere
  float* last = nullptr;  ///< in front of the next tile; null: nowhere
  bool keep = false;
  std::uint64_t policy = 0;
};

__device__ __forceinline__ void keep_word(float* to, float x, std::uint64_t policy) {
  asm volatile("st.global.L2::cache_hint.f32 [%0], %1, %2;" ::"l"(to), "f"(x), "l"(policy) : "memory");
}
__device__ __forceinline__ void keep_pair(float* to, float x, float y, std::uint64_t policy) {
  asm volatile("st.global.L2::cache_hint.v2.f32 [%0], {%1, %2}, %3;" ::"l"(to), "f"(x), "f"(y), "l"(policy) : "memory");
}
__device__ __forceinline__ void keep_four(float* to, float4 x, std::uint64_t policy) {
  asm volatile("st.global.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to), "f"(x.x), "f"(x.y), "f"(x.z),
               "f"(x.w), "l"(policy)
               : "memory");
}
__device__ __forceinline__ void put_pair(const ScoreRows& rows, float* to, float x, float y) {
  if (rows.keep)
    keep_pair(to, x, y, rows.policy);
  else
    *reinterpret_cast<float2*>(to) = make_float2(x, y);
}
__device__ __forceinline__ void put_word(const SumRows& rows, float* to, float x) {
  if (rows.keep)
    keep_word(to, x, rows.policy);
  else
    *to = x;
}
__device__ __forceinline__ void put_four(const SumRows& rows, float* to, float4 x) {
  if (rows.keep)
    keep_four(to, x, rows.policy);
  else
    *reinterpret_cast<float4*>(to) = x;
}

}  // namespace nsa::gpu
