// Parts of the host backend: storage types, block rules, row maps, synthetic values, inner loops, memory.

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <set>
#include <vector>

#include "catch.hpp"
#include "kernels/cuda/sizes/work.hpp"
#include "kernels/diagnostics/error.hpp"
#include "kernels/host/runtime/host.hpp"
#include "kernels/host/simd/loops.hpp"
#include "kernels/host/simd/matmul.hpp"
#include "kernels/interface/buffer.hpp"
#include "kernels/shared/block_rules.hpp"
#include "kernels/shared/float16.hpp"
#include "kernels/shared/random.hpp"
#include "kernels/shared/row_map.hpp"

using namespace nsa;

namespace {

std::vector<float> random_floats(std::size_t n, unsigned seed, float scale = 1.0f) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> values(n);
  for (float& x : values) x = normal(engine);
  return values;
}

std::uint32_t bits(float x) { return std::bit_cast<std::uint32_t>(x); }

}  // namespace

TEST_CASE("every 16-bit value converts to fp32 and back unchanged") {
  for (std::uint32_t u = 0; u < 65536; ++u) {
    const auto h = static_cast<std::uint16_t>(u);
    const float b = to_float(Bf16{h}), f = to_float(Fp16{h});
    if (std::isnan(b))
      CHECK(std::isnan(to_float(from_float<Bf16>(b))));
    else if (from_float<Bf16>(b).bits != h)
      FAIL("bf16 " << u);
    if (std::isnan(f))
      CHECK(std::isnan(to_float(from_float<Fp16>(f))));
    else if (from_float<Fp16>(f).bits != h)
      FAIL("fp16 " << u);
  }
}

TEST_CASE("conversions round to nearest, ties to even") {
  CHECK(from_float<Bf16>(1.0f + 0x1p-8f).bits == 0x3F80);      // tie, down to even
  CHECK(from_float<Bf16>(1.0f + 3 * 0x1p-8f).bits == 0x3F82);  // tie, up to even
  CHECK(from_float<Bf16>(1.0f + 0x1p-8f + 0x1p-20f).bits == 0x3F81);
  CHECK(from_float<Fp16>(65520.0f).bits == 0x7C00);  // half a step above the largest finite value
  CHECK(from_float<Fp16>(65519.0f).bits == 0x7BFF);
  CHECK(from_float<Fp16>(-0x1p-25f).bits == 0x8000);  // tie between 0 and the least subnormal
  for (std::uint32_t h = 0; h < 0x7BFF; ++h) {        // between every two neighbours
    const float low = to_float(Fp16{static_cast<std::uint16_t>(h)});
    const float high = to_float(Fp16{static_cast<std::uint16_t>(h + 1)});
    const float middle = 0.5f * (low + high);
    if (from_float<Fp16>(middle).bits != h + (h & 1)) FAIL("tie above " << h);
    if (from_float<Fp16>(std::nextafter(middle, high)).bits != h + 1) FAIL("above the middle of " << h);
    if (from_float<Fp16>(std::nextafter(middle, 0.0f)).bits != h) FAIL("below the middle of " << h);
  }
}

TEST_CASE("overlap of compressed tokens and blocks equals a count by position") {
  for (const BlockRules r : {BlockRules{}, BlockRules{8, 4, 16, 4, 1, 2, 8}, BlockRules{4, 4, 4, 4, 0, 1, 1},
                             BlockRules{12, 2, 12, 4, 1, 1, 3}}) {
    for (std::int64_t j = 0; j < 5; ++j) {
      for (std::int64_t i = 0; i < 6 * r.l_sel / r.d; ++i) {
        int shared = 0;
        for (std::int64_t p = i * r.d; p < i * r.d + r.l; ++p) shared += p / r.l_sel == j;
        CHECK(overlap(r, i, j) == static_cast<float>(shared) / static_cast<float>(r.d));
        CHECK((shared > 0) == (i >= first_overlapping(r, j) && i < end_overlapping(r, j)));
      }
    }
  }
  const BlockRules paper;
  const float expected[] = {1, 2, 2, 2, 1};
  for (int k = 0; k < 5; ++k) CHECK(overlap(paper, 3 + k, 1) == expected[k]);
}

