// The host stages other than attention: project, append, compress, output, combine, rows of caches and counters.

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "catch.hpp"
#include "kernels/host/runtime/host.hpp"
#include "kernels/host/simd/loops.hpp"
#include "kernels/shared/random.hpp"

using namespace nsa;

namespace {

const KernelTable& table() { return host_kernels(); }

/// Synthetic values in storage type, and as read back; or room for an output.
struct Tensor {
  Tensor() = default;
  Tensor(DType type, const char* name, std::int64_t n, float scale = 1.0f) : bytes(n * size_of(type)), values(n) {
    for (std::int64_t i = 0; i < n; ++i)
      values[i] = scale * synthetic_value(tensor_key(7, name), 0, static_cast<std::uint64_t>(i), 0);
    host::store(type, n, values.data(), bytes.data());
    host::load(type, n, bytes.data(), values.data());
  }
  Tensor(DType type, std::int64_t n) : bytes(n * size_of(type), std::byte{0xFF}), values(n) {}
  const std::vector<float>& read(DType type) {
    host::load(type, static_cast<std::int64_t>(values.size()), bytes.data(), values.data());
    return values;
  }
  std::vector<std::byte> bytes;
  std::vector<float> values;
};

LayerShape shape_of(DType type) {
  LayerShape s;
  s.groups = 2;
  s.heads_per_group = 3;
  s.d_k = 24;
  s.d_v = 40;
  s.dim = 50;
  s.dtype = type;
  s.rules = {.l = 8, .d = 4, .l_sel = 16, .n_sel = 5, .n_init = 1, .n_local = 2, .w = 21};
  s.lse.segment = 8;
  return s;
}

/// Half a unit in the last place of storage, relative; for fp32 the rounding of sums of order 1.
double bound(DType type) { return type == DType::f32 ? 1e-5 : type == DType::bf16 ? 0x1p-8 : 0x1p-11; }

}  // namespace

namespace {

/// project() on two sequences at a position where fp32 angles would be off by 0.06, and its inputs and outputs.
struct ProjectCase {
  ProjectCase(DType type, bool shared, std::int32_t tokens)
      : s(shape_of(type)), tile{0, 2, tokens, &first, first + tokens}, rows(tile.rows()) {
    s.shared_kv = shared;
    s.gate = shared ? GateKind::sigmoid : GateKind::softmax;
    cols = qkv_columns(s);
    x = Tensor(type, "x", rows * s.dim);
    w = Tensor(type, "w", s.dim * cols, 0.15f);
    args.shape = s;
    args.tile = tile;
    args.weights.w_qkv = w.bytes.data();
    args.weights.gate_w1 = w1.values.data();
    args.weights.gate_b1 = b1.values.data();
    args.weights.gate_w2 = w2.values.data();
    args.weights.gate_b2 = b2.values.data();
    args.x = x.bytes.data();
    q = Tensor(type, rows * s.heads() * s.d_k);
    k.assign(3, Tensor(type, rows * s.groups * s.d_k));
    v.assign(3, Tensor(type, rows * s.groups * s.d_v));
    gate.resize(rows * s.groups * 3);
    args.q = q.bytes.data();
    for (int c = 0; c < branches; ++c) {
      args.k[c] = k[c].bytes.data();
      args.v[c] = v[c].bytes.data();
    }
    args.gate = gate.data();
    scratch.resize(table().scratch_bytes(s, tile, {}));
    args.scratch = scratch.data();
    args.scratch_bytes = scratch.size();
  }
  double product(std::int64_t row, std::int64_t column) const {
    double sum = 0;
    for (int e = 0; e < s.dim; ++e) sum += double{x.values[row * s.dim + e]} * w.values[e * cols + column];
    return sum;
  }
  LayerShape s;
  std::int64_t first = 1'000'003;
  QueryTile tile;
  std::int64_t rows, cols = 0;
  Tensor x, w, w1{DType::f32, "w1", s.d_k*s.d_k / 2, 0.3f}, b1{DType::f32, "b1", s.d_k / 2},
      w2{DType::f32, "w2", s.d_k / 2 * 3}, b2{DType::f32, "b2", 3};
  Tensor q;
  std::vector<Tensor> k, v;
  std::vector<float> gate;
  std::vector<std::byte> scratch;
  ProjectArgs args;
};

/// Heads that project wrote from the columns [column0, column0 + heads * width) of w_qkv.
void check_heads(const ProjectCase& c, Tensor& got, std::int64_t column0, std::int64_t heads, std::int32_t width,
                 bool rotate) {
  const DType type = c.s.dtype;
  const std::vector<float>& values = got.read(type);
  for (std::int64_t row = 0; row < c.rows; ++row) {
    for (std::int64_t i = 0; i < heads * width; i += 2) {
      double a = c.product(row, column0 + i), b = c.product(row, column0 + i + 1);
      if (rotate) {
        const double angle =
            static_cast<double>(c.first + row % c.tile.tokens) * std::pow(c.s.rope_base, -double(i % width) / width);
        const double a2 = a * std::cos(angle) - b * std::sin(angle);
        b = a * std::sin(angle) + b * std::cos(angle);
        a = a2;
      }
      CHECK(values[row * heads * width + i] == Approx(a).margin(3 * bound(type)));  // values up to 3
      CHECK(values[row * heads * width + i + 1] == Approx(b).margin(3 * bound(type)));
    }
  }
}

/// Gates from the stored q, which check_heads has read.
void check_gates(const ProjectCase& c) {
  const LayerShape& s = c.s;
  for (std::int64_t rg = 0; rg < c.rows * s.groups; ++rg) {
    double z[3], sum = 0;
    for (int i = 0; i < 3; ++i) z[i] = c.b2.values[i];
    for (int i = 0; i < s.d_k / 2; ++i) {
      double hidden = c.b1.values[i];
      for (int e = 0; e < s.d_k; ++e)
        for (int j = 0; j < s.heads_per_group; ++j)
          hidden += c.q.values[(rg * s.heads_per_group + j) * s.d_k + e] / s.heads_per_group *
                    double{c.w1.values[e * s.d_k / 2 + i]};
      for (int n = 0; n < 3; ++n) z[n] += hidden / (1 + std::exp(-hidden)) * c.w2.values[i * 3 + n];
    }
    for (double logit : z) sum += std::exp(logit);
    for (int n = 0; n < 3; ++n)
      CHECK(c.gate[rg * 3 + n] == Approx(s.shared_kv ? 1 / (1 + std::exp(-z[n])) : std::exp(z[n]) / sum).margin(1e-5));
  }
}

}  // namespace

