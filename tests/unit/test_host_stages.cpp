// Attention, rank, select and combine of the host backend against float64, on one rank and on the ranks of a kv layout,
// which run one after the other in this process.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "catch.hpp"
#include "kernels/host/runtime/host.hpp"
#include "kernels/host/simd/loops.hpp"
#include "kernels/shared/random.hpp"

using namespace nsa;

namespace {

const KernelTable& table() { return host_kernels(); }

constexpr float unset = std::numeric_limits<float>::quiet_NaN();

LayerShape small_shape() {
  LayerShape s;
  s.groups = 2;
  s.heads_per_group = 3;
  s.d_k = 24;
  s.d_v = 40;
  s.dim = 48;
  s.rules = {.l = 8, .d = 4, .l_sel = 16, .n_sel = 5, .n_init = 1, .n_local = 2, .w = 21};
  s.lse.segment = 8;  // chunks of two blocks
  return s;
}

std::vector<std::byte> scratch_for(const LayerShape& s, const QueryTile& tile) {
  return std::vector<std::byte>(table().scratch_bytes(s, tile));
}

/// `n` synthetic values in storage type, as bytes and as read back.
struct Tensor {
  Tensor(DType type, const char* name, std::int64_t n, float scale = 1.0f) : bytes(n * size_of(type)), values(n) {
    for (std::int64_t i = 0; i < n; ++i)
      values[i] = scale * synthetic_value(tensor_key(7, name), 0, static_cast<std::uint64_t>(i), 0);
    host::store(type, n, values.data(), bytes.data());
    host::load(type, n, bytes.data(), values.data());
  }
  std::vector<std::byte> bytes;
  std::vector<float> values;
};

/// A cache of one rank, filled with the same synthetic rows on every layout.
struct Cache {
  Cache(const LayerShape& s, const char* name, const RowMap& map, std::int32_t batch, std::int64_t rows,
        std::int64_t memory_rows, std::int32_t width)
      : bytes(batch * s.groups * memory_rows * width * size_of(s.dtype)) {
    view = {bytes.data(), map, memory_rows * width, 0, width};
    table().fill_rows({s.dtype, view, batch, s.groups, 0, 0, rows, tensor_key(3, name), 1.0f}, nullptr);
  }
  std::vector<std::byte> bytes;
  KvView view;
};

/// A row that fill_rows writes, in storage precision. Formed once a name and type.
const float* cache_row(const LayerShape& s, const char* name, std::int64_t plane, std::int64_t row,
                       std::int32_t width) {
  constexpr std::int64_t planes = 6, rows = 400;
  static std::map<std::string, std::vector<float>> known;
  std::vector<float>& values = known[name_of(s.dtype) + std::string(name)];
  if (values.empty()) {
    for (std::int64_t i = 0; i < planes * rows * width; ++i) {
      const std::int64_t p = i / width / rows;
      const auto column = static_cast<std::uint32_t>(p % s.groups * width + i % width);
      const auto b = static_cast<std::uint32_t>(p / s.groups);
      values.push_back(synthetic_value(tensor_key(3, name), b, static_cast<std::uint64_t>(i / width % rows), column));
    }
    std::vector<std::byte> stored(values.size() * 4);
    host::store(s.dtype, static_cast<std::int64_t>(values.size()), values.data(), stored.data());
    host::load(s.dtype, static_cast<std::int64_t>(values.size()), stored.data(), values.data());
  }
  return values.data() + (plane * rows + row) * width;
}

/// All three branches, rank, select and combine of a tile on one rank.
struct Step {
  std::vector<float> partials, lse, p_slc, o_branch[branches];
  std::vector<Candidate> candidates;
  std::vector<std::int32_t> selected;
  std::vector<std::int64_t> reads;
  std::vector<std::byte> scores, o;
};

struct Layout {
  LayerShape shape;
  std::int32_t kv = 1, rank = 0, batch = 1;
  std::int64_t positions = 0;  ///< tokens in the caches

