// Compares every stage and the output of the program with the float64 oracle; and decode, and prefill onto a prefix or
// in chunks, with prefill at once.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "catch.hpp"
#include "nsa/report/metrics.hpp"
#include "nsa/results/result_file.hpp"
#include "parity/compare.hpp"
#include "parity/expected.hpp"
#include "parity/shapes.hpp"

namespace {

using namespace parity;
using oracle::Options;
using oracle::Reals;

const char *fp8_kv = "model.kv_precision=\"fp8_e4m3\"", *fp8_cmp = "model.cmp_precision=\"fp8_e4m3\"";

Phase run_phase(const nsa::Config& config) { return {config, run(config, nsa::ControlComm::world())}; }
Phase run_phase(const Shape& shape, nsa::TaskKind kind) { return run_phase(config_of(shape, kind)); }

std::int64_t first_row_of(const nsa::Config& config) {
  return config.kind == nsa::TaskKind::decode ? nsa::sweep(config).at(0).longest() : config.run.prefix;
}

void check_reads(const Phase& phase, const oracle::Attended& expected) {
  const Options o = options_of(phase);
  const bool decode = phase.config.kind == nsa::TaskKind::decode;
  CHECK(reads_as_expected(phase.record));
  for (const int c : {oracle::cmp, oracle::sel, oracle::win})
    for (std::int64_t step = 0; step < phase.config.run.steps; ++step) {
      std::int64_t sum = 0;
      for (std::int64_t t = 0; t < o.tokens; ++t)
        for (std::int64_t plane = 0; plane < o.batch * o.groups; ++plane)
          if (decode ? t == first_of(phase.record)(plane / o.groups) + step : t >= first_row_of(phase.config))
            sum += o.layers * expected.reads(plane / o.groups, t, plane % o.groups, c);
      CHECK(counted_reads(phase.record, c, step) == sum);
    }
}

/// The amount by which rounded softmax weights widen the mean bound of a tensor.
using Moves = std::map<std::string, double>;

/// The compressed tokens of every sequence up to its own last position, then zeros.
Reals completed(const Phase& phase, Reals tokens) {
  const nsa::Point point = nsa::sweep(phase.config).at(0);
  for (std::int64_t b = 0; point.ragged() && b < point.batch; ++b) {
    const std::int64_t valid = nsa::compressed_tokens(phase.config.nsa, point.length(b) + phase.config.run.steps - 1),
                       width = tokens.shape[2] * tokens.shape[3];
    const auto of_sequence = tokens.values.begin() + b * tokens.shape[1] * width;
    std::fill(of_sequence + valid * width, of_sequence + tokens.shape[1] * width, 0.0);
  }
  return tokens;
}

/// Compares every recorded tensor of a phase with the oracle.
Moves check_phase(const Phase& phase) {
  const Options options = options_of(phase);
  const std::int64_t first = phase.record.first_position;
  CHECK(phase.record.valid);
  CHECK(phase.record.fallbacks.empty());
  for (int c = 0; c < nsa::branches; ++c) {
    const std::string& asked = phase.config.route.implementation[c];
    CHECK((asked == "auto" || asked == phase.record.routes[c]));
  }
  CHECK(first == first_row_of(phase.config));
  std::optional<oracle::Chosen> chosen;
  oracle::Layer expected = expect(phase);
  const oracle::Integers selected = integers(phase.record, "selected");
  const SelectionDifference difference =
      check_selection(options, selected, recorded_rows(phase, expected.attended.selected),
                      recorded_rows(phase, expected.attended.p_slc), first_of(phase.record));
  const bool ragged = !phase.record.batch.lengths.empty();
  if (ragged) {
    CHECK(difference.differing == 0);  // the oracle takes chosen blocks from one position on only
  } else if (difference.differing > 0) {
    chosen = {selected, first};
    expected = expect(phase, chosen);
  }

  const Bound bound = bound_of(options);
  const oracle::Attended& a = expected.attended;
  const std::map<std::string, Reals> deviations = moves_by_name(phase, expected, chosen);
  Moves moves;
  const auto check_all = [&](const char* name, const Reals& values, const auto& rows) {
    const auto found = deviations.find(name);
    const Bound wider = found == deviations.end() ? bound : moved(bound, values, rows(found->second));
    check_close(name, reals(phase.record, name), values, wider);
    moves[name] = wider.mean - bound.mean;
  };
  const auto check = [&](const char* name, const Reals& all) {
    check_all(name, recorded_rows(phase, all), [&](const Reals& by) { return recorded_rows(phase, by); });
  };
  for (const auto& [name, tokens] : {std::pair{"k_cmp_tokens", &a.k_cmp_tokens}, {"v_cmp_tokens", &a.v_cmp_tokens}})
    check_all(name, completed(phase, *tokens), [&](const Reals& by) { return completed(phase, by); });
  check("p_slc", a.p_slc);
  check("o_cmp", a.o_branch[oracle::cmp]);
  check("o_sel", a.o_branch[oracle::sel]);
  check("o_win", a.o_branch[oracle::win]);
  check("o", a.o);
  if (phase.config.run.scope == nsa::Scope::layer) {
    check("q", expected.projected.q);
    check("gate", expected.projected.gate);
    // Where o of the only layer has changed, y is compared with the product of the recorded o.
    Options recorded = options;
    recorded.tokens = options.tokens - first;
    if (options.layers > 1 || moves["o"] == 0)
      check("y", expected.y);
    else
      check_close("y", reals(phase.record, "y"),
                  oracle::output(recorded, weights_of(phase.config, phase.record).back().w_o, reals(phase.record, "o")),
                  bound);
  }
  check_reads(phase, a);
  return moves;
}

/// Compares the rows of `decode` with the same rows of `prefill`. Both are within the bound of the oracle, each widened
/// by its own moves, and each in units of the largest value of all of its rows.
void check_continuation(const Phase& prefill, const Phase& decode, const Moves& moves) {
  const Options options = options_of(prefill);
  const std::int64_t first = decode.record.first_position, rows = options.tokens - first;
  const oracle::Integers selected = integers(decode.record, "selected");
  const SelectionDifference difference =
      check_selection(options, selected, rows_of(integers(prefill.record, "selected"), first, rows),
                      rows_of(reals(prefill.record, "p_slc"), first, rows), first);
  const bool layer = prefill.config.run.scope == nsa::Scope::layer;
  const Bound one = bound_of(options);
  const auto compare = [&](const char* name, const Reals& decoded, const Reals& all, const Reals& prefilled) {
    const double units = 1 + largest_of(all) / std::max(largest_of(prefilled), DBL_MIN);
    const auto found = moves.find(name);
    check_close(name, decoded, prefilled,
                {units * one.largest, units * one.mean + (found == moves.end() ? 0 : found->second)});
  };
  const bool compares_y = layer && (options.layers > 1 || moves.at("o") == 0);
  for (const char* name : {"q", "gate", "p_slc", "o_cmp", "o_sel", "o_win", compares_y ? "y" : "o"}) {
    // Other blocks, chosen in a tie, have another output.
    const bool follows_selection = std::string(name) == "o_sel" || std::string(name) == "y" || std::string(name) == "o";
    if (difference.differing > 0 && follows_selection) continue;
    const Reals all = reals(prefill.record, name);
    compare(name, reals(decode.record, name), all, rows_of(all, first, rows));
  }
  for (const char* name : {"k_cmp_tokens", "v_cmp_tokens"}) {
    const Reals all = reals(prefill.record, name);
    compare(name, reals(decode.record, name), all, all);
  }
}

/// Writes the first `positions` of the given tensors of one sequence of a batch, as an [input] file.
void write_sequence(const std::string& file, const nsa::PointRecord& record, std::int64_t b, std::int64_t positions) {
  std::remove(file.c_str());
  nsa::PointRecord one;
  for (const nsa::TensorRecord& tensor : record.tensors) {
    if (!tensor.name.starts_with("given/")) continue;
    nsa::TensorRecord& own = one.tensors.emplace_back(tensor);
    const std::ptrdiff_t size = std::ssize(tensor.values) / tensor.shape[0], row = size / tensor.shape[1];
    own.shape[0] = 1, own.shape[1] = positions;
    own.values.assign(tensor.values.begin() + b * size, tensor.values.begin() + b * size + positions * row);
  }
  nsa::RunRecord run;
  run.system.resize(1);
  nsa::ResultWriter writer(file, run, 0, false);
  writer.seal(one);
  writer.finish(run);
}

/// Sequence b of a batch against the same sequence alone: bit for bit on the host. On a GPU outputs are summed in
/// another order, but scores and blocks are not.
void check_same_row(const Phase& batch, const Phase& alone, std::int64_t b) {
  const bool cuda = batch.config.run.backend == nsa::BackendChoice::cuda;
  const auto row_of = [&](const auto& all, const auto& wanted) {
    auto own = wanted;
    const std::int64_t last = all.shape.back(),
                       kept = own.shape.back();  // p_slc has the blocks of the longest sequence
    const std::int64_t rows = static_cast<std::int64_t>(own.values.size()) / kept;
    for (std::int64_t i = 0; i < rows; ++i)
      std::copy_n(all.values.begin() + (b * rows + i) * last, kept, own.values.begin() + i * kept);
    return own;
  };
  const oracle::Integers selected = integers(alone.record, "selected");
  CHECK(row_of(integers(batch.record, "selected"), selected).values == selected.values);
  for (const char* name : {"q", "gate", "p_slc", "o_cmp", "o_sel", "o_win", "o"}) {
    INFO(name);
    const Reals expected = reals(alone.record, name), own = row_of(reals(batch.record, name), expected);
    if (cuda && name[0] == 'o')
      check_close(name, own, expected, bound_of(options_of(alone)));
    else
      CHECK(own.values == expected.values);
  }
}

void check_shape(const Shape& shape) {
  const Phase prefill = run_phase(shape, nsa::TaskKind::prefill);
  const Phase decode = run_phase(shape, nsa::TaskKind::decode);
  Moves moves;
  {
    INFO("prefill");
    moves = check_phase(prefill);
  }
  {
    INFO("decode");
    for (const auto& [name, by] : check_phase(decode)) moves[name] += by;
  }
  INFO("decode against prefill");
  check_continuation(prefill, decode, moves);
}

}  // namespace

