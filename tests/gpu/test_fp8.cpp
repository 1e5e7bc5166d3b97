// FP8 caches: the bits of stored rows against the host, and the fused decode step on FP8 rows against the same values
// in bf16 rows.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "catch.hpp"
#include "gpu/mirrored.hpp"
#include "gpu/whole_decode.hpp"

using namespace nsa;
using namespace nsa::test;

namespace {

struct Result {
  std::vector<float> o;
  std::vector<std::int32_t> selected;
  std::vector<std::int64_t> reads;
  explicit Result(const WholeDecode& whole) {
    const LayerShape& s = whole.s;
    const std::int64_t rows = whole.tile.rows();
    gpu().device->fill(whole.o, 0xFF, static_cast<std::size_t>(whole.o_bytes()), whole.stream);
    gpu().device->fill(whole.scratch, 0xFF, whole.scratch_bytes, whole.stream);
    gpu().device->fill(whole.scores, 0xFF, whole.score_bytes, whole.stream);
    gpu().device->fill(whole.reads, 0, static_cast<std::size_t>(branches * rows * s.groups * 8), whole.stream);
    whole.run_fused(whole.sets[0]);
    const auto bytes = download<std::byte>(whole, whole.o, whole.o_bytes());
    for (std::int64_t i = 0; i < rows * s.heads() * s.d_v; ++i) o.push_back(value_at(s.dtype, bytes.data(), i));
    selected = download<std::int32_t>(whole, whole.selected, rows * s.groups * s.rules.n_sel);
    reads = download<std::int64_t>(whole, whole.reads, branches * rows * s.groups);
  }
};

/// The error of softmax weights that are rounded to bf16 (8 bits) on one side, and of the rounding of o, relative to
/// the largest |o| of a sum of many.
constexpr double bound = 1e-2;

/// Rows of a view on both sides: E4M3 bits, then scales.
struct Rows {
  MirroredBuffer memory;
  KvView view;
  Rows(std::int64_t planes, std::int64_t rows, int width, std::int64_t ring = 0)
      : memory(planes * (rows * width + scales_of_plane(rows))) {
    view.width = width, view.plane_stride = rows * width;
    view.map.ring = ring;
    memory.clear();
  }
  KvView on(const Backend& backend, std::int64_t planes) const {
    KvView v = view;
    v.data = memory.on(backend);
    v.scales = static_cast<std::uint8_t*>(v.data) + planes * v.plane_stride;
    return v;
  }
};

template <class Run>
void check_same_bits(const Rows& rows, Run run) {
  for (const Backend* backend : {&cpu(), &gpu()}) run(*backend);
  const auto device = rows.memory.from_gpu<std::uint8_t>();
  CHECK(std::memcmp(device.data(), rows.memory.host<std::uint8_t>(), device.size()) == 0);
}

}  // namespace

TEST_CASE("the GPU stores FP8 rows with the bits of the host", "[fp8]") {
  constexpr std::int64_t planes = 2, rows = 37;
  for (const float scale : {1.0f, 1e-30f, 1e-38f, 3e6f, 5e37f})
    for (const int width : {24, 128}) {
      CAPTURE(scale, width);
      const Rows filled(planes, rows, width);
      check_same_bits(filled, [&](const Backend& b) {
        b.kernels->fill_rows({DType::bf16, filled.on(b, planes), 1, planes, 0, 0, rows, tensor_key(1, "k"), scale},
                             nullptr);
        b.device->synchronize(nullptr);
      });
      // Rows with a huge value, zeros, subnormals, NaN and infinities, appended.
      MirroredBuffer given(rows * planes * width * 2);
      auto* x = given.host<Bf16>();
      for (std::int64_t i = 0; i < rows * planes * width; ++i)
        x[i] = from_float<Bf16>(scale * synthetic_value(tensor_key(2, "x"), 0, static_cast<std::uint64_t>(i), 0));
      x[0] = from_float<Bf16>(3e38f), x[width] = {0x7F80}, x[2 * width + 1] = {0xFFC0}, x[3 * width + 2] = {0xFF80};
      std::fill_n(x + 4 * width, width, Bf16{0}), x[4 * width + 3] = {0x8000}, x[5 * width] = {0x0001};
      given.to_gpu();
      for (const std::int64_t ring : {std::int64_t{0}, std::int64_t{16}}) {
        const Rows k(planes, rows, width, ring), v(planes, rows, width, ring);
        MirroredBuffer first(8);
        first.clear();
        LayerShape s;
        s.groups = planes, s.d_k = s.d_v = width, s.dtype = DType::bf16;
        check_same_bits(k, [&](const Backend& b) {
          AppendArgs a{{s, {0, 1, rows, first.on<std::int64_t>(b), rows}}};
          a.k = a.v = given.on(b);
          a.k_cache = k.on(b, planes), a.v_cache = v.on(b, planes);
          b.kernels->append(a, nullptr);
          b.device->synchronize(nullptr);
        });
        const Rows copy(planes, rows, width);
        if (ring == 0)
          check_same_bits(copy, [&](const Backend& b) {
            b.kernels->copy_rows({DType::bf16, k.on(b, planes), copy.on(b, planes), planes, 3, rows, 0, rows}, nullptr);
            b.device->synchronize(nullptr);
          });
      }
    }
}