  RowMap map(std::int64_t chunk, std::int32_t halo) const {
    if (kv == 1) return {};
    return {.chunk = chunk, .stride = chunk + halo, .halo = halo, .kv = kv, .rank = rank};
  }
  RowMap tokens() const { return map(shape.lse.segment * shape.rules.d, 0); }
  RowMap compressed() const { return map(shape.lse.segment, shape.rules.l / shape.rules.d - 1); }
  RowMap window() const {
    if (kv == 1) return {};
    return {
        .ring = shape.rules.w, .slot_begin = rank * shape.rules.w / kv, .slot_end = (rank + 1) * shape.rules.w / kv};
  }
  std::int64_t memory_rows(const RowMap& m, std::int64_t rows) const {
    if (m.ring > 0) return m.ring;
    return kv == 1 ? rows : (rows / m.chunk / kv + 1) * m.stride;
  }
  Cache cache(const char* name, const RowMap& m, std::int64_t rows, std::int32_t width) const {
    return {shape, name, m, batch, rows, memory_rows(m, rows), width};
  }
};

struct LayoutResult {
  std::vector<Step> steps;  ///< by rank; each has the results after the exchanges
};

/// Runs all ranks of a layout stage by stage, exchanges included. q is [rows, H, Dk]; `route`: the sel implementation.
class LayoutRun {
 public:
  LayoutRun(const Layout& base, const QueryTile& tile, const void* q, const std::vector<float>& gate, int route)
      : base_(base), s_(base.shape), tile_(tile), q_(q), gate_(gate), route_(route), scratch_(scratch_for(s_, tile)) {
    result_.steps.resize(base.kv);
  }

  LayoutResult run() {
    for (std::int32_t r = 0; r < base_.kv; ++r) attend_cmp(r);
    for (std::int32_t r = 0; r < base_.kv; ++r) rank(r);
    for (std::int32_t r = 0; r < base_.kv; ++r) attend_selected_and_window(r);
    for (Step& step : result_.steps) combine(step);
    return std::move(result_);
  }

 private:
  Layout layout_of(std::int32_t rank) const {
    Layout layout = base_;
    layout.rank = rank;
    return layout;
  }

  void attend(Branch branch, int which, const Cache& k, const Cache& v, Step& step) {
    AttendArgs args;
    args.shape = s_;
    args.tile = tile_;
    args.q = q_;
    args.k = k.view;
    args.v = v.view;
    args.out = partials_at(step.partials.data(), s_, tile_.rows(), branch);
    args.reads = step.reads.data() + branch * tile_.batches * s_.groups;
    args.selected = step.selected.data();
    args.lse = step.lse.data();
    args.scores = step.scores.data();
    args.scratch = scratch_.data();
    args.scratch_bytes = scratch_.size();
    table().attend[branch][which].run(args, nullptr);
  }

  void attend_cmp(std::int32_t r) {
    const Layout layout = layout_of(r);
    const std::int64_t rows = tile_.rows(), n = compressed_tokens(s_.rules, base_.positions - 1);
    Step& step = result_.steps[r];
    step.partials.assign(partial_floats(s_, rows), unset);
    step.lse.assign(lse_slots(s_, base_.kv) * rows * s_.heads() * 2, unset);
    step.reads.assign(branches * tile_.batches * s_.groups, 0);
    step.selected.assign(rows * s_.groups * s_.rules.n_sel, -7);
    const Cache k = layout.cache("k_cmp", layout.compressed(), n, s_.d_k);
    const Cache v = layout.cache("v_cmp", layout.compressed(), n, s_.d_v);
    step.scores.assign(table().score_bytes(s_, tile_, layout.memory_rows(layout.compressed(), n)), std::byte{0xFF});
    attend(cmp, 0, k, v, step);
    lse_.insert(lse_.end(), step.lse.begin(), step.lse.end());
  }