TEST_CASE("the layer agrees with the oracle, prefill and decode", "[parity][layer]") {
  for (const Shape& shape : layer_shapes()) DYNAMIC_SECTION(shape.name) {
      check_shape(shape);
    }
}

TEST_CASE("attention over given q, k, v agrees with the oracle", "[parity][attention]") {
  for (Shape shape : attention_shapes()) {
    shape.overrides.push_back("run.scope=\"attention\"");
    DYNAMIC_SECTION(shape.name) { check_shape(shape); }
  }
}

TEST_CASE("every route agrees with the oracle, prefill and decode", "[parity][routes]") {
  const char* paper = "nsa.l=32";
  const std::vector<Shape> shapes = {
      {"T no multiple of d or l'", 143, 7, {}},
      {"T < l, B = 2", 5, 14, {"run.batch=2"}},
      {"T = 1, h = 5", 1, 21, {"model.n_heads=10"}},
      {"Dk < Dv, w > T", 117, 5, {"model.d_k=8", "model.d_v=24", "nsa.w=512"}},
      {"d = 1, w = 37", 117, 5, {"nsa.l=3", "nsa.d=1", "nsa.l_sel=8", "nsa.w=37"}},
      {"the paper's blocks, bf16",
       1157,
       5,
       {paper, "nsa.d=16", "nsa.l_sel=64", "nsa.n_sel=8", "nsa.w=512", "model.n_heads=2", "model.d_k=64",
        "model.d_v=64", "model.precision=\"bf16\""}},
      {"bf16, L = 2", 143, 7, {"model.precision=\"bf16\"", "model.layers=2"}},
      {"bf16, h = 5, Dk < Dv", 117, 5, {"model.precision=\"bf16\"", "model.n_heads=10", "model.d_v=24"}},
      {"fp16, L = 2, w = 37", 117, 5, {"model.precision=\"fp16\"", "model.layers=2", "nsa.w=37"}},
      {"FP8, bf16, B = 2",
       117,
       5,
       {"model.precision=\"bf16\"", fp8_kv, fp8_cmp, "run.batch=2", "run.scope=\"attention\""}},
  };
  const char* routes[][nsa::branches] = {{"sdpa", "sdpa", "sdpa"}, {"fused", "masked", "masked"}};
  for (const auto& names : routes)
    for (Shape shape : shapes) {
      for (int c = 0; c < nsa::branches; ++c)
        shape.overrides.push_back(std::string("route.") + nsa::branch_names[c] + "=\"" + names[c] + "\"");
      DYNAMIC_SECTION(names[0] << " " << names[1] << " " << names[2] << ": " << shape.name) { check_shape(shape); }
    }
}

