// Decode steps of ragged batches: in one launch, and with tiles dealt by length. Steps of several query tokens.

#include <cstring>
#include <string>
#include <vector>

#include "catch.hpp"
#include "gpu/mirrored.hpp"
#include "gpu/whole_decode.hpp"

using namespace nsa;
using namespace nsa::test;

namespace {

/// What a step leaves: o and the blocks of `rows` rows, and what they read.
struct Result {
  std::vector<float> o;
  std::vector<std::int32_t> selected;
  std::vector<std::int64_t> reads;
  Result(const WholeDecode& whole, const StepMemory& step) {
    const LayerShape& s = whole.s;
    const std::int64_t rows = step.stage.tile.rows(), size = static_cast<std::int64_t>(size_of(s.dtype));
    for (const auto& [what, bytes] : {std::pair<void*, std::int64_t>{whole.o, rows * s.heads() * s.d_v * size},
                                      {whole.selected, rows * s.groups * s.rules.n_sel * 4}})
      gpu().device->fill(what, 0xFF, static_cast<std::size_t>(bytes), whole.stream);
    gpu().device->fill(whole.scores, 0xFF, whole.score_bytes, whole.stream);
    gpu().device->fill(whole.scratch, 0xFF, whole.scratch_bytes, whole.stream);
    gpu().device->fill(whole.reads, 0, static_cast<std::size_t>(branches * step.stage.tile.batches * s.groups * 8),
                       whole.stream);
    run_fused(gpu().kernels->decode_attention, step.attention_args(), whole.stream);
    const auto bytes = download<std::byte>(whole, whole.o, rows * s.heads() * s.d_v * size);
    for (std::int64_t i = 0; i < rows * s.heads() * s.d_v; ++i) o.push_back(value_at(s.dtype, bytes.data(), i));
    selected = download<std::int32_t>(whole, whole.selected, rows * s.groups * s.rules.n_sel);
    reads = download<std::int64_t>(whole, whole.reads, branches * step.stage.tile.batches * s.groups);
  }
};

void check_alone(const LayerShape& s, const std::vector<std::int64_t>& contexts, const std::string& kernel,
                 int tokens = 1) {
  const WholeDecode whole(gpu(), s, contexts, 1, tokens);
  poison(whole, contexts);
  const StepMemory step = whole.step(whole.sets[0]);
  CHECK(gpu().kernels->decode_attention.variant(step.attention_args()) == kernel);
  const Result batch(whole, step);
  const std::int64_t batches = std::ssize(contexts), chosen = s.groups * s.rules.n_sel, width = s.heads() * s.d_v;
  for (std::int64_t b = 0; b < batches; ++b) {
    INFO("sequence " << b << " of " << contexts[b] << " tokens, type " << static_cast<int>(s.dtype) << ", d " << s.d_k);
    std::vector<std::int64_t> reads(static_cast<std::size_t>(branches * s.groups), 0);
    for (std::int64_t row = b * tokens; row < (b + 1) * tokens; ++row) {
      INFO("row " << row);
      const Result alone(whole, whole.step_alone(whole.sets[0], row, contexts[b]));
      CHECK(std::equal(alone.selected.begin(), alone.selected.end(), batch.selected.begin() + row * chosen));
      const std::vector<float> own(batch.o.begin() + row * width, batch.o.begin() + (row + 1) * width);
      CHECK(relative_error(own, alone.o) < (s.dtype == DType::f32 ? 1e-5 : s.dtype == DType::bf16 ? 4e-3 : 5e-4));
      for (std::size_t i = 0; i < reads.size(); ++i) reads[i] += alone.reads[i];
    }
    bool same_reads = true;
    for (int c = 0; c < branches; ++c)
      for (std::int64_t g = 0; g < s.groups; ++g)
        same_reads &= batch.reads[(c * batches + b) * s.groups + g] == reads[c * s.groups + g];
    CHECK(same_reads);
  }
}

}  // namespace

TEST_CASE("a ragged decode step in one launch is each sequence alone", "[step][ragged]") {
  for (const DType type : {DType::bf16, DType::f16, DType::f32})
    for (const int d : {64, 128}) {
      if (type == DType::f32 && d == 128) continue;
      check_alone(shape_of(type, d, type == DType::f32 ? 4 : 16), {5000, 1, 17, 2048, 31, 32, 700}, "step");
    }
}

TEST_CASE("a ragged decode step on FP8 rows is each sequence alone", "[step][ragged][fp8]") {
  for (const int heads : {4, 16}) check_alone(fp8_shape_of(heads), {5000, 1, 17, 2048, 31, 32, 700, 20011}, "step");
}

// More clusters than are resident: they start longest first.
TEST_CASE("a ragged decode step of many sequences in one launch is each sequence alone", "[step][ragged]") {
  std::vector<std::int64_t> contexts = {30001, 64, 64, 5000, 64};
  while (contexts.size() < 150) contexts.push_back(1 + static_cast<std::int64_t>(contexts.size() * 7919 % 9000));
  contexts.push_back(40000);
  for (const auto& [type, d, heads] : {std::tuple{DType::bf16, 128, 16}, {DType::f16, 64, 16}, {DType::bf16, 80, 40}})
    check_alone(shape_of(type, d, heads), contexts, "step");
}

// All clusters are resident, and the longest sequences would keep theirs busy after the others: they lend KV tiles.
namespace {
const std::vector<std::int64_t> few_lending = {150000, 64, 5000, 17, 33, 90001, 700};
}  // namespace