TEST_CASE("project rotates q and k, does not rotate v, and forms the gates") {
  for (const DType type : {DType::f32, DType::bf16}) {
    for (const bool shared : {false, true}) {
      for (const std::int32_t tokens : {1, 9}) {
        ProjectCase c(type, shared, tokens);
        const LayerShape& s = c.s;
        table().project(c.args, nullptr);
        check_heads(c, c.q, 0, s.heads(), s.d_k, true);
        std::int64_t column = s.heads() * s.d_k;
        for (int b = 0; b < (shared ? 1 : branches); ++b) {
          check_heads(c, c.k[kv_column_order[b]], column, s.groups, s.d_k, true);
          check_heads(c, c.v[kv_column_order[b]], column + s.groups * s.d_k, s.groups, s.d_v, false);
          column += s.groups * (s.d_k + s.d_v);
        }
        check_gates(c);
        c.args.force_branch = win;
        table().project(c.args, nullptr);
        for (std::size_t i = 0; i < c.gate.size(); ++i) CHECK(c.gate[i] == (i % 3 == win ? 1.0f : 0.0f));
      }
    }
  }
}

TEST_CASE("append writes only rows that the cache holds; a ring keeps the last rows") {
  const LayerShape s = shape_of(DType::f32);
  const std::int64_t first = 30;
  const QueryTile tile{1, 1, 9, &first, 64};
  const Tensor k(DType::f32, "k", tile.rows() * s.groups * s.d_k), v(DType::f32, "v", tile.rows() * s.groups * s.d_v);
  for (const RowMap map : {RowMap{.chunk = 32, .stride = 32, .kv = 2, .rank = 1}, RowMap{.ring = 5}}) {
    std::vector<float> k_cache(4 * 40 * s.d_k, -9.0f), v_cache(4 * 40 * s.d_v, -9.0f);
    const KvView ks{k_cache.data(), map, 40 * s.d_k, 0, s.d_k}, vs{v_cache.data(), map, 40 * s.d_v, 0, s.d_v};
    table().append({{s, tile}, k.bytes.data(), v.bytes.data(), ks, vs}, nullptr);
    std::int64_t written = 0;
    for (std::int64_t j = 0; j < 9; ++j) {
      const std::int64_t t = first + j;
      if (map.ring > 0 ? j < 4 : t < 32) continue;
      for (std::int32_t g = 0; g < s.groups; ++g) {
        const float* row = v_cache.data() + offset_of(vs, s.groups + g, t);
        for (int e = 0; e < s.d_v; ++e) CHECK(row[e] == v.values[(j * s.groups + g) * s.d_v + e]);
        ++written;
      }
    }
    CHECK(std::count(v_cache.begin(), v_cache.end(), -9.0f) ==
          static_cast<std::ptrdiff_t>(v_cache.size()) - written * s.d_v);
  }
}

