#pragma once
// bf16 and fp16 as bits, to and from fp32, for host code. Branch-free, so that loops over them vectorise.

#include <bit>
#include <cstdint>

namespace nsa {

struct Bf16 {
  std::uint16_t bits;
};
struct Fp16 {
  std::uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(Bf16 x) { return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16); }

/// Exact for every finite value, subnormals included (the multiplication moves the exponent's bias).
inline float to_float(Fp16 x) {
  const std::uint32_t magnitude = static_cast<std::uint32_t>(x.bits & 0x7FFFu) << 13;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  const std::uint32_t special = (x.bits & 0x7C00u) == 0x7C00u ? 0x7F800000u : 0u;
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(scaled) | special | sign);
}

template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

/// Round to nearest even; NaN stays NaN (quiet).
template <>
inline Bf16 from_float<Bf16>(float x) {
  const std::uint32_t u = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = u + 0x7FFFu + ((u >> 16) & 1u);
  const std::uint32_t result = (u & 0x7FFFFFFFu) > 0x7F800000u ? (u | 0x400000u) : rounded;
  return {static_cast<std::uint16_t>(result >> 16)};
}

/// Round to nearest even; overflow gives infinity, small values subnormals; NaN stays NaN.
template <>
inline Fp16 from_float<Fp16>(float x) {
  const std::uint32_t u = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t sign = (u >> 16) & 0x8000u, a = u & 0x7FFFFFFFu;
  // Subnormal results: adding 0.5 rounds the fraction into the low bits.
  const std::uint32_t small = std::bit_cast<std::uint32_t>(std::bit_cast<float>(a) + 0.5f) - 0x3F000000u;
  const std::uint32_t normal = (a - 0x38000000u + 0xFFFu + ((a >> 13) & 1u)) >> 13;
  const std::uint32_t special = a > 0x7F800000u ? 0x7E00u : 0x7C00u;
  const std::uint32_t finite = a < 0x38800000u ? small : normal;
  return {static_cast<std::uint16_t>((a >= 0x477FF000u ? special : finite) | sign)};
}

}  // namespace nsa