  void rank(std::int32_t r) {
    const Layout layout = layout_of(r);
    const std::int64_t blocks = eligible_blocks(s_.rules, base_.positions - 1);
    Step& step = result_.steps[r];
    step.candidates.resize(tile_.rows() * s_.groups * s_.rules.n_sel);
    step.p_slc.assign(tile_.rows() * s_.groups * blocks, unset);
    RankArgs args;
    args.shape = s_;
    args.tile = tile_;
    args.scores = step.scores.data();
    args.lse = lse_.data();
    args.lse_ranks = base_.kv;
    args.cmp_map = layout.compressed();
    args.token_map = layout.tokens();
    args.candidates = base_.kv > 1 ? step.candidates.data() : nullptr;
    args.selected = base_.kv > 1 ? nullptr : step.selected.data();
    args.p_slc = step.p_slc.data();
    args.p_slc_blocks = blocks;
    args.scratch = scratch_.data();
    args.scratch_bytes = scratch_.size();
    table().rank(args, nullptr);
    candidates_.insert(candidates_.end(), step.candidates.begin(), step.candidates.end());
  }

  void attend_selected_and_window(std::int32_t r) {
    const Layout layout = layout_of(r);
    Step& step = result_.steps[r];
    if (base_.kv > 1) table().select({s_, tile_, candidates_.data(), base_.kv, step.selected.data()}, nullptr);
    attend(sel, route_, layout.cache("k_sel", layout.tokens(), base_.positions, s_.d_k),
           layout.cache("v_sel", layout.tokens(), base_.positions, s_.d_v), step);
    attend(win, 0, layout.cache("k_win", layout.window(), base_.positions, s_.d_k),
           layout.cache("v_win", layout.window(), base_.positions, s_.d_v), step);
    partials_.insert(partials_.end(), step.partials.begin(), step.partials.end());
  }

  void combine(Step& step) {
    const std::int64_t values = tile_.rows() * s_.heads() * s_.d_v;
    CombineArgs args{.shape = s_, .tile = tile_, .partials = partials_.data(), .ranks = base_.kv, .gate = gate_.data()};
    step.o.resize(values * size_of(s_.dtype));
    args.o = step.o.data();
    for (int c = 0; c < branches; ++c) {
      step.o_branch[c].assign(values, unset);
      args.o_branch[c] = step.o_branch[c].data();
    }
    table().combine(args, nullptr);
  }

  const Layout& base_;
  const LayerShape& s_;
  const QueryTile& tile_;
  const void* q_;
  const std::vector<float>& gate_;
  int route_;
  std::vector<std::byte> scratch_;
  LayoutResult result_;
  std::vector<float> lse_, partials_;  ///< gathered from all ranks
  std::vector<Candidate> candidates_;  ///< gathered from all ranks
};

LayoutResult run_layout(const Layout& base, const QueryTile& tile, const void* q, const std::vector<float>& gate,
                        int route = 0) {
  return LayoutRun(base, tile, q, gate, route).run();
}

/// Softmax attention of one head over the given rows in float64; returns the probabilities in `p`.
std::vector<double> reference_attention(const LayerShape& s, const float* q, const char* k_name, const char* v_name,
                                        std::int64_t plane, const std::vector<std::int64_t>& rows,
                                        std::vector<double>& p) {
  std::vector<double> o(s.d_v, 0.0);
  p.clear();
  double max_score = -INFINITY, sum = 0;
  for (const std::int64_t i : rows) {
    double dot = 0;
    const float* k = cache_row(s, k_name, plane, i, s.d_k);
    for (int e = 0; e < s.d_k; ++e) dot += double{q[e]} * k[e];
    p.push_back(dot / std::sqrt(s.d_k));
    max_score = std::max(max_score, p.back());
  }
  for (double& x : p) sum += x = std::exp(x - max_score);
  for (std::size_t i = 0; i < p.size(); ++i) {
    p[i] /= sum;
    const float* v = cache_row(s, v_name, plane, rows[i], s.d_v);
    for (int e = 0; e < s.d_v; ++e) o[e] += p[i] * v[e];
  }
  return o;
}

std::vector<std::int64_t> range(std::int64_t begin, std::int64_t end) {
  std::vector<std::int64_t> values;
  for (std::int64_t i = begin; i < end; ++i) values.push_back(i);
  return values;
}

double worst_difference(const std::vector<double>& exact, const float* got) {
  double worst = 0;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    const double difference = std::abs(exact[i] - got[i]);
    worst = difference >= worst || std::isnan(difference) ? difference : worst;
  }
  return worst;
}