namespace {

/// Compressed token i of V in float64. `weights`: pos, w1 and w2 of V.
std::vector<double> compressed_value(const LayerShape& s, const Tensor& raw, const Tensor* weights,
                                     std::int64_t first_row) {
  const std::int32_t l = s.rules.l, units = s.phi_hidden;
  std::vector<double> hidden(units, 0.0), value(s.d_v, 0.0);
  for (int m = 0; m < l; ++m) {
    for (int e = 0; e < s.d_v; ++e) {
      const double x = raw.values[(first_row + m) * s.d_v + e];
      if (s.phi == PhiKind::mean) value[e] += x / l;
      for (int u = 0; u < units && s.phi == PhiKind::mlp; ++u)
        hidden[u] += (x + weights[0].values[m * s.d_v + e]) * weights[1].values[(m * s.d_v + e) * units + u];
    }
  }
  for (int u = 0; u < units; ++u)
    for (int e = 0; e < s.d_v; ++e)
      value[e] += hidden[u] / (1 + std::exp(-hidden[u])) * weights[2].values[u * s.d_v + e];
  return value;
}

}  // namespace

TEST_CASE("compressed tokens: mean and learned, one position or a sequence, with halo copies") {
  for (const DType type : {DType::f32, DType::bf16}) {
    for (const PhiKind phi : {PhiKind::mean, PhiKind::mlp}) {
      LayerShape s = shape_of(type);
      s.phi = phi;
      s.phi_hidden = 30;
      const std::int64_t positions = 75, tokens = compressed_tokens(s.rules, positions - 1);
      const std::int32_t l = s.rules.l, batch = 2;
      Tensor raw_k(type, "k", batch * s.groups * positions * s.d_k),
          raw_v(type, "v", batch * s.groups * positions * s.d_v);
      std::vector<Tensor> weights;  // pos, w1, w2 for K and V
      for (const std::int32_t d : {s.d_k, s.d_v})
        for (const std::int64_t n : {l * d, l * d * 30, 30 * d})
          weights.emplace_back(type, n == 30 * d ? "w2" : n == l * d ? "pos" : "w1", n, n == l * d ? 1.0f : 0.1f);
      CompressArgs args;
      args.shape = s;
      args.phi_k = {weights[0].bytes.data(), weights[1].bytes.data(), weights[2].bytes.data()};
      args.phi_v = {weights[3].bytes.data(), weights[4].bytes.data(), weights[5].bytes.data()};
      args.k_raw = {raw_k.bytes.data(), {}, positions * s.d_k, 0, s.d_k};
      args.v_raw = {raw_v.bytes.data(), {}, positions * s.d_v, 0, s.d_v};
      const std::int64_t plane_rows = 2 * (s.lse.segment + 1);
      Tensor k(type, batch * s.groups * plane_rows * s.d_k), v(type, batch * s.groups * plane_rows * s.d_v);
      // Rank 1 of 2: chunk 1 (tokens 8..15) with a copy of token 7 in front; chunks 3.. do not complete.
      const RowMap map{.chunk = s.lse.segment, .stride = s.lse.segment + 1, .halo = 1, .kv = 2, .rank = 1};
      args.k_cmp = {k.bytes.data(), map, plane_rows * s.d_k, 0, s.d_k};
      args.v_cmp = {v.bytes.data(), map, plane_rows * s.d_v, 0, s.d_v};
      args.fill_halo = true;
      for (const bool stepwise : {false, true}) {
        std::fill(v.bytes.begin(), v.bytes.end(), std::byte{0xFF});
        for (std::int64_t first = 0; first < positions; first += stepwise ? 1 : positions) {
          args.tile = {0, batch, static_cast<std::int32_t>(stepwise ? 1 : positions), &first, positions};
          std::vector<std::byte> scratch(table().scratch_bytes(s, args.tile, {}));
          args.scratch = scratch.data();
          args.scratch_bytes = scratch.size();
          table().compress(args, nullptr);
        }
        v.read(type);
        for (std::int64_t plane = 0; plane < batch * s.groups; ++plane) {
          for (std::int64_t i = 7; i < std::min<std::int64_t>(16, tokens); ++i) {
            const float* got = v.values.data() + offset_in_chunk(args.v_cmp, plane, 1, i);
            const std::vector<double> expected =
                compressed_value(s, raw_v, &weights[3], plane * positions + i * s.rules.d);
            for (int e = 0; e < s.d_v; ++e) CHECK(got[e] == Approx(expected[e]).margin(4 * bound(type)));  // up to 4
          }
          CHECK(std::isnan(v.values[plane * plane_rows * s.d_v + (s.lse.segment + 1) * s.d_v]));  // chunk 3 unwritten
        }
      }
    }
  }
}

