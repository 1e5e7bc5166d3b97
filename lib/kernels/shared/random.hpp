#pragma once
// Counter-based synthetic values: Philox4x32-10 (Salmon et al., SC'11) and an integer-exact bell curve. A value depends
// only on the seed, the tensor's name and its coordinates: not on the rank count, the backend or the order of
// generation. It is the same to the last bit on every machine.

#include <cstdint>

#include "kernels/shared/portable.hpp"

namespace nsa {

/// Key of one tensor: seed mixed with FNV-1a of its name, e.g. tensor_key(1, "layer0/w_q").
inline std::uint64_t tensor_key(std::uint64_t seed, const char* name) {
  std::uint64_t hash = 14695981039346656037ull;
  for (const char* c = name; *c; ++c) hash = (hash ^ static_cast<unsigned char>(*c)) * 1099511628211ull;
  return hash ^ (seed * 0x9E3779B97F4A7C15ull);
}

/// Four 32-bit words: a counter, or the random numbers of one.
struct Philox4 {
  std::uint32_t v[4];
};

/// The random numbers of counter c under a key.
NSA_HD Philox4 philox(std::uint64_t key, Philox4 c) {
  std::uint32_t k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = 0xD2511F53ull * c.v[0], p1 = 0xCD9E8D57ull * c.v[2];
    c = {{static_cast<std::uint32_t>(p1 >> 32) ^ c.v[1] ^ k0, static_cast<std::uint32_t>(p1),
          static_cast<std::uint32_t>(p0 >> 32) ^ c.v[3] ^ k1, static_cast<std::uint32_t>(p0)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

/// A value of mean 0, variance 1 and |value| < 3.47 from 64 random bits: the sum of four uniform 16-bit integers
/// (Irwin-Hall). It calls no library function, whose result may differ by platform.
NSA_HD float bell_curve(std::uint32_t a, std::uint32_t b) {
  const std::int32_t sum = static_cast<std::int32_t>((a & 0xFFFFu) + (a >> 16) + (b & 0xFFFFu) + (b >> 16)) - 131070;
  return static_cast<float>(sum) * (1.0f / 37837.23f);
}

/// How often a row repeats the one before it, as a share of 2^32: `repeats(0.5)`.
inline std::uint64_t repeats(double share) { return static_cast<std::uint64_t>(share * 4294967296.0 + 0.5); }

/// The row whose values stand at `row` where each row repeats the one before it with probability `repeat` / 2^32: `row`
/// itself, or an earlier one. At 2^32 every row is row 0. Draws of its own, apart from those of the values.
NSA_HD std::uint64_t source_row(std::uint64_t key, std::uint64_t row, std::uint64_t repeat) {
  if (repeat == 0) return row;
  if (repeat >> 32) return 0;
  while (row > 0) {
    const Philox4 r = philox(
        key, {{0xFFFFFFFFu, static_cast<std::uint32_t>(row), static_cast<std::uint32_t>(row >> 32), 0xFFFFFFFFu}});
    if (r.v[0] >= repeat) break;
    --row;
  }
  return row;
}

/// The value at the global coordinates (plane, row, column) of the tensor with this key; see bell_curve.
NSA_HD float synthetic_value(std::uint64_t key, std::uint32_t plane, std::uint64_t row, std::uint32_t column) {
  const Philox4 r =
      philox(key, {{column >> 1, static_cast<std::uint32_t>(row), static_cast<std::uint32_t>(row >> 32), plane}});
  return bell_curve(r.v[(column & 1u) * 2], r.v[(column & 1u) * 2 + 1]);
}

}  // namespace nsa