TEST_CASE("a decode step on FP8 rows is the step on their values in bf16", "[fp8]") {
  const struct {
    int heads, batch;
    std::int64_t context;
  } cases[] = {{16, 1, 1},      {16, 1, 63},   {16, 2, 700},   {4, 3, 2048}, {16, 1, 65536},  // CTAs of 8 warps
               {16, 40, 12000}, {8, 40, 3000}, {16, 132, 1500}};                              // of 12 and of 4
  for (const auto& c : cases) {
    CAPTURE(c.heads, c.batch, c.context);
    const WholeDecode fp8(gpu(), fp8_shape_of(c.heads), c.batch, c.context, 1),
        rounded(gpu(), fp8_shape_of(c.heads, KvPrecision::fp8_rounded), c.batch, c.context, 1);
    const Result got(fp8), expected(rounded);
    CHECK(got.reads == expected.reads);
    CHECK(got.selected == expected.selected);
    double largest = 0, scale = 0;
    for (std::size_t i = 0; i < got.o.size(); ++i) {
      const double error = std::abs(double{got.o[i]} - expected.o[i]);
      largest = std::max(largest, std::isnan(error) ? INFINITY : error);
      scale = std::max(scale, std::abs(double{expected.o[i]}));
    }
    CHECK(scale > 0.01);
    CHECK(largest <= bound * scale);
  }
}

// One row of the values of every plane, far above the others or not finite.
TEST_CASE("FP8 rows with huge values, NaN and infinities act as in bf16", "[fp8]") {
  const auto fill = [](const WholeDecode& whole, const KvView& view, float scale) {
    const auto planes = static_cast<std::int32_t>(whole.tile.rows() * whole.s.groups);
    gpu().kernels->fill_rows({whole.s.dtype, view, planes, 1, 0, 5, 6, tensor_key(3, "row"), scale}, nullptr);
    gpu().device->synchronize(nullptr);
  };
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  for (const Branch c : {cmp, sel, win})
    for (const auto& [value, scale] :
         {std::pair{true, 1e4f}, {true, 1e-30f}, {true, nan}, {true, inf}, {false, 1e4f}}) {
      CAPTURE(static_cast<int>(c), value, scale);
      const WholeDecode fp8(gpu(), fp8_shape_of(16), 2, 3000, 1),
          rounded(gpu(), fp8_shape_of(16, KvPrecision::fp8_rounded), 2, 3000, 1);
      for (const WholeDecode* whole : {&fp8, &rounded})
        fill(*whole, value ? whole->sets[0].v[c] : whole->sets[0].k[c], scale);
      const Result got(fp8), expected(rounded);
      CHECK(got.selected == expected.selected);
      double largest = 0, magnitude = 0;
      bool same_nan = true;
      for (std::size_t i = 0; i < got.o.size(); ++i) {
        same_nan &= std::isnan(got.o[i]) == std::isnan(expected.o[i]) && std::isnan(got.o[i]) == !std::isfinite(scale);
        largest = std::max(largest, std::abs(double{got.o[i]} - expected.o[i]));
        magnitude = std::max(magnitude, std::abs(double{expected.o[i]}));
      }
      CHECK(same_nan);
      CHECK(largest <= bound * magnitude);
    }
}