// fp32 dots of 24 products, exponentials of scores of order 3: a few hundred roundings of 6e-8 at most.
constexpr double fp32_bound = 1e-5;

void check_step(const Layout& layout, const QueryTile& tile, const std::vector<float>& q, const Step& step,
                const std::vector<float>& p_slc) {
  const LayerShape& s = layout.shape;
  const BlockRules& rules = s.rules;
  const std::int64_t blocks = eligible_blocks(rules, layout.positions - 1);
  std::vector<double> p;
  for (std::int64_t row = 0; row < tile.rows(); ++row) {
    const std::int64_t t = *tile.first_position + row % tile.tokens, valid = compressed_tokens(rules, t);
    for (std::int32_t g = 0; g < s.groups; ++g) {
      const std::int64_t plane = (tile.batch_begin + row / tile.tokens) * s.groups + g;
      std::vector<double> score(blocks, 0.0);
      const auto head_of = [&](std::int32_t j) { return row * s.heads() + g * s.heads_per_group + j; };
      for (std::int32_t j = 0; j < s.heads_per_group; ++j) {
        const std::vector<double> o =
            reference_attention(s, q.data() + head_of(j) * s.d_k, "k_cmp", "v_cmp", plane, range(0, valid), p);
        CHECK(worst_difference(o, step.o_branch[cmp].data() + head_of(j) * s.d_v) < fp32_bound);
        for (std::int64_t i = 0; i < valid; ++i)
          for (std::int64_t b = 0; b < eligible_blocks(rules, t); ++b) score[b] += p[i] * overlap(rules, i, b);
      }
      const std::int64_t row_group = row * s.groups + g;
      CHECK(worst_difference(score, p_slc.data() + row_group * blocks) < fp32_bound * s.heads_per_group);
      std::vector<std::int64_t> order = range(0, eligible_blocks(rules, t));
      std::sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
        const double x = is_forced(rules, a, t) ? INFINITY : score[a], y = is_forced(rules, b, t) ? INFINITY : score[b];
        return x != y ? x > y : a < b;
      });
      order.resize(std::min<std::size_t>(order.size(), rules.n_sel));
      std::sort(order.begin(), order.end());
      std::vector<std::int64_t> tokens;
      for (std::int32_t k = 0; k < rules.n_sel; ++k) {
        const std::int64_t expected = k < static_cast<std::int64_t>(order.size()) ? order[k] : -1;
        CHECK(step.selected[row_group * rules.n_sel + k] == expected);
        if (expected < 0) continue;
        for (std::int64_t i = expected * rules.l_sel; i < std::min((expected + 1) * rules.l_sel, t + 1); ++i)
          tokens.push_back(i);
      }
      for (std::int32_t j = 0; j < s.heads_per_group; ++j) {
        const float* head = q.data() + head_of(j) * s.d_k;
        const auto check = [&](Branch c, const std::vector<double>& o) {
          CHECK(worst_difference(o, step.o_branch[c].data() + head_of(j) * s.d_v) < fp32_bound);
        };
        check(sel, reference_attention(s, head, "k_sel", "v_sel", plane, tokens, p));
        check(win, reference_attention(s, head, "k_win", "v_win", plane, range(window_begin(rules, t), t + 1), p));
      }
    }
  }
}