TEST_CASE("valid tokens, eligible and forced blocks by position") {
  const BlockRules r;
  for (std::int64_t t = 0; t < 300; ++t) {
    std::int64_t complete = 0;
    while (complete * r.d + r.l - 1 <= t) ++complete;
    CHECK(compressed_tokens(r, t) == complete);
    CHECK(eligible_blocks(r, t) == t / 64 + 1);
  }
  CHECK(compressed_tokens(r, -1) == 0);
  CHECK(window_begin(r, 511) == 0);
  CHECK(window_begin(r, 512) == 1);
  const std::int64_t t = 10 * 64;
  for (std::int64_t j = 0; j <= 10; ++j) CHECK(is_forced(r, j, t) == (j == 0 || j == 9 || j == 10));
}

TEST_CASE("a sharded sequence has every row once, and halos map to the same row") {
  for (const std::int32_t kv : {1, 2, 3}) {
    std::set<std::pair<std::int32_t, std::int64_t>> locations;
    std::int64_t owned = 0;
    for (std::int32_t rank = 0; rank < kv; ++rank) {
      const RowMap map{.chunk = 8, .stride = 11, .halo = 2, .kv = kv, .rank = rank};
      owned += owned_chunks(map, 100, rank);
      for (std::int64_t i = 0; i < 100; ++i) {
        if (!has_row(map, i)) continue;
        CHECK(locations.insert({rank, row_of(map, i)}).second);
        CHECK(row_in_chunk(map, i / 8, i) - row_in_chunk(map, i / 8, i / 8 * 8 - 2) == i % 8 + 2);
      }
    }
    CHECK(locations.size() == 100);
    CHECK(owned == 13);
  }
  const RowMap whole;
  CHECK(row_of(whole, 123456) == 123456);
  const RowMap ring{.ring = 8, .slot_begin = 4, .slot_end = 8};
  CHECK(row_of(ring, 21) == 5);
  CHECK(has_row(ring, 21));
  CHECK_FALSE(has_row(ring, 17));
}

TEST_CASE("Philox gives the published values, and synthetic values have mean 0 and variance 1") {
  // Random123's known-answer tests for philox4x32-10.
  const Philox4 zero = philox(0, {{0, 0, 0, 0}});
  CHECK(zero.v[0] == 0x6627e8d5u);
  CHECK(zero.v[1] == 0xe169c58du);
  CHECK(zero.v[2] == 0xbc57ac4cu);
  CHECK(zero.v[3] == 0x9b00dbd8u);
  const std::uint32_t f = 0xffffffffu;
  const Philox4 ones = philox(~0ull, {{f, f, f, f}});
  CHECK(ones.v[0] == 0x408f276du);
  CHECK(ones.v[3] == 0x6d5451fdu);

  double sum = 0, square = 0;
  const std::uint64_t key = tensor_key(1, "x");
  for (int i = 0; i < 100000; ++i) {
    const double x = synthetic_value(key, 0, static_cast<std::uint64_t>(i / 100), static_cast<std::uint32_t>(i % 100));
    sum += x;
    square += x * x;
  }
  CHECK(std::abs(sum / 1e5) < 0.013);  // 4 standard errors of the mean
  CHECK(std::abs(square / 1e5 - 1) < 0.018);
  CHECK(tensor_key(1, "x") != tensor_key(2, "x"));
  CHECK(tensor_key(1, "x") != tensor_key(1, "y"));
}

TEST_CASE("a row repeats the one before as often as asked") {
  const std::uint64_t key = tensor_key(1, "given/q");
  constexpr std::uint64_t rows = 4000;
  for (const double share : {0.25, 0.5, 0.9}) {
    std::uint64_t repeated = 0;
    for (std::uint64_t row = 1; row < rows; ++row) {
      const std::uint64_t source = source_row(key, row, repeats(share));
      if (source != row) REQUIRE(source == source_row(key, row - 1, repeats(share)));
      repeated += source != row;
    }
    // Four standard errors of a share of 4000 draws.
    CHECK(std::abs(static_cast<double>(repeated) / rows - share) < 4 * std::sqrt(share * (1 - share) / rows));
  }
  CHECK(source_row(key, rows, repeats(0)) == rows);
  CHECK(source_row(key, std::uint64_t{1} << 40, repeats(1)) == 0);
}

