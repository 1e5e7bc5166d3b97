#pragma once
// FP8 rows of a cache: E4M3 values (4 exponent bits, 3 mantissa bits, no infinity) and one power of two for each row,
// which is one K or V vector of a token and KV group.
//
// Rule. Of a row x in storage type:
// - k is the least integer with |x_i| <= 448 * 2^k for all i, moved into [min_row_exponent, max_row_exponent]; a row of
//   zeros has the least one.
// - Each x_i becomes x_i / 2^k, rounded to the nearest E4M3 value, ties to even, subnormals (multiples of 2^-9)
//   included. Above 448, which only the upper bound of k leaves, it becomes 448. Zeros keep their sign.
// - The row stores k as one byte, k + 127 (E8M0 of the OCP microscaling formats).
// - A row with a NaN or an infinity is NaN as a whole, so that it stays visible: its byte is 255, its values are NaN.
//
// A value stands for value * 2^k. It has 4 significant bits and is neither above the largest bf16 nor below the least
// normal one: bf16 and fp32 hold it exactly, and a row that is dequantised and quantised again keeps its values. A
// power of two moves no mantissa: where no value is subnormal, it costs nothing against an exact scale, at one byte a
// row where fp32 takes four.

#include <cstdint>

#include "kernels/shared/portable.hpp"

namespace nsa {

constexpr std::int32_t min_row_exponent = -117;  ///< 2^-9 * 2^k is the least normal bf16
constexpr std::int32_t max_row_exponent = 119;   ///< 448 * 2^k is below the largest bf16
constexpr std::uint32_t e4m3_nan = 0x7F;

NSA_HD std::uint32_t bits_of(float x) { return __builtin_bit_cast(std::uint32_t, x); }
NSA_HD float float_of_bits(std::uint32_t bits) { return __builtin_bit_cast(float, bits); }

/// |x| as bits, which compare like the magnitudes; those of NaN are the largest.
NSA_HD std::uint32_t magnitude_bits(float x) { return bits_of(x) & 0x7FFFFFFFu; }

/// The byte of a row whose largest magnitude has these bits.
NSA_HD std::uint8_t row_scale_byte(std::uint32_t largest) {
  if (largest >= 0x7F800000u) return 255;
  // 448 = 1.75 * 2^8
  const std::int32_t k = static_cast<std::int32_t>(largest >> 23) - 127 - 8 + ((largest & 0x7FFFFFu) > 0x600000u);
  const std::int32_t moved = k < min_row_exponent ? min_row_exponent : k > max_row_exponent ? max_row_exponent : k;
  return static_cast<std::uint8_t>(moved + 127);
}
/// 2^k of a row's byte: NaN of 255; 0 of 0, which memory that is cleared holds.
NSA_HD float row_scale(std::uint8_t byte) {
  return float_of_bits(byte == 255 ? 0x7FC00000u : static_cast<std::uint32_t>(byte) << 23);
}
/// 2^-k of the byte that a row is stored with.
NSA_HD float row_factor(std::uint8_t byte) { return float_of_bits(byte == 255 ? 0x7FC00000u : (254u - byte) << 23); }

/// x, which is a value over its row's 2^k, to E4M3 as described above. Branch-free, so that loops over it vectorise.
NSA_HD std::uint8_t e4m3_of(float x) {
  const std::uint32_t u = bits_of(x), sign = (u >> 24) & 0x80u, a = u & 0x7FFFFFFFu;
  // Below 2^-6: adding 2^14 rounds the fraction to multiples of 2^-9 in the low bits.
  const std::uint32_t small = bits_of(float_of_bits(a < 0x3C800000u ? a : 0u) + 16384.0f) - 0x46800000u;
  const std::uint32_t normal = (a - 0x3C000000u + 0x7FFFFu + ((a >> 20) & 1u)) >> 20;
  const std::uint32_t finite = a < 0x3C800000u ? small : a >= 0x43E00000u ? 0x7Eu : normal;
  return static_cast<std::uint8_t>(a > 0x7F800000u ? e4m3_nan : finite | sign);
}

/// The value of E4M3 bits, exact.
NSA_HD float e4m3_value(std::uint8_t bits) {
  const std::uint32_t magnitude = bits & 0x7Fu;
  const float value = float_of_bits(magnitude << 20) * 0x1p120f;
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x80u) << 24;
  return float_of_bits((magnitude == e4m3_nan ? 0x7FC00000u : bits_of(value)) | sign);
}

}  // namespace nsa