TEST_CASE("a ragged batch agrees with the oracle", "[parity][ragged]") {
  const char *lengths = "batch.context=[1, 143, 5, 300, 61]", *attention = "run.scope=\"attention\"",
             *paper = "nsa.l=32", *masked = "route.sel=\"masked\"", *sdpa = "route.sel=\"sdpa\"";
  const std::vector<Shape> shapes = {
      {"layer", 0, 7, {lengths}},
      {"L = 2, learned phi", 0, 7, {lengths, "model.layers=2", "nsa.phi=\"mlp\""}},
      {"attention", 0, 7, {lengths, attention}},
      {"attention, measured passes checked", 0, 7, {lengths, attention, "run.check=true"}},
      {"sdpa", 0, 7, {lengths, "route.cmp=\"sdpa\"", sdpa, "route.win=\"sdpa\""}},
      {"masked", 0, 7, {lengths, masked, "route.win=\"masked\""}},
      {"bf16, h = 5", 0, 7, {lengths, "model.precision=\"bf16\"", "model.n_heads=10"}},
      {"fp16, the paper's blocks",
       0,
       5,
       {"batch.context=[600, 3, 40, 300, 64]", attention, paper, "nsa.d=16", "nsa.l_sel=64", "nsa.n_sel=8", "nsa.w=512",
        "model.n_heads=2", "model.d_k=64", "model.d_v=64", "model.precision=\"fp16\""}},
      {"FP8, attention", 0, 7, {lengths, attention, fp8_kv, fp8_cmp}},
      {"FP8, the paper's blocks, d_k = 128",
       0,
       5,
       {"batch.context=[600, 3, 40, 300, 64]", attention, paper, "nsa.d=16", "nsa.l_sel=64", "nsa.n_sel=8", "nsa.w=512",
        "model.n_heads=2", "model.d_k=128", "model.d_v=128", "model.precision=\"bf16\"", fp8_kv, fp8_cmp}},
      {"equal lengths", 0, 5, {"batch.context=[61, 61, 61]"}},
      {"one sequence", 0, 5, {"batch.context=[61]"}},
  };
  for (const Shape& shape : shapes) DYNAMIC_SECTION(shape.name) {
      const Phase decode = run_phase(shape, nsa::TaskKind::decode);
      check_phase(decode);
      CHECK(decode.record.reason == "");
      CHECK(decode.record.batch.reads == decode.record.batch.reads_expected);
      CHECK(decode.record.memory.measured_peak == decode.record.memory.planned);
      CHECK(decode.record.batch.lengths == nsa::sweep(decode.config).at(0).lengths);
    }
}

