// Decode steps on paged caches: the same bits as on contiguous ones, and nothing read outside of a sequence's pages.

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "catch.hpp"
#include "gpu/mirrored.hpp"
#include "gpu/paged_caches.hpp"

using namespace nsa;
using namespace nsa::test;

namespace {

/// What a step leaves, as bits.
struct Result {
  std::vector<std::byte> o, states;
  std::vector<std::int32_t> selected;
  std::vector<std::int64_t> reads;
  bool operator==(const Result&) const = default;
};

/// Runs the step as one operation, or its stages with implementation `route` of sel, on NaN in all that it writes.
Result run(const WholeDecode& whole, const WholeDecode::Set& set, const std::string& route) {
  const LayerShape& s = whole.s;
  const std::int64_t rows = whole.tile.rows(), partial_bytes = partial_floats(s, rows) * 4;
  WorkMemory memory{whole.backend, {}, {}};
  StepMemory step = whole.step(set);
  step.stage.scratch_bytes = scratch_of_routes(whole);
  step.stage.scratch = memory.make(static_cast<std::int64_t>(step.stage.scratch_bytes));
  const auto clear = [&](void* what, std::int64_t bytes, int value) {
    gpu().device->fill(what, value, static_cast<std::size_t>(bytes), whole.stream);
  };
  clear(whole.o, whole.o_bytes(), 0xFF);
  clear(whole.selected, whole.selected_bytes(), 0xFF);
  clear(whole.scores, static_cast<std::int64_t>(whole.score_bytes), 0xFF);
  clear(whole.partials, partial_bytes, 0xFF);
  clear(whole.reads, branches * rows * s.groups * 8, 0);
  Result result;
  if (route.empty()) {
    run_fused(gpu().kernels->decode_attention, step.attention_args(), whole.stream);
  } else {
    for (const Branch c : {cmp, win}) gpu().kernels->attend[c][0].run(step.attend_args(c), whole.stream);
    gpu().kernels->rank(step.rank_args(), whole.stream);
    for (const AttendKernel& kernel : gpu().kernels->attend[sel])
      if (kernel.name == route) kernel.run(step.attend_args(sel), whole.stream);
    gpu().kernels->combine(step.combine_args(), whole.stream);
    result.states = download<std::byte>(whole, whole.partials, partial_bytes);
  }
  result.o = download<std::byte>(whole, whole.o, whole.o_bytes());
  result.selected = download<std::int32_t>(whole, whole.selected, whole.selected_bytes() / 4);
  result.reads = download<std::int64_t>(whole, whole.reads, branches * rows * s.groups);
  return result;
}

bool is_finite(const WholeDecode& whole, const Result& result) {
  for (std::int64_t i = 0; i < whole.o_bytes() / static_cast<std::int64_t>(size_of(whole.s.dtype)); ++i)
    if (!std::isfinite(value_at(whole.s.dtype, result.o.data(), i))) return false;
  return true;
}

void check_same(const LayerShape& s, const std::vector<std::int64_t>& contexts, std::int32_t tokens,
                std::int64_t shared, const std::vector<std::string>& routes, bool poisons = false) {
  const WholeDecode whole(gpu(), s, contexts, 1);
  if (poisons) poison(whole, contexts);
  const PagedCaches paged(whole, tokens, shared);
  for (const std::string& route : routes) {
    INFO("type " << static_cast<int>(s.dtype) << ", d " << s.d_k << ", h " << s.heads_per_group << ", n "
                 << s.rules.n_sel << ", " << contexts.size() << " sequences, longest " << whole.tile.max_positions
                 << ", pages of " << tokens << ", " << shared << " shared, route " << route);
    const Result expected = run(whole, whole.sets[0], route), got = run(whole, paged.set, route);
    CHECK(is_finite(whole, expected));
    CHECK(got == expected);
  }
}

const std::vector<std::string> all = {"", "fused", "sdpa", "sdpa_gemm", "scalar"};

}  // namespace

TEST_CASE("a decode step on paged caches has the bits of one on contiguous caches", "[step][paged]") {
  for (const auto& [type, d, heads] : {std::tuple{DType::bf16, 128, 16},
                                       {DType::bf16, 64, 16},
                                       {DType::f16, 128, 5},
                                       {DType::bf16, 80, 40},
                                       {DType::f32, 64, 4}})
    for (const std::int64_t context : {1, 63, 700, 5001, 40000})
      check_same(shape_of(type, d, heads), std::vector<std::int64_t>(context > 9000 ? 9 : 3, context),
                 context == 5001 ? 192 : 64, context / 128, all);
}

TEST_CASE("a decode step on FP8 rows in pages has the bits of one on contiguous ones", "[step][paged][fp8]") {
  for (const std::int64_t context : {1, 63, 700, 5001, 40000})
    check_same(fp8_shape_of(16), std::vector<std::int64_t>(context > 9000 ? 9 : 3, context), context == 5001 ? 192 : 64,
               context / 128, {""});
  check_same(fp8_shape_of(4), {5000, 150, 30000, 2048, 131, 700}, 64, 1, {""});
}

// So many chosen blocks that the step does not run in one launch.
TEST_CASE("a paged decode step in several launches has the bits of a contiguous one", "[step][paged]") {
  for (const auto& [type, d, heads] : {std::tuple{DType::bf16, 128, 16}, {DType::bf16, 80, 40}, {DType::f32, 64, 6}})
    check_same(shape_of(type, d, heads, 40), {9000, 9000}, 64, 70, {""});
}

TEST_CASE("a ragged paged decode step has the bits of a contiguous one", "[step][paged][ragged]") {
  for (const int blocks : {16, 40})
    for (const DType type : {DType::bf16, DType::f16})
      check_same(shape_of(type, 128, 16, blocks), {5000, 150, 30000, 2048, 131, 700}, 64, 1, {"", "fused"});
}

// Prefixes that end inside a page of compressed tokens; own parts of other lengths, with NaN after their ends; batches
// that are no multiple of four, on one CTA of 8 or of 4 warps a work item, and on clusters.
TEST_CASE("a paged decode step of sequences that share a prefix", "[step][paged][ragged]") {
  for (const DType type : {DType::bf16, DType::f16}) {
    check_same(shape_of(type, 128, 16), std::vector<std::int64_t>(7, 9000), 64, 137, {""}, true);
    check_same(shape_of(type, 128, 5), std::vector<std::int64_t>(71, 3011), 192, 15, {""}, true);
    check_same(shape_of(type, 128, 16, 4), {9000, 12000, 8769, 9333, 9001, 20000, 9064, 8999, 8900}, 64, 137, {""},
               true);
  }
}

TEST_CASE("a small decode step on paged caches", "[step][paged][small]") {
  check_same(shape_of(DType::bf16, 128, 16), {700, 190}, 64, 1, {"", "fused"});
}
