// FP8 rows: the rule against the oracle's float64 form of it, and the stages that store and load such rows.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "catch.hpp"
#include "kernels/host/runtime/host.hpp"
#include "kernels/host/simd/loops.hpp"
#include "kernels/shared/e4m3.hpp"
#include "kernels/shared/random.hpp"
#include "oracle/rounding.hpp"

using namespace nsa;

namespace {

struct StoredRow {
  std::vector<std::uint8_t> data;
  std::uint8_t scale = 0;
};
StoredRow quantised(const std::vector<float>& row) {
  StoredRow stored{std::vector<std::uint8_t>(row.size())};
  stored.scale = host::store_quantised(static_cast<std::int64_t>(row.size()), row.data(), stored.data.data());
  return stored;
}
std::vector<float> dequantised(const StoredRow& stored) {
  std::vector<float> row(stored.data.size());
  host::load_quantised(1, static_cast<std::int64_t>(row.size()), stored.data.data(), &stored.scale, row.data());
  return row;
}

std::vector<float> synthetic(std::uint64_t index, std::size_t width, float scale) {
  std::vector<float> row(width);
  for (std::size_t i = 0; i < width; ++i)
    row[i] = scale * synthetic_value(tensor_key(3, "row"), 0, index, static_cast<std::uint32_t>(i));
  return row;
}

void check_against_oracle(const std::vector<float>& row) {
  std::vector<double> expected(row.begin(), row.end());
  oracle::round_to_fp8(expected);
  const std::vector<float> got = dequantised(quantised(row));
  for (std::size_t i = 0; i < row.size(); ++i) {
    CAPTURE(i, row[i]);
    CHECK(double{got[i]} == expected[i]);
    CHECK(std::signbit(got[i]) == std::signbit(row[i]));
  }
}

}  // namespace

TEST_CASE("every E4M3 value survives its conversion") {
  for (int bits = 0; bits < 256; ++bits) {
    const float value = e4m3_value(static_cast<std::uint8_t>(bits));
    const int exponent = bits >> 3 & 15, fraction = bits & 7;
    CAPTURE(bits);
    if ((bits & 0x7F) == 0x7F) {
      CHECK(std::isnan(value));
      CHECK(e4m3_of(value) == e4m3_nan);
      continue;
    }
    const double magnitude = exponent == 0 ? std::ldexp(fraction, -9) : std::ldexp(8 + fraction, exponent - 10);
    CHECK(double{value} == (bits < 128 ? magnitude : -magnitude));
    CHECK(int{e4m3_of(value)} == bits);
    if ((bits & 0x7F) == 0x7E) continue;
    // Between two neighbours: the nearer one, the even one of a tie.
    const float next = e4m3_value(static_cast<std::uint8_t>(bits + 1)), middle = (value + next) / 2;
    CHECK(int{e4m3_of(middle)} == (bits % 2 == 0 ? bits : bits + 1));
    CHECK(int{e4m3_of(std::nextafter(middle, value))} == bits);
    CHECK(int{e4m3_of(std::nextafter(middle, next))} == bits + 1);
  }
}

TEST_CASE("FP8 rows follow the rule in float64") {
  for (const std::size_t width : {1, 16, 24, 128, 300})
    for (std::uint64_t i = 0; i < 8; ++i)
      check_against_oracle(synthetic(i, width, std::ldexp(1.37f, 20 * int(i) - 70)));
  // One value far above the others, which become subnormal or zero; at and next to a binade of the scale.
  for (const float huge : {448.0f, 449.0f, 447.9f, 224.0f, 1e6f, 3e38f, 1e-30f, 1e-38f, 1e-44f}) {
    std::vector<float> row = synthetic(9, 64, 1.0f);
    row[17] = huge;
    check_against_oracle(row);
    row[3] = -huge, row[4] = 0.0f, row[5] = -0.0f;
    check_against_oracle(row);
  }
  check_against_oracle(std::vector<float>(32, 0.0f));
  check_against_oracle(std::vector<float>(32, std::numeric_limits<float>::max()));
  check_against_oracle(std::vector<float>(32, -std::numeric_limits<float>::denorm_min()));
}

TEST_CASE("the scale of an FP8 row is the least power of two that holds it") {
  const auto scale_of_value = [](float largest) { return row_scale(quantised({0.5f * largest, largest}).scale); };
  CHECK(scale_of_value(448.0f) == 1.0f);
  CHECK(scale_of_value(std::nextafter(448.0f, 449.0f)) == 2.0f);
  CHECK(scale_of_value(-224.0f) == 0.5f);
  CHECK(scale_of_value(3.5f) == 0x1p-7f);
  CHECK(scale_of_value(std::numeric_limits<float>::max()) == 0x1p119f);
  CHECK(scale_of_value(0.0f) == 0x1p-117f);
  CHECK(dequantised(quantised({std::numeric_limits<float>::max()}))[0] == 448 * 0x1p119f);  // saturates
}