/// Scope "attention": a matrix product of another number of rows may round otherwise.
TEST_CASE("a row of a ragged batch is the sequence run alone", "[parity][ragged]") {
  const std::vector<std::int64_t> lengths = {1, 143, 5, 300, 61};
  const std::string file = "test_ragged_alone.h5";
  for (const char* precision : {"fp32", "bf16"}) {
    Shape shape{"", 0, 7, {"run.scope=\"attention\"", std::string("model.precision=\"") + precision + "\""}};
    const std::vector<std::string> common = shape.overrides;
    shape.overrides.push_back("batch.context=[1, 143, 5, 300, 61]");
    const Phase batch = run_phase(shape, nsa::TaskKind::decode);
    for (std::int64_t b = 0; b < std::ssize(lengths); ++b) DYNAMIC_SECTION(precision << ", sequence " << b) {
        write_sequence(file, batch.record, b, lengths[b] + 7);
        Shape one{"", lengths[b], 7, common};
        one.overrides.push_back("input.file=\"" + file + "\"");
        const Phase alone = run_phase(one, nsa::TaskKind::decode);
        std::remove(file.c_str());
        check_same_row(batch, alone, b);
      }
  }
}

namespace {

/// Every recorded tensor: bit for bit on the host. On a GPU another kernel may attend, but blocks stay, and so do scores
/// where one kernel made both.
void check_same_tensors(const Phase& phase, const Phase& other) {
  const bool cuda = phase.config.run.backend == nsa::BackendChoice::cuda;
  const bool same_scores = phase.record.route_kernels[nsa::cmp] == other.record.route_kernels[nsa::cmp];
  CHECK(integers(phase.record, "selected").values == integers(other.record, "selected").values);
  for (const char* name : {"p_slc", "k_cmp_tokens", "v_cmp_tokens", "o_cmp", "o_sel", "o_win", "o"}) {
    INFO(name);
    const Reals own = reals(phase.record, name), expected = reals(other.record, name);
    if (cuda && (name[0] == 'o' || (name == std::string("p_slc") && !same_scores)))
      check_close(name, own, expected, bound_of(options_of(phase)));
    else
      CHECK(own.values == expected.values);
  }
}

const char *paged = "cache.layout=\"paged\"", *page_16 = "cache.page=16", *shuffled = "cache.order=\"shuffled\"";

std::vector<Shape> paged_shapes() {
  const char *batch = "run.batch=3", *lengths = "batch.context=[1, 143, 5, 300, 61]";
  return {
      {"pages of 64", 143, 7, {}},
      {"pages of 16, shuffled, B = 3", 149, 7, {page_16, shuffled, batch}},
      {"pages of 48, L = 2, learned phi", 143, 7, {"cache.page=48", shuffled, "model.layers=2", "nsa.phi=\"mlp\""}},
      {"T < l", 5, 14, {page_16, shuffled, batch}},
      {"T = 1, a page for all", 1, 21, {"cache.page=4096"}},
      {"chunks of 1 block", 143, 7, {page_16, shuffled, "parallel.kv_chunk_blocks=1"}},
      {"attention, measured passes checked", 143, 7, {page_16, shuffled, "run.scope=\"attention\"", "run.check=true"}},
      {"sdpa", 143, 7, {shuffled, "route.cmp=\"sdpa\"", "route.sel=\"sdpa\"", "route.win=\"sdpa\""}},
      {"shared_kv, bf16", 149, 5, {page_16, shuffled, "model.shared_kv=true", "model.precision=\"bf16\""}},
      {"fp16, the paper's blocks",
       600,
       5,
       {shuffled, batch, "nsa.l=32", "nsa.d=16", "nsa.l_sel=64", "nsa.n_sel=8", "nsa.w=512", "model.n_heads=2",
        "model.d_k=64", "model.d_v=64", "model.precision=\"fp16\"", "run.check=true"}},
      {"ragged", 0, 7, {lengths, page_16, shuffled}},
      {"FP8, ragged", 0, 7, {lengths, page_16, shuffled, fp8_kv, fp8_cmp}},
      {"FP8, the paper's blocks, d_k = 128",
       600,
       5,
       {shuffled, batch, "run.scope=\"attention\"", "nsa.l=32", "nsa.d=16", "nsa.l_sel=64", "nsa.n_sel=8", "nsa.w=512",
        "model.n_heads=2", "model.d_k=128", "model.d_v=128", "model.precision=\"bf16\"", "run.check=true", fp8_kv,
        fp8_cmp}},
      {"ragged, bf16, the paper's blocks",
       0,
       5,
       {"batch.context=[600, 3, 40, 300, 64]", shuffled, "nsa.l=32", "nsa.d=16", "nsa.l_sel=64", "nsa.n_sel=8",
        "nsa.w=512", "model.n_heads=2", "model.d_k=64", "model.d_v=64", "model.precision=\"bf16\""}},
  };
}

void check_paged(const Shape& shape, nsa::TaskKind kind) {
  Shape in_pages = shape, in_order = shape;
  in_pages.overrides.push_back(paged);
  std::erase_if(in_order.overrides, [](const std::string& o) { return o.starts_with("cache."); });
  const Phase phase = run_phase(in_pages, kind);
  check_phase(phase);
  CHECK(phase.record.reason == "");
  CHECK(phase.record.memory.measured_peak == phase.record.memory.planned);
  check_same_tensors(phase, run_phase(in_order, kind));
}

}  // namespace

