#include "nsa/experiment/sha256.hpp"

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <istream>
#include <vector>

namespace nsa {

namespace {

// First 32 bits of the fractional part of a root of the first primes: FIPS 180-4's definition of its tables.
template <std::size_t N>
std::array<std::uint32_t, N> root_bits(long double (*root)(long double)) {
  std::array<std::uint32_t, N> table;
  std::size_t found = 0;
  for (int n = 2; found < N; ++n) {
    bool prime = true;
    for (int d = 2; d * d <= n; ++d) prime = prime && n % d != 0;
    if (!prime) continue;
    const long double value = root(n);
    table[found++] = static_cast<std::uint32_t>((value - std::floor(value)) * 4294967296.0L);
  }
  return table;
}

void absorb(std::array<std::uint32_t, 8>& state, const unsigned char* block) {
  static const auto k = root_bits<64>([](long double x) { return std::cbrt(x); });
  std::uint32_t w[64];
  for (int i = 0; i < 16; ++i)
    w[i] = std::uint32_t{block[4 * i]} << 24 | std::uint32_t{block[4 * i + 1]} << 16 |
           std::uint32_t{block[4 * i + 2]} << 8 | block[4 * i + 3];
  for (int i = 16; i < 64; ++i) {
    const std::uint32_t s0 = std::rotr(w[i - 15], 7) ^ std::rotr(w[i - 15], 18) ^ w[i - 15] >> 3;
    const std::uint32_t s1 = std::rotr(w[i - 2], 17) ^ std::rotr(w[i - 2], 19) ^ w[i - 2] >> 10;
    w[i] = w[i - 16] + s0 + w[i - 7] + s1;
  }
  auto [a, b, c, d, e, f, g, h] = state;
  for (int i = 0; i < 64; ++i) {
    const std::uint32_t t1 =
        h + (std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25)) + ((e & f) ^ (~e & g)) + k[i] + w[i];
    const std::uint32_t t2 = (std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
    h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
  }
  const std::uint32_t sum[8] = {a, b, c, d, e, f, g, h};
  for (int i = 0; i < 8; ++i) state[i] += sum[i];
}

using State = std::array<std::uint32_t, 8>;

State initial() {
  return root_bits<8>([](long double x) { return std::sqrt(x); });
}

void absorb_all(State& state, std::string_view blocks) {
  for (std::size_t at = 0; at < blocks.size(); at += 64)
    absorb(state, reinterpret_cast<const unsigned char*>(blocks.data()) + at);
}

/// `tail`: the bytes after the last whole block; `length`: total bytes.
std::string finish(State& state, std::string_view tail, std::uint64_t length) {
  std::string padded(tail);
  padded += '\x80';
  while (padded.size() % 64 != 56) padded += '\0';
  for (int i = 7; i >= 0; --i) padded += static_cast<char>(length * 8 >> (8 * i) & 0xFF);
  absorb_all(state, padded);
  std::string hex;
  for (const std::uint32_t word : state)
    for (int shift = 28; shift >= 0; shift -= 4) hex += "0123456789abcdef"[word >> shift & 0xF];
  return hex;
}

}  // namespace

std::string sha256(std::string_view text) {
  State state = initial();
  const std::size_t whole = text.size() / 64 * 64;
  absorb_all(state, text.substr(0, whole));
  return finish(state, text.substr(whole), text.size());
}

std::string sha256(std::istream& in) {
  State state = initial();
  std::vector<char> buffer(std::size_t{1} << 20);  // whole blocks
  std::uint64_t length = 0;
  for (;;) {
    in.read(buffer.data(), static_cast<std::streamsize>(buffer.size()));
    const std::string_view bytes_read(buffer.data(), static_cast<std::size_t>(in.gcount()));
    length += bytes_read.size();
    const std::size_t whole = bytes_read.size() / 64 * 64;
    absorb_all(state, bytes_read.substr(0, whole));
    if (bytes_read.size() < buffer.size()) return finish(state, bytes_read.substr(whole), length);
  }
}

}  // namespace nsa