TEST_CASE("combine multiplies normalised branches with their gates; an empty branch is zero") {
  const LayerShape s = shape_of(DType::f32);
  const std::int64_t position = 0;
  const QueryTile tile{0, 1, 1, &position, 1};
  const float inf = std::numeric_limits<float>::infinity();
  std::vector<float> partials(2 * partial_floats(s, 1), 0.0f);
  for (int rank = 0; rank < 2; ++rank) {
    for (int c = 0; c < branches; ++c) {
      const Partials p = partials_at(partials.data() + rank * partial_floats(s, 1), s, 1, static_cast<Branch>(c));
      for (int h = 0; h < s.heads(); ++h) {
        p.ms[2 * h] = c == cmp ? -inf : static_cast<float>(rank);
        p.ms[2 * h + 1] = c == cmp ? 0.0f : 2.0f;
        for (int e = 0; e < s.d_v; ++e) p.o[h * s.d_v + e] = c == cmp ? 0.0f : static_cast<float>(c + rank + e);
      }
    }
  }
  const std::vector<float> gate = {0.5f, 0.25f, 2.0f, 0.5f, 0.25f, 2.0f};
  std::vector<float> o(s.heads() * s.d_v);
  CombineArgs args{{s, tile}};
  args.partials = partials.data();
  args.ranks = 2;
  args.gate = gate.data();
  args.o = o.data();
  const auto branch = [](int c, int e) { return (c + e + std::exp(1.0) * (c + 1 + e)) / (2 + 2 * std::exp(1.0)); };
  table().combine(args, nullptr);
  for (int e = 0; e < s.d_v; ++e) CHECK(o[e] == Approx(0.25 * branch(sel, e) + 2.0 * branch(win, e)).epsilon(1e-6));
  args.leave_out[win] = true;
  table().combine(args, nullptr);
  for (int e = 0; e < s.d_v; ++e) CHECK(o[s.d_v + e] == Approx(0.25 * branch(sel, e)).epsilon(1e-6));
}