TEST_CASE("an FP8 row with a NaN or an infinity is NaN as a whole, and so is poisoned memory") {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  for (const float bad : {inf, -inf, nan, -nan}) {
    const StoredRow stored = quantised({1.0f, bad, 0.0f, -2.0f});
    CHECK(int{stored.scale} == 255);
    for (const std::uint8_t bits : stored.data) CHECK(bits == e4m3_nan);
    for (const float value : dequantised(stored)) CHECK(std::isnan(value));
  }
  for (const float value : dequantised({std::vector<std::uint8_t>(16, 0xFF), 0xFF})) CHECK(std::isnan(value));
  for (const float value : dequantised({std::vector<std::uint8_t>(16, 0x3C), 0xFF})) CHECK(std::isnan(value));
  for (const float value : dequantised({std::vector<std::uint8_t>(16, 0), 0})) CHECK(value == 0.0f);
}

TEST_CASE("bf16 holds a dequantised row, which keeps its values when it is quantised again") {
  for (std::uint64_t i = 0; i < 8; ++i) {
    const std::vector<float> once = dequantised(quantised(synthetic(i, 128, std::ldexp(1.1f, 25 * int(i) - 100))));
    std::vector<std::byte> stored(once.size() * 2);
    std::vector<float> read(once.size());
    host::store(DType::bf16, std::ssize(once), once.data(), stored.data());
    host::load(DType::bf16, std::ssize(once), stored.data(), read.data());
    CHECK(read == once);
    CHECK(dequantised(quantised(once)) == once);
  }
}

namespace {

/// A cache of 2 planes of 6 rows under a map, quantised or not.
struct Cache {
  explicit Cache(bool quantises, std::int64_t ring = 0) {
    view.width = 24, view.plane_stride = 6 * 24;
    view.map.ring = ring;
    const std::size_t size = quantises ? 1 : 2;
    data.assign(2 * 6 * 24 * size, 0xFF);
    scales.assign(quantises ? 2 * scales_of_plane(6) : 0, 0xFF);
    view.data = data.data();
    if (quantises) view.scales = scales.data();
  }
  std::vector<std::uint8_t> data, scales;
  KvView view;
};

std::uint64_t checksum_of(const Cache& cache) {
  std::uint64_t sum = 0;
  host_kernels().checksum({DType::bf16, cache.view, 2, 0, 6, &sum}, nullptr);
  return sum;
}

}  // namespace

TEST_CASE("a quantised cache holds what quantising the rows of an unquantised one gives") {
  Cache plain(false), quantised_copy(true), filled(true), back(false), again(true);
  FillRowsArgs fill{DType::bf16, plain.view, 1, 2, 0, 0, 6, tensor_key(5, "k"), 3.0f};
  host_kernels().fill_rows(fill, nullptr);
  fill.dst = filled.view;
  host_kernels().fill_rows(fill, nullptr);
  const auto copy = [](const Cache& from, const Cache& to) {
    host_kernels().copy_rows({DType::bf16, from.view, to.view, 2, 0, 6, 0, 6}, nullptr);
  };
  copy(plain, quantised_copy);
  CHECK(filled.data == quantised_copy.data);
  CHECK(filled.scales == quantised_copy.scales);
  copy(quantised_copy, again);  // bytes and scales as they are
  CHECK(again.data == filled.data);
  CHECK(again.scales == filled.scales);
  copy(filled, back);
  std::vector<float> values(2 * 6 * 24), read(values.size());
  host::load(DType::bf16, std::ssize(values), plain.data.data(), values.data());
  host::load(DType::bf16, std::ssize(read), back.data.data(), read.data());
  for (std::size_t row = 0; row < 12; ++row) {
    std::vector<double> expected(values.begin() + row * 24, values.begin() + (row + 1) * 24);
    oracle::round_to_fp8(expected);
    CHECK(std::equal(expected.begin(), expected.end(), read.begin() + row * 24));
  }
  // append stores the same
  LayerShape s;
  s.groups = 2, s.d_k = s.d_v = 24, s.dtype = DType::bf16, s.kv_precision = KvPrecision::fp8_e4m3;
  std::vector<std::uint8_t> rows;  // [position][group]
  for (std::int64_t t = 0; t < 6; ++t)
    for (std::int64_t g = 0; g < 2; ++g) {
      const auto from = plain.data.begin() + (g * 6 + t) * 48;
      rows.insert(rows.end(), from, from + 48);
    }
  Cache k(true), v(true);
  const std::int64_t first = 0;
  host_kernels().append({{s, {0, 1, 6, &first, 6}}, rows.data(), rows.data(), k.view, v.view}, nullptr);
  CHECK(k.data == filled.data);
  CHECK(v.scales == filled.scales);
}

TEST_CASE("the checksum of a quantised cache sees its rows and its scales") {
  Cache cache(true);
  host_kernels().fill_rows({DType::bf16, cache.view, 1, 2, 0, 0, 6, tensor_key(5, "k"), 3.0f}, nullptr);
  const std::uint64_t before = checksum_of(cache);
  cache.data[77] ^= 4;
  const std::uint64_t other_row = checksum_of(cache);
  CHECK(other_row != before);
  cache.data[77] ^= 4;
  CHECK(checksum_of(cache) == before);
  cache.scales[3] ^= 1;
  CHECK(checksum_of(cache) != before);
}