std::vector<std::int64_t> expected_reads_of(const LayerShape& s, const QueryTile& tile) {
  std::vector<std::int64_t> reads(branches * tile.batches * s.groups, 0);
  for (std::int64_t row = 0; row < tile.rows(); ++row) {
    const std::int64_t t = *tile.first_position + row % tile.tokens;
    const std::int64_t blocks = std::min<std::int64_t>(s.rules.n_sel, eligible_blocks(s.rules, t));
    for (std::int32_t g = 0; g < s.groups; ++g) {
      const std::int64_t at = row / tile.tokens * s.groups + g, planes = tile.batches * s.groups;
      reads[cmp * planes + at] += compressed_tokens(s.rules, t);
      reads[sel * planes + at] += (blocks - 1) * s.rules.l_sel + t % s.rules.l_sel + 1;
      reads[win * planes + at] += std::min<std::int64_t>(s.rules.w, t + 1);
    }
  }
  return reads;
}

}  // namespace

TEST_CASE("attention, importance and selection agree with float64 on one rank") {
  for (const DType type : {DType::f32, DType::bf16, DType::f16}) {
    for (const std::int32_t tokens : {1, 37}) {
      for (const std::int64_t first : {0, 5, 150}) {
        for (const std::int32_t heads : {1, 3, 70}) {
          if (heads == 70 && (type != DType::f32 || tokens > 1)) continue;
          Layout layout{small_shape()};
          layout.shape.dtype = type;
          layout.shape.heads_per_group = heads;
          layout.batch = 3;
          layout.positions = first + tokens;
          const QueryTile tile{1, 2, tokens, &first, layout.positions};
          const Tensor q(type, "q", tile.rows() * layout.shape.heads() * layout.shape.d_k);
          const std::vector<float> gate(tile.rows() * layout.shape.groups * 3, 1.0f);
          for (const int route : {0, 1}) {
            const LayoutResult one = run_layout(layout, tile, q.bytes.data(), gate, route);
            check_step(layout, tile, q.values, one.steps[0], one.steps[0].p_slc);
            CHECK(one.steps[0].reads == expected_reads_of(layout.shape, tile));
          }
        }
      }
    }
  }
}

TEST_CASE("every kv layout forms the same LSE buckets and selects the same blocks, bit for bit") {
  for (const std::int64_t position : {0, 6, 7, 63, 64, 65, 66, 67, 150, 391}) {
    Layout layout{small_shape()};
    layout.batch = 2;
    layout.positions = position + 1;
    const QueryTile tile{0, 2, 1, &position, layout.positions};
    const LayerShape& s = layout.shape;
    const Tensor q(DType::f32, "q", tile.rows() * s.heads() * s.d_k);
    const std::vector<float> gate(tile.rows() * s.groups * 3, 1.0f);
    const LayoutResult one = run_layout(layout, tile, q.bytes.data(), gate);
    for (const std::int32_t kv : {2, 3, 8}) {
      layout.kv = kv;
      const LayoutResult many = run_layout(layout, tile, q.bytes.data(), gate);
      std::vector<std::int64_t> reads(one.steps[0].reads.size(), 0);
      std::vector<float> p_slc(one.steps[0].p_slc.size(), 0.0f);
      for (std::int32_t r = 0; r < kv; ++r) {
        const Step& step = many.steps[r];
        CHECK(step.selected == one.steps[0].selected);
        for (std::size_t i = 0; i < reads.size(); ++i) reads[i] += step.reads[i];
        for (std::size_t i = 0; i < p_slc.size(); ++i) p_slc[i] += step.p_slc[i];
        const std::size_t bucket = one.steps[0].lse.size() / s.lse.buckets;
        for (std::int32_t x = r; x < s.lse.buckets; x += kv)
          CHECK(std::memcmp(step.lse.data() + x / kv * bucket, one.steps[0].lse.data() + x * bucket, bucket * 4) == 0);
      }
      CHECK(reads == one.steps[0].reads);
      CHECK(std::memcmp(p_slc.data(), one.steps[0].p_slc.data(), p_slc.size() * 4) == 0);
      check_step(layout, tile, q.values, many.steps[kv - 1], p_slc);
    }
  }
}