TEST_CASE("output, rmsnorm and add") {
  for (const std::int64_t rows : {1, 20}) {
    const LayerShape s = shape_of(DType::bf16);
    const std::int64_t inner = s.heads() * s.d_v, zero = 0;
    const Tensor o(s.dtype, "o", rows * inner), w(s.dtype, "w_o", inner * s.dim, 0.1f);
    std::vector<float> y(rows * s.dim);
    const QueryTile tile{0, 1, static_cast<std::int32_t>(rows), &zero, rows};
    std::vector<std::byte> scratch(table().scratch_bytes(s, tile, {}));
    const auto output = [&](HeadRange heads, const void* o_of_heads, std::vector<float>& to) {
      table().output({{s, tile, {}, scratch.data(), scratch.size()}, heads, o_of_heads, w.bytes.data(), to.data()},
                     nullptr);
    };
    output({0, s.heads()}, o.bytes.data(), y);
    Tensor normal(s.dtype, rows * s.dim);
    table().rmsnorm(s, rows, y.data(), normal.bytes.data(), true, nullptr);
    normal.read(s.dtype);
    for (std::int64_t r = 0; r < rows; ++r) {
      double square = 0;
      for (int j = 0; j < s.dim; ++j) {
        double exact = 0;
        for (std::int64_t i = 0; i < inner; ++i) exact += double{o.values[r * inner + i]} * w.values[i * s.dim + j];
        CHECK(y[r * s.dim + j] == Approx(exact).margin(1e-5));
        square += exact * exact / s.dim;
      }
      for (int j = 0; j < s.dim; ++j)
        CHECK(normal.values[r * s.dim + j] == Approx(y[r * s.dim + j] / std::sqrt(square + 1e-6)).margin(4 * 0x1p-9));
    }
    std::vector<float> sum(y.size());
    for (int rank = 0; rank < 3; ++rank) {  // y is the sum over the ranks that finish its heads
      const HeadRange heads = finished_heads(s, 3, rank);
      const std::int64_t row_bytes = s.d_v * 2 * heads.count;
      std::vector<std::byte> part(rows * row_bytes);
      for (std::int64_t r = 0; r < rows; ++r)
        std::memcpy(part.data() + r * row_bytes, o.bytes.data() + (r * inner + heads.first * s.d_v) * 2, row_bytes);
      std::vector<float> y_part(y.size());
      output(heads, part.data(), y_part);
      for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += y_part[i];
    }
    for (std::size_t i = 0; i < sum.size(); ++i) CHECK(sum[i] == Approx(y[i]).margin(1e-5));
    std::vector<float> x(y.size(), 1.0f);
    table().add(static_cast<std::int64_t>(x.size()), x.data(), y.data(), nullptr);
    CHECK(x[3] == 1.0f + y[3]);
  }
}

TEST_CASE("copy_rows and fill_rows give the same rows on every map, halos included") {
  const std::int64_t rows = 45;
  const RowMap local{.chunk = 8, .stride = 10, .halo = 2, .kv = 2, .rank = 1};
  std::vector<float> whole(2 * rows * 3), local_rows(2 * 30 * 3, -1.0f), copied(2 * 30 * 3, -1.0f),
      ring(2 * 7 * 3, -1.0f);
  const KvView src{whole.data(), {}, rows * 3, 0, 3}, dst{local_rows.data(), local, 90, 0, 3},
      dst2{copied.data(), local, 90, 0, 3};
  const KvView last{ring.data(), {.ring = 7}, 21, 0, 3};
  const FillRowsArgs fill{DType::f32, src, 1, 2, 4, 0, rows, 99, 0.5f};
  table().fill_rows(fill, nullptr);
  CHECK(whole[rows * 3 + 7 * 3 + 1] == 0.5f * synthetic_value(99, 0, 7, 5 * 3 + 1));
  FillRowsArgs fill_local = fill;
  fill_local.dst = dst;
  table().fill_rows(fill_local, nullptr);
  table().copy_rows({DType::f32, src, dst2, 2, 0, rows, -2, 8}, nullptr);
  CHECK(local_rows == copied);
  for (std::int64_t i = 6; i < 16; ++i) CHECK(local_rows[offset_in_chunk(dst, 1, 1, i)] == whole[offset_of(src, 1, i)]);
  CHECK(std::count(local_rows.begin(), local_rows.end(), -1.0f) == 2 * 3 * (30 - 10 - 10 - 7));  // chunk 5: 38..44
  table().copy_rows({DType::f32, src, last, 2, 0, rows, 0, INT64_MAX}, nullptr);
  for (std::int64_t i = rows - 7; i < rows; ++i) CHECK(ring[21 + i % 7 * 3] == whole[offset_of(src, 1, i)]);
  // From a gathered buffer, rank after rank, back to the whole sequence.
  std::vector<float> gathered(2 * 2 * 24 * 3), back(2 * rows * 3, -1.0f);
  const KvView all{gathered.data(), {.chunk = 8, .stride = 8, .kv = 2}, 24 * 3, 2 * 24 * 3, 3};
  const KvView again{back.data(), {}, rows * 3, 0, 3};
  table().copy_rows({DType::f32, src, all, 2, 0, rows, 0, 8}, nullptr);
  table().copy_rows({DType::f32, all, again, 2, 0, rows, 0, INT64_MAX}, nullptr);
  CHECK(back == whole);
}