TEST_CASE("the exponential is correct to 2 ulp and exact at its limits") {
  for (float x = -87.0f; x < 20.0f; x += 0.00037f) {
    const double exact = std::exp(static_cast<double>(x));
    const double ulp = std::ldexp(1.0, std::ilogb(exact) - 23);
    if (std::abs(host::exponential(x) - exact) > 2 * ulp) FAIL("exp(" << x << ")");
  }
  CHECK(host::exponential(0.0f) == 1.0f);
  CHECK(host::exponential(-1000.0f) == 0.0f);
  CHECK(host::exponential(-std::numeric_limits<float>::infinity()) == 0.0f);
  CHECK(std::isnan(host::exponential(std::numeric_limits<float>::quiet_NaN())));
}

TEST_CASE("an element of a product has the same bits at every position") {
  const int inner = 72, n = 112;
  const std::vector<float> a = random_floats(64 * inner, 1), b = random_floats(inner * n, 2);
  std::vector<float> whole(64 * n);
  host::product(64, n, inner, a.data(), inner, 1, b.data(), n, whole.data(), n);
  for (int i = 0; i < 64; i += 7) {
    for (int j = 0; j < n; j += 13) {
      double exact = 0;
      for (int k = 0; k < inner; ++k) exact += static_cast<double>(a[i * inner + k]) * b[k * n + j];
      CHECK(whole[i * n + j] == Approx(exact).margin(1e-4));  // 72 roundings of sums of order 10
    }
  }
  for (const int width : {16, 32, 48}) {
    for (int rows = 1; rows < 64; ++rows) {
      for (int first = 0; first + width <= n; first += width) {
        std::vector<float> slice(64 * width);
        const int begin = 64 - rows;
        host::product(rows, width, inner, a.data() + begin * inner, inner, 1, b.data() + first, n, slice.data(), width);
        for (int i = 0; i < rows; ++i)
          if (std::memcmp(slice.data() + i * width, whole.data() + (begin + i) * n + first, width * 4u) != 0)
            FAIL("row " << begin + i << " of " << rows << ", " << width << " columns");
      }
    }
  }
}

TEST_CASE("a tile is transposed, whatever its sides, and nothing beside it is written") {
  for (const int rows : {1, 15, 16, 37, 64}) {
    for (const int columns : {1, 16, 20, 48}) {
      const int from_row = columns + 3, to_row = 70;
      const std::vector<float> from = random_floats(rows * from_row, 3);
      std::vector<float> to(static_cast<std::size_t>(columns * to_row), 7.0f);
      host::transpose(rows, columns, from.data(), from_row, to.data(), to_row);
      for (int c = 0; c < columns; ++c)
        for (int r = 0; r < to_row; ++r)
          if (to[c * to_row + r] != (r < rows ? from[r * from_row + c] : 7.0f)) FAIL(rows << " x " << columns);
    }
  }
}

TEST_CASE("softmax by column, masked, is the same in a narrow and in a wide tile") {
  const int tokens = 37, columns = 48;
  std::vector<float> s = random_floats(tokens * columns, 3, 4.0f);
  std::vector<std::int32_t> first(columns, 0), last(columns, tokens);
  first[3] = 5;
  last[4] = 20;
  last[5] = 0;  // masks every token
  const std::vector<float> raw = s;
  host::mask_columns(tokens, columns, s.data(), first.data(), last.data());
  std::vector<float> m(columns), sum(columns);
  host::softmax_columns(tokens, columns, s.data(), m.data(), sum.data());
  for (int c = 0; c < columns; ++c) {
    double column_max = -INFINITY, total = 0;
    for (int t = first[c]; t < last[c]; ++t) column_max = std::max<double>(column_max, raw[t * columns + c]);
    for (int t = first[c]; t < last[c]; ++t) total += std::exp(raw[t * columns + c] - column_max);
    CHECK(m[c] == static_cast<float>(column_max));
    CHECK(sum[c] == Approx(total).epsilon(1e-5));
    if (c == 5) CHECK(s[c] == 0.0f);
  }
  std::vector<float> narrow(tokens * 16), m2(16), sum2(16), p(tokens);
  for (int t = 0; t < tokens; ++t) std::copy_n(raw.data() + t * columns + 16, 16, narrow.data() + t * 16);
  host::softmax_columns(tokens, 16, narrow.data(), m2.data(), sum2.data());
  for (int c = 0; c < 16; ++c) CHECK(bits(sum2[c]) == bits(sum[16 + c]));
  // Scores for selection: a run of any length of a column adds the same probabilities.
  std::vector<float> column(tokens), longer(tokens, 0.0f);
  for (int t = 0; t < tokens; ++t) column[t] = raw[t * columns];
  host::add_probabilities(tokens, column.data(), m[0], 1.0f / sum[0], longer.data());
  for (int begin = 0; begin < tokens; ++begin) {
    std::fill(p.begin(), p.end(), 0.0f);
    host::add_probabilities(tokens - begin, column.data() + begin, m[0], 1.0f / sum[0], p.data() + begin);
    for (int t = begin; t < tokens; ++t) CHECK(bits(p[t]) == bits(longer[t]));
  }
}

