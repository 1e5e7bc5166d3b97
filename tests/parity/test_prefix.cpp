// Prefill onto a prefix and in chunks, and caches in pages: against the oracle, and against one prefill and caches in
// order.

#include <algorithm>
#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "catch.hpp"
#include "nsa/report/metrics.hpp"
#include "parity/compare.hpp"
#include "parity/expected.hpp"
#include "parity/phases.hpp"
#include "parity/shapes.hpp"

using namespace parity;
using oracle::Reals;

namespace {

/// Every recorded tensor: bit for bit on the host. On a GPU another kernel may attend, but blocks stay, and so do
/// scores where one kernel made both.
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