// Sequences at positions 30, 6 and 7 of caches of 40 rows: each appends at its own and completes its own token.
TEST_CASE("append and compress of a ragged batch follow the position of each sequence") {
  const LayerShape s = shape_of(DType::f32);
  const std::int64_t positions[] = {31, 6, 7};
  const QueryTile tile{0, 3, 1, positions, 40, 1};
  const std::int64_t planes = 3 * s.groups;
  const Tensor k(DType::f32, "k", planes * s.d_k), v(DType::f32, "v", planes * s.d_v),
      raw_k(DType::f32, "raw k", planes * 40 * s.d_k), raw_v(DType::f32, "raw v", planes * 40 * s.d_v);
  std::vector<float> k_cache(planes * 40 * s.d_k, -9.0f), v_cache(planes * 40 * s.d_v, -9.0f), k_cmp = k_cache,
                                                                                               v_cmp = v_cache;
  const auto view = [](const void* data, std::int32_t width) {
    return KvView{const_cast<void*>(data), {}, 40 * std::int64_t{width}, 0, width};
  };
  table().append({{s, tile}, k.bytes.data(), v.bytes.data(), view(k_cache.data(), s.d_k), view(v_cache.data(), s.d_v)},
                 nullptr);
  std::vector<std::byte> scratch(table().scratch_bytes(s, tile, {}));
  CompressArgs compress{{s, tile, {}, scratch.data(), scratch.size()}};
  compress.k_raw = view(raw_k.bytes.data(), s.d_k), compress.v_raw = view(raw_v.bytes.data(), s.d_v);
  compress.k_cmp = view(k_cmp.data(), s.d_k), compress.v_cmp = view(v_cmp.data(), s.d_v);
  table().compress(compress, nullptr);
  const std::int64_t completes[] = {6, -1, 0};  // token i ends at position 4 i + 7
  for (std::int64_t plane = 0; plane < planes; ++plane) {
    const std::int64_t b = plane / s.groups, i = completes[b];
    CHECK(v_cache[(plane * 40 + positions[b]) * s.d_v] == v.values[plane * s.d_v]);
    CHECK(std::count(&v_cache[plane * 40 * s.d_v], &v_cache[0] + (plane + 1) * 40 * s.d_v, -9.0f) == 39 * s.d_v);
    CHECK(std::count(&v_cmp[plane * 40 * s.d_v], &v_cmp[0] + (plane + 1) * 40 * s.d_v, -9.0f) ==
          (i < 0 ? 40 : 39) * s.d_v);
    if (i < 0) continue;
    double mean = 0;
    for (std::int64_t m = 0; m < s.rules.l; ++m) mean += raw_v.values[(plane * 40 + i * s.rules.d + m) * s.d_v] / 8;
    CHECK(v_cmp[(plane * 40 + i) * s.d_v] == Approx(mean));
  }
}

TEST_CASE("advance moves every sequence of a ragged batch on") {
  std::int64_t positions[] = {10, 3, 70}, step = 0;
  AdvanceArgs args;
  args.position = positions, args.positions = 3, args.step = &step;
  table().advance(args, nullptr);
  CHECK(std::vector(positions, positions + 3) == std::vector<std::int64_t>{11, 4, 71});
}

TEST_CASE("advance logs the counters of a step and increments position and step") {
  std::int64_t position = 10, step = 0, reads[2] = {3, 4}, log[4] = {-1, -1, -1, -1};
  std::int32_t selected[2] = {5, 6}, selected_log[4] = {};
  const AdvanceArgs args{&position, &step, reads, log, 2, 2, selected, selected_log, 2};
  table().advance(args, nullptr);
  CHECK(position == 11);
  CHECK(step == 1);
  CHECK(reads[0] == 0);
  reads[0] = 8;
  table().advance(args, nullptr);
  table().advance(args, nullptr);  // past the log: not logged
  CHECK(step == 3);
  CHECK(log[0] == 3);
  CHECK(log[1] == 4);
  CHECK(log[2] == 8);
  CHECK(selected_log[3] == 6);
}