TEST_CASE("paged caches agree with the oracle and change no block", "[parity][paged]") {
  for (const Shape& shape : paged_shapes()) DYNAMIC_SECTION(shape.name) {
      check_paged(shape, nsa::TaskKind::decode);
      if (shape.context > 0) check_paged(shape, nsa::TaskKind::prefill);
    }
}

TEST_CASE("prefill onto a paged prefix and in chunks agrees with one prefill", "[parity][paged][prefix]") {
  for (const char* layers : {"model.layers=1", "model.layers=2"}) {
    const Shape shape{"", 90, 41, {paged, page_16, shuffled, layers, "run.batch=2", "cache.shared_prefix=40"}};
    const Phase whole = run_phase(shape, nsa::TaskKind::prefill);
    const Moves moves = check_phase(whole);
    for (const std::int64_t chunk : {0, 7}) DYNAMIC_SECTION(layers << ", chunks of " << chunk) {
        const Phase onto = run_phase(prefix_config_of(shape, chunk));
        check_phase(onto);
        check_continuation(whole, onto, moves);
      }
  }
}

/// The prefix ends within a block, at a page, within a stride, and with the context.
TEST_CASE("sequences that share a prefix agree with the oracle", "[parity][paged]") {
  const char *batch = "run.batch=3", *prefix = "cache.shared_prefix=";
  const std::vector<Shape> shapes = {
      {"75 of 149", 149, 7, {page_16, shuffled, batch, prefix + std::to_string(75)}},
      {"96 of 149, attention",
       149,
       7,
       {page_16, batch, prefix + std::to_string(96), "run.scope=\"attention\"", "run.check=true"}},
      {"less than a page, L = 2", 149, 7, {batch, prefix + std::to_string(61), "model.layers=2"}},
      {"all of 97, bf16", 97, 7, {page_16, batch, prefix + std::to_string(97), "model.precision=\"bf16\""}},
      {"ragged", 0, 7, {"batch.context=[80, 143, 300]", page_16, shuffled, prefix + std::to_string(75)}},
  };
  for (Shape shape : shapes) DYNAMIC_SECTION(shape.name) {
      shape.overrides.push_back(paged);
      const Phase decode = run_phase(shape, nsa::TaskKind::decode);
      check_phase(decode);
      CHECK(decode.record.reason == "");
      CHECK(decode.record.memory.measured_peak == decode.record.memory.planned);
      const bool attention = decode.config.run.scope == nsa::Scope::attention;
      const Reals rows = reals(decode.record, attention ? "given/k_sel" : "x");
      const std::ptrdiff_t sequence = std::ssize(rows.values) / rows.shape[0],
                           shared = sequence / rows.shape[1] * decode.config.cache.shared_prefix;
      for (std::int64_t b = 1; b < rows.shape[0]; ++b)
        CHECK(std::equal(rows.values.begin(), rows.values.begin() + shared, rows.values.begin() + b * sequence));
    }
}

