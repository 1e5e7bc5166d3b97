// Compares every stage and the output of the program with the float64 oracle, and decode with prefill at once.

#include <algorithm>
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
#include "parity/phases.hpp"
#include "parity/shapes.hpp"

namespace {

using namespace parity;
using oracle::Options;
using oracle::Reals;

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

namespace {

/// A batch against its sequences alone. `pages`: of the batch only, since a sequence alone shares nothing.
struct RaggedBatch {
  std::vector<std::int64_t> lengths;
  std::int64_t steps, query_tokens;
  std::vector<std::string> pages;
};

void check_rows_alone(const RaggedBatch& ragged, const char* precision) {
  const std::string file = "test_ragged_alone.h5";
  const std::vector<std::string> common = {"run.scope=\"attention\"",
                                           std::string("model.precision=\"") + precision + "\"",
                                           "run.query_tokens=" + std::to_string(ragged.query_tokens)};
  Shape shape{"", 0, ragged.steps, common};
  shape.overrides.insert(shape.overrides.end(), ragged.pages.begin(), ragged.pages.end());
  std::string list;
  for (const std::int64_t length : ragged.lengths) list += (list.empty() ? "" : ", ") + std::to_string(length);
  shape.overrides.push_back("batch.context=[" + list + "]");
  const Phase batch = run_phase(shape, nsa::TaskKind::decode);
  for (std::int64_t b = 0; b < std::ssize(ragged.lengths); ++b) DYNAMIC_SECTION(precision << ", sequence " << b) {
      write_sequence(file, batch.record, b, ragged.lengths[b] + ragged.steps * ragged.query_tokens);
      Shape one{"", ragged.lengths[b], ragged.steps, common};
      one.overrides.push_back("input.file=\"" + file + "\"");
      const Phase alone = run_phase(one, nsa::TaskKind::decode);
      std::remove(file.c_str());
      check_same_row(batch, alone, b);
    }
}

}  // namespace

/// Scope "attention": a matrix product of another number of rows may round otherwise.
TEST_CASE("a row of a ragged batch is the sequence run alone", "[parity][ragged]") {
  for (const char* precision : {"fp32", "bf16"}) check_rows_alone({{1, 143, 5, 300, 61}, 7, 1, {}}, precision);
}

TEST_CASE("a row of a ragged batch in shared pages with 4 query tokens is the sequence run alone", "[parity][ragged]") {
  const std::vector<std::string> pages = {"cache.layout=\"paged\"", "cache.page=16", "cache.order=\"shuffled\"",
                                          "cache.shared_prefix=75"};
  for (const char* precision : {"fp32", "bf16", "fp16"}) check_rows_alone({{80, 143, 300}, 3, 4, pages}, precision);
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