TEST_CASE("matmul agrees with float64 for few rows and many, in every storage type") {
  const std::int64_t inner = 150, cols = 203;
  for (const DType type : {DType::f32, DType::bf16, DType::f16}) {
    std::vector<float> w = random_floats(inner * cols, 5);
    std::vector<std::byte> stored(w.size() * 4);
    host::store(type, static_cast<std::int64_t>(w.size()), w.data(), stored.data());
    host::load(type, static_cast<std::int64_t>(w.size()), stored.data(), w.data());
    for (const std::int64_t rows : {1, 7, 15, 300}) {
      const std::vector<float> a = random_floats(rows * inner, 6);
      std::vector<float> c(rows * cols, NAN);
      host::Arena size;
      host::matmul_scratch(size);
      std::vector<std::byte> scratch(size.used());
      host::matmul({scratch.data(), scratch.size()}, type, rows, inner, cols, a.data(), stored.data(), c.data());
      double worst = 0;
      for (std::int64_t i = 0; i < rows; ++i) {
        for (std::int64_t j = 0; j < cols; ++j) {
          double exact = 0;
          for (std::int64_t k = 0; k < inner; ++k) exact += static_cast<double>(a[i * inner + k]) * w[k * cols + j];
          worst = std::max(worst, std::abs(exact - c[i * cols + j]));
        }
      }
      CHECK(worst < 5e-5);  // sums of order 12, 150 roundings of 6e-8 each, partly cancelling
    }
  }
}

TEST_CASE("host memory starts as NaN and is accounted; a build without CUDA refuses the CUDA backend") {
  const Backend backend = open_backend(BackendKind::host, 0);
  MemoryAccount account;
  {
    Buffer a(*backend.device, account, MemoryKind::caches, 1000);
    Buffer b = std::move(a);
    CHECK(std::isnan(b.as<float>()[17]));
    CHECK(reinterpret_cast<std::uintptr_t>(b.data()) % 256 == 0);
    CHECK(a.data() == nullptr);
    CHECK(account.used[static_cast<int>(MemoryKind::caches)] == 1000);
  }
  CHECK(account.total == 0);
  CHECK(account.total_peak == 1000);
  try {
    backend.device->allocate(std::size_t{1} << 60);
    FAIL("2^60 bytes were allocated");
  } catch (const UserError& e) {
    CHECK(e.code() == ExitCode::device);
  }
  CHECK(backend.device->info().units >= 1);
  if (!cuda_built()) CHECK_THROWS_AS(open_backend(BackendKind::cuda, 0), UserError);
}

// One warp of eight for 16 tiles of the window would end long after the others: 32 x 64K takes 103.9 us with it.
TEST_CASE("warps of a fused decode step are divided between window and chosen blocks", "[kernels]") {
  CHECK(nsa::gpu::window_warps(8, 1, 16, 32, true) == 2);
  CHECK(nsa::gpu::window_warps(16, 2, 16, 32, true) == 3);
  CHECK(nsa::gpu::window_warps(16, 2, 16, 64, true) == 3);  // blocks of 128: two would have 8 tiles each, the others 8
  CHECK(nsa::gpu::window_warps(128, 16, 16, 32, false) == 18);  // a window may touch 18 tiles
  CHECK(nsa::gpu::window_warps(4, 1, 1, 512, true) == 1);
  CHECK(nsa::gpu::window_warps(16, 8, 512, 1, false) == 8);  // a warp of each CTA scores
  CHECK(nsa::gpu::window_warps(8, 1, 16, 0, true) == 8);
}