TEST_CASE("a ragged decode step whose sequences lend tiles is each sequence alone", "[step][ragged][loans]") {
  for (const auto& [type, d, heads] : {std::tuple{DType::bf16, 128, 16}, {DType::f16, 128, 5}, {DType::bf16, 64, 16}})
    for (const auto& contexts : {few_lending, many_lending()}) check_alone(shape_of(type, d, heads), contexts, "step");
}

TEST_CASE("a ragged decode step whose sequences lend tiles gives the same bits every time", "[step][ragged][loans]") {
  for (const auto& contexts : {few_lending, many_lending()}) {
    const WholeDecode whole(gpu(), shape_of(DType::bf16, 128, 16), contexts, 1);
    const StepMemory step = whole.step(whole.sets[0]);
    // Without loans over 3. A round of few_lending, which loans consist of, is more than the mean.
    CHECK(gpu().kernels->schedule_imbalance(whole.s, step.stage.tile, contexts) < (contexts.size() < 10 ? 1.7 : 1.5));
    const Result first(whole, step);
    for (int i = 0; i < 50; ++i) {
      const Result again(whole, step);
      CHECK((again.o == first.o && again.selected == first.selected && again.reads == first.reads));
    }
  }
}

// So many chosen blocks that the step does not run in one launch.
TEST_CASE("a ragged decode step with tiles dealt by length is each sequence alone", "[step][ragged]") {
  const std::vector<std::int64_t> contexts = {5000, 150000, 1, 31, 64000, 17, 33, 2048, 90001};
  for (const auto& [type, d, heads] : {std::tuple{DType::bf16, 128, 16},
                                       {DType::bf16, 64, 16},
                                       {DType::f16, 128, 5},
                                       {DType::bf16, 80, 40},
                                       {DType::f32, 64, 6}})
    check_alone(shape_of(type, d, heads, 40), contexts, "dealt");
}

TEST_CASE("a ragged decode step with tiles dealt by length gives the same bits every time", "[step][ragged]") {
  const WholeDecode whole(gpu(), shape_of(DType::bf16, 128, 16, 40), {900, 150000, 64000, 33, 120000}, 1);
  const StepMemory step = whole.step(whole.sets[0]);
  const Result first(whole, step);
  for (int i = 0; i < 50; ++i) {
    const Result again(whole, step);
    CHECK((again.o == first.o && again.selected == first.selected && again.reads == first.reads));
  }
}

TEST_CASE("a row of a step of several query tokens is that row alone", "[step][tokens]") {
  const std::vector<std::int64_t> equal(5, 3000), ragged = {5000, 70000, 8, 31, 17, 33, 2048, 9};
  for (const int tokens : {2, 3, 4, 5, 8})
    for (const auto& [type, d, heads] : {std::tuple{DType::bf16, 128, 16},
                                         {DType::bf16, 64, 4},
                                         {DType::f16, 128, 5},
                                         {DType::bf16, 80, 40},
                                         {DType::f32, 64, 6}}) {
      check_alone(shape_of(type, d, heads), equal, "tokens", tokens);
      check_alone(shape_of(type, d, heads, tokens == 5 ? 40 : 16), ragged, "tokens", tokens);
    }
}

// So many rows that all after cmp is one launch.
TEST_CASE("a row of a step of several query tokens of many sequences is that row alone", "[step][tokens]") {
  std::vector<std::int64_t> contexts = {30001, 8, 64, 5000, 9};
  while (contexts.size() < 34) contexts.push_back(8 + static_cast<std::int64_t>(contexts.size() * 7919 % 9000));
  for (const int tokens : {2, 4, 7})
    for (const auto& [type, d, heads] : {std::tuple{DType::bf16, 128, 16},
                                         {DType::bf16, 64, 4},
                                         {DType::f16, 128, 5},
                                         {DType::bf16, 80, 12},
                                         {DType::f32, 64, 4}})
      check_alone(shape_of(type, d, heads), contexts, "tokens", tokens);
  for (const int window : {24, 100, 1000}) {  // less than a run of 64, no whole runs, more than most sequences have
    LayerShape s = shape_of(DType::bf16, 128, 16);
    s.rules.w = window;
    check_alone(s, contexts, "tokens", 5);
  }
}

TEST_CASE("a step of several query tokens, scored from raw scores, is each row alone", "[step][tokens]") {
  LayerShape s = shape_of(DType::bf16, 128, 16);
  s.rules.l_sel = 128;
  check_alone(s, {5000, 20000, 8, 31, 2048, 9}, "tokens", 5);
}

TEST_CASE("a step of several query tokens gives the same bits every time", "[step][tokens]") {
  const WholeDecode whole(gpu(), shape_of(DType::bf16, 128, 16),
                          {900, 150000, 64000, 33, 120000, 4000, 4001, 4002, 4003, 4004, 4005}, 1, 6);
  const StepMemory step = whole.step(whole.sets[0]);
  const Result first(whole, step);
  for (int i = 0; i < 50; ++i) {
    const Result again(whole, step);
    CHECK((again.o == first.o && again.selected == first.selected && again.reads == first.reads));
  }
}

TEST_CASE("small ragged decode steps, and steps of several query tokens", "[step][tokens][ragged][small]") {
  check_alone(shape_of(DType::bf16, 128, 16), {700, 33}, "step");
  check_alone(shape_of(DType::bf16, 128, 16, 40), {700, 33}, "dealt");
  check_alone(shape_of(DType::bf16, 80, 20), {700, 9}, "tokens", 2);
}
