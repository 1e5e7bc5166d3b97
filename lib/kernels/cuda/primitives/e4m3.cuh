#pragma once
// E4M3 values and the rows of FP8 caches (shared/e4m3.hpp) on the device: converted by hardware from capability 8.9 on.

#include "kernels/cuda/runtime/common.cuh"
#include "kernels/shared/e4m3.hpp"

namespace nsa::gpu {

/// Two E4M3 values as two fp16, exact.
struct HalfPairs {
  std::uint32_t low, high;
};
__device__ __forceinline__ HalfPairs halves_of(std::uint32_t four) {
  HalfPairs pairs;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.rn.f16x2.e4m3x2 %0, l;\ncvt.rn.f16x2.e4m3x2 %1, h;\n}"
      : "=r"(pairs.low), "=r"(pairs.high)
      : "r"(four));
#else
  const auto half_of = [&](int byte) {
    return std::uint32_t{__half_as_ushort(__float2half_rn(e4m3_value(static_cast<std::uint8_t>(four >> 8 * byte))))};
  };
  pairs = {half_of(0) | half_of(1) << 16, half_of(2) | half_of(3) << 16};
#endif
  return pairs;
}

/// Four values, which are values over their row's 2^k, as E4M3: e4m3_of().
__device__ __forceinline__ std::uint32_t e4m3_of_four(float a, float b, float c, float d) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  std::uint32_t four;
  asm("{\n.reg .b16 l, h;\ncvt.rn.satfinite.e4m3x2.f32 l, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 h, %4, %3;\n"
      "mov.b32 %0, {l, h};\n}"
      : "=r"(four)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return four;
#else
  return e4m3_of(a) | e4m3_of(b) << 8 | e4m3_of(c) << 16 | std::uint32_t{e4m3_of(d)} << 24;
#endif
}

/// 2^k of byte j of four scales. That of a NaN row is infinite here: its values are NaN.
__device__ __forceinline__ float scale_of_byte(std::uint32_t four, int j) {
  return float_of_bits((j < 3 ? four << (23 - 8 * j) : four >> 1) & 0x7F800000u);
}

/// Stores a row of which a lane has N values in storage type, if `has`, and its scale. All lanes.
template <int N>
__device__ __forceinline__ void store_e4m3_row(const float (&x)[N], char* row, std::uint8_t* scale, bool has) {
  std::uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) largest = has ? max(largest, magnitude_bits(x[i])) : 0;
  const std::uint8_t byte = row_scale_byte(__reduce_max_sync(0xffffffffu, largest));
  const float factor = row_factor(byte);
  const int lane = threadIdx.x % 32;
  auto* to = reinterpret_cast<std::uint32_t*>(row) + lane * (N / 4);
#pragma unroll
  for (int i = 0; i < N; i += 4)
    if (has) to[i / 4] = e4m3_of_four(x[i] * factor, x[i + 1] * factor, x[i + 2] * factor, x[i + 3] * factor);
  if (lane == 0) *scale = byte;
}

}  // namespace nsa::gpu