namespace {

/// A prefix that ends at every place of a stride d = 4, a compression block l = 8 and a selection block l' = 16; T new
/// tokens that end at other ones; prefill chunks down to one token.
struct Continuation {
  Shape shape;  ///< context: the prefix; steps: the new tokens
  std::vector<std::int64_t> chunks;
};

const std::vector<Continuation>& continuations() {
  const char *bf16 = "model.precision=\"bf16\"", *fp16 = "model.precision=\"fp16\"";
  static const std::vector<Continuation> list = {
      {{"P = 1", 1, 70, {}}, {0, 9}},
      {{"P < l, T < d", 6, 3, {}}, {0, 1}},
      {{"P = l - 1, T = 1", 7, 1, {}}, {0}},
      {{"P = l", 8, 57, {bf16}}, {0, 16}},
      {{"P in a stride", 90, 41, {}}, {0, 7}},
      {{"P at a stride, in a block", 92, 41, {fp16}}, {0, 4}},
      {{"P at a block of l and l'", 96, 64, {}}, {0, 16, 33}},
      {{"P past a block by one", 97, 64, {bf16}}, {0, 33}},
      {{"P before a block by one", 95, 64, {}}, {0, 64}},
      {{"P < w, B = 3", 19, 30, {"run.batch=3"}}, {0, 11}},
      {{"P = w, l = d = l'", 24, 61, {"nsa.l=16", "nsa.d=16"}}, {0, 13}},
      {{"w = 37, l = l'", 101, 50, {"nsa.w=37", "nsa.l=16"}}, {0, 17}},
      {{"w = 1, learned phi", 61, 30, {"nsa.w=1", "nsa.phi=\"mlp\""}}, {0, 8}},
      {{"L = 3, B = 2, sigmoid", 61, 40, {"model.layers=3", "run.batch=2", "model.gate=\"sigmoid\""}}, {0, 15}},
      {{"shared_kv, w > P + T, bf16", 61, 40, {"model.shared_kv=true", "nsa.w=512", bf16}}, {0, 10}},
      {{"all chunks, no prefix", 0, 101, {}}, {1, 13, 100}},
      {{"FP8, P in a stride, B = 2", 90, 41, {fp8_kv, fp8_cmp, "run.batch=2"}}, {0, 7}},
      // On CUDA the tiled kernels, and rows of sel for the last chunk.
      {{"the paper's blocks, bf16",
        781,
        330,
        {"nsa.l=32", "nsa.d=16", "nsa.l_sel=64", "nsa.n_sel=6", "nsa.w=200", "model.n_heads=2", "model.d_k=64",
         "model.d_v=64", bf16}},
       {0, 290}},
  };
  return list;
}

/// A prefill of all positions, and its moves.
struct Whole {
  Phase phase;
  Moves moves;
  explicit Whole(const Shape& shape) : phase(run_phase(shape, nsa::TaskKind::prefill)), moves(check_phase(phase)) {}
};

Phase check_onto_prefix(const Shape& shape, const Whole& whole, std::int64_t chunk) {
  const Phase onto = run_phase(prefix_config_of(shape, chunk));
  Moves moves = whole.moves;
  for (const auto& [name, by] : check_phase(onto)) moves[name] += by;
  check_continuation(whole.phase, onto, moves);
  return onto;
}

/// What has the same bits as in one prefill of all positions, where q, K and V do.
void check_same_bits(const Phase& whole, const Phase& onto) {
  const std::int64_t first = onto.config.run.prefix, rows = onto.config.run.context.at(0);
  CHECK(integers(onto.record, "selected").values == rows_of(integers(whole.record, "selected"), first, rows).values);
  CHECK(reals(onto.record, "p_slc").values == rows_of(reals(whole.record, "p_slc"), first, rows).values);
  for (const char* name : {"k_cmp_tokens", "v_cmp_tokens"})
    CHECK(reals(onto.record, name).values == reals(whole.record, name).values);
}

}  // namespace