TEST_CASE("scores and selection do not depend on the thread count, nor on prefill or decode") {
  Layout layout{small_shape()};
  const std::int64_t first = 100;
  const std::int32_t tokens = 29;
  layout.positions = first + tokens;
  const QueryTile tile{0, 1, tokens, &first, layout.positions};
  const LayerShape& s = layout.shape;
  const Tensor q(DType::f32, "q", tile.rows() * s.heads() * s.d_k);
  const std::vector<float> gate(tile.rows() * s.groups * 3, 0.5f);
  const int before = host_device().info().units;
  set_host_threads(1);
  const Step alone = run_layout(layout, tile, q.bytes.data(), gate).steps[0];
  const Step shared = run_layout(layout, tile, q.bytes.data(), gate, 1).steps[0];
  for (const int threads : {2, 5, 64}) {
    set_host_threads(threads);
    const Step step = run_layout(layout, tile, q.bytes.data(), gate).steps[0];
    CHECK(step.o == alone.o);
    CHECK(run_layout(layout, tile, q.bytes.data(), gate, 1).steps[0].o == shared.o);
    CHECK(step.selected == alone.selected);
    for (std::int32_t j = 0; j < tokens; j += 7) {
      const std::int64_t t = first + j, width = s.groups * eligible_blocks(s.rules, layout.positions - 1);
      const QueryTile row{0, 1, 1, &t, layout.positions};
      const void* q_row = q.bytes.data() + j * s.heads() * s.d_k * 4;
      const Step decode = run_layout(layout, row, q_row, {0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f}).steps[0];
      CHECK(std::memcmp(decode.p_slc.data(), alone.p_slc.data() + j * width, width * 4) == 0);
      for (std::int64_t k = 0; k < s.groups * s.rules.n_sel; ++k)
        CHECK(decode.selected[k] == alone.selected[j * s.groups * s.rules.n_sel + k]);
    }
  }
  set_host_threads(before);
}

TEST_CASE("scores_only stores the same LSE buckets and no output") {
  Layout layout{small_shape()};
  const std::int64_t position = 200;
  layout.positions = position + 1;
  const LayerShape& s = layout.shape;
  const QueryTile tile{0, 1, 1, &position, layout.positions};
  const Tensor q(DType::f32, "q", s.heads() * s.d_k);
  const Step whole = run_layout(layout, tile, q.bytes.data(), std::vector<float>(s.groups * 3, 1.0f)).steps[0];
  const std::int64_t n = compressed_tokens(s.rules, position);
  const Cache k = layout.cache("k_cmp", layout.compressed(), n, s.d_k), v = layout.cache("v_cmp", {}, n, s.d_v);
  std::vector<float> partials(partial_floats(s, 1), unset), lse(whole.lse.size(), unset);
  std::vector<std::byte> scratch = scratch_for(s, tile), scores(whole.scores.size());
  std::vector<std::int64_t> reads(s.groups, 5);
  AttendArgs args;
  args.shape = s;
  args.tile = tile;
  args.q = q.bytes.data();
  args.k = k.view;
  args.v = v.view;
  args.out = partials_at(partials.data(), s, 1, cmp);
  args.reads = reads.data();
  args.lse = lse.data();
  args.scores = scores.data();
  args.scores_only = true;
  args.scratch = scratch.data();
  args.scratch_bytes = scratch.size();
  table().attend[cmp][0].run(args, nullptr);
  CHECK(lse == whole.lse);
  CHECK(reads == std::vector<std::int64_t>(s.groups, 5 + n));
  for (std::int64_t e = 0; e < s.heads() * s.d_v; ++e) CHECK(args.out.o[e] == 0.0f);
}
