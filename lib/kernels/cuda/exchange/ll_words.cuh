#pragma once
// Words of the LL protocol (that of NCCL): 4 bytes of data beside a 4-byte epoch, stored and loaded whole. Data beside
// the expected epoch belong to this exchange: no fence, and no flag after the data. Two words travel as one 16-byte
// vector.

#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu {

constexpr int ll_vector_bytes = 16;  ///< two words: 8 bytes of data

__device__ __forceinline__ void ll_store(std::byte* to, std::uint32_t a, std::uint32_t b, std::uint32_t epoch) {
  const std::uint64_t flag = std::uint64_t{epoch} << 32;
  asm volatile("st.relaxed.sys.global.v2.b64 [%0], {%1, %2};" ::"l"(to), "l"(flag | a), "l"(flag | b) : "memory");
}

__device__ __forceinline__ ulonglong2 ll_load(const std::byte* from) {
  ulonglong2 x;
  asm volatile("ld.relaxed.sys.global.v2.b64 {%0, %1}, [%2];" : "=l"(x.x), "=l"(x.y) : "l"(from) : "memory");
  return x;
}

__device__ __forceinline__ bool is_aborted(const int* flag) {
  int value;
  asm volatile("ld.relaxed.sys.global.b32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value != 0;
}

/// Waits for N vectors without a time limit: the watchdog ends a job that waits too long. False: aborted, and the
/// result is zero.
template <int N>
__device__ __forceinline__ bool ll_wait(const std::byte* const (&from)[N], std::uint32_t epoch, const int* abort_flag,
                                        uint2 (&data)[N]) {
  for (unsigned polls = 1;; ++polls) {
    bool arrived = true;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const ulonglong2 x = ll_load(from[i]);
      arrived &= static_cast<std::uint32_t>(x.x >> 32) == epoch && static_cast<std::uint32_t>(x.y >> 32) == epoch;
      data[i] = {static_cast<unsigned>(x.x), static_cast<unsigned>(x.y)};
    }
    if (arrived) return true;
    if (polls % 4096 == 0 && is_aborted(abort_flag)) break;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) data[i] = {};
  return false;
}

}  // namespace nsa::gpu