TEST_CASE("prefill onto a prefix and in chunks agrees with the oracle and with one prefill", "[parity][prefix]") {
  for (const auto& [shape, chunks] : continuations()) DYNAMIC_SECTION(shape.name) {
      const Whole whole(shape);
      for (const std::int64_t chunk : chunks) {
        INFO("chunks of " << chunk);
        const Phase onto = check_onto_prefix(shape, whole, chunk);
        CHECK(reals(onto.record, "x").values == reals(whole.phase.record, "x").values);
      }
    }
}

TEST_CASE("for given q, k, v a prefix and chunks change no bit of the selection", "[parity][prefix][attention]") {
  for (Continuation c : continuations()) {
    if (c.shape.name.find("L = 3") != std::string::npos || c.shape.name.find("phi") != std::string::npos) continue;
    DYNAMIC_SECTION(c.shape.name) {
      c.shape.overrides.push_back("run.scope=\"attention\"");
      const Whole whole(c.shape);
      for (const std::int64_t chunk : c.chunks) {
        INFO("chunks of " << chunk);
        check_same_bits(whole.phase, check_onto_prefix(c.shape, whole, chunk));
      }
    }
  }
}

TEST_CASE("the same tokens and weights in both phases", "[parity]") {
  const Shape shape{"", 29, 6, {}};
  const Phase prefill = run_phase(shape, nsa::TaskKind::prefill);
  const Phase decode = run_phase(shape, nsa::TaskKind::decode);
  CHECK(reals(prefill.record, "x").values == reals(decode.record, "x").values);
  CHECK(reals(prefill.record, "weights/w_q").values == reals(decode.record, "weights/w_q").values);
}

/// The program itself compares the output of each measured pass with that of the checked one.
TEST_CASE("several steps a graph, and steps by the device's clock, run the same steps", "[parity][launches]") {
  for (const char* scope : {"layer", "attention"}) DYNAMIC_SECTION(scope) {
      const Shape shape{"",
                        61,
                        12,
                        {"run.steps_per_graph=3", "run.warmup=3", "run.check=true", std::string("run.scope=") + scope,
                         "run.modes=[\"branches\", \"total\", \"ablation\", \"launches\"]"}};
      const Phase decode = run_phase(shape, nsa::TaskKind::decode);
      CHECK(decode.record.reason == "");
      CHECK(reads_as_expected(decode.record));
      const auto count = [&](const char* mode) {
        return nsa::slowest_samples(decode.record, mode, nsa::Stage::step).size();
      };
      CHECK(count("branches") == 9);
      CHECK(count("total") == 3);  // one of three steps after warm-up holds the time of all
      CHECK(count("ablation_sel") == 3);
      CHECK(count("device") == 9);
      CHECK(count("queued") == 8);  // the last one has no successor
      for (const char* mode : {"total", "device", "queued"})
        CHECK(nsa::stage_time(decode.record, mode, nsa::Stage::step).min > 0);
    }
}
