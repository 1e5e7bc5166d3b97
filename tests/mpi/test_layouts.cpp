// Every heads x kv layout of the world gives what one rank gives. Rank 0 alone computes that answer, then all
// ranks together theirs; rank 0 compares.

#include "catch.hpp"
#include "parity/compare.hpp"
#include "parity/product.hpp"

namespace {

using namespace parity;
using oracle::Options;
using oracle::Reals;

struct Answers {
  nsa::Config config;
  nsa::PointRecord one, all;  ///< complete on rank 0
};

Answers run_both(Shape shape, nsa::TaskKind kind, int heads) {
  const nsa::Control world = nsa::Control::world();
  const nsa::Control alone = world.split(world.rank() == 0 ? 0 : 1, world.rank());
  // As many groups as every number of head shards divides.
  const int groups = world.size() % 3 == 0 ? 6 : 8;
  shape.overrides.push_back("model.n_kv_groups=" + std::to_string(groups));
  shape.overrides.push_back("model.n_heads=" + std::to_string(2 * groups));
  Answers answers;
  std::string failure;
  try {
    if (world.rank() == 0) answers.one = run(config_of(shape, kind), alone);
  } catch (const std::exception& e) {
    failure = e.what();
  }
  // The others must not go on to wait for a rank that has left.
  world.agree(failure.empty() ? nsa::ExitCode::ok : nsa::ExitCode::invalid_result, failure);
  shape.overrides.push_back("parallel.heads=" + std::to_string(heads));
  shape.overrides.push_back("parallel.kv=" + std::to_string(world.size() / heads));
  answers.config = config_of(shape, kind);
  answers.all = run(answers.config, world);
  return answers;
}

void check_reads(const Answers& a) {
  CHECK(reads_as_expected(a.all));
  CHECK(a.all.reads.steps == a.one.reads.steps);
  for (const int c : {oracle::cmp, oracle::sel, oracle::win})
    for (std::int64_t step = 0; step < a.one.reads.steps; ++step)
      CHECK(counted_reads(a.all, c, step) == counted_reads(a.one, c, step));
}

/// On rank 0.
void check_same(const Answers& a) {
  const bool layer = a.config.run.scope == nsa::Scope::layer;
  const Options options = options_of(a.config);
  CHECK(a.all.valid);
  CHECK(a.all.first_position == a.one.first_position);
  const oracle::Integers selected = integers(a.all, "selected"), expected = integers(a.one, "selected");
  SelectionDifference difference;
  if (layer) {  // a GEMM of another shape may round q otherwise, and scores with it
    difference = check_selection(options, selected, expected, reals(a.one, "p_slc"), a.one.first_position);
  } else {
    CHECK(selected.values == expected.values);
    CHECK(reals(a.all, "p_slc").values == reals(a.one, "p_slc").values);  // scores are reduced in one order
  }
  const Bound bound = bound_of(options);
  for (const char* name : {"q", "gate", "p_slc", "o_cmp", "o_sel", "o_win", layer ? "y" : "o"}) {
    const bool follows_selection = std::string(name) == "o_sel" || std::string(name) == "y" || std::string(name) == "o";
    if (difference.differing > 0 && follows_selection) continue;
    check_close(name, reals(a.all, name), reals(a.one, name), bound);
  }
  for (const char* name : {"k_cmp_tokens", "v_cmp_tokens"})
    check_close(name, reals(a.all, name), reals(a.one, name), bound);
  check_reads(a);
}

void check_layouts(const Shape& shape) {
  const nsa::Control world = nsa::Control::world();
  for (int heads = 1; heads <= world.size(); ++heads) {
    if (world.size() % heads != 0) continue;
    for (const nsa::TaskKind kind : {nsa::TaskKind::prefill, nsa::TaskKind::decode}) {
      INFO("heads " << heads << ", kv " << world.size() / heads);
      INFO((kind == nsa::TaskKind::prefill ? "prefill" : "decode"));
      const Answers answers = run_both(shape, kind, heads);
      if (world.rank() == 0) CHECK_NOTHROW(check_same(answers));  // a rank that leaves lets the others wait
    }
  }
}

const char* attention = "run.scope=\"attention\"";
const char* synthetic = "run.fill=\"synthetic\"";  // only decode has a cache to fill
const char* small = "parallel.kv_chunk_blocks=1";

}  // namespace

TEST_CASE("every layout gives the one-rank answer", "[mpi][layer]") {
  const std::vector<Shape> shapes = {
      {"chunks of 1 block", 143, 7, {small}},
      {"chunks of 2 blocks, B = 2", 149, 5, {"parallel.kv_chunk_blocks=2", "run.batch=2"}},
      {"ranks that own nothing", 37, 13, {"parallel.kv_chunk_blocks=2"}},
      {"one chunk holds all", 29, 6, {}},
      {"T = 1", 1, 18, {small}},
      {"l = l', w = 1", 117, 5, {small, "nsa.l=16", "nsa.w=1"}},
      {"l = d, w > T", 117, 5, {small, "nsa.l=4", "nsa.w=512"}},
      {"learned phi, sigmoid, Dk != Dv", 85, 9, {small, "nsa.phi=\"mlp\"", "model.gate=\"sigmoid\"", "model.d_v=24"}},
      {"shared_kv, n_init = 0", 117, 5, {small, "model.shared_kv=true", "nsa.n_init=0"}},
      {"L = 2", 85, 5, {small, "model.layers=2"}},
      {"bf16", 117, 5, {small, "model.precision=\"bf16\""}},
      {"caches filled directly", 117, 5, {small, synthetic}},
  };
  for (const Shape& shape : shapes) DYNAMIC_SECTION(shape.name) {
      check_layouts(shape);
    }
}

TEST_CASE("every layout gives the one-rank answer on every route", "[mpi][routes]") {
  const char *sdpa = "route.sel=\"sdpa\"", *masked = "route.sel=\"masked\"";
  const std::vector<Shape> shapes = {
      {"sdpa", 143, 7, {attention, small, "route.cmp=\"sdpa\"", sdpa, "route.win=\"sdpa\""}},
      {"masked", 143, 7, {attention, small, "route.cmp=\"sdpa\"", masked, "route.win=\"masked\""}},
      {"sdpa, T < l", 5, 30, {attention, small, "route.cmp=\"sdpa\"", sdpa, "route.win=\"sdpa\""}},
      {"masked, bf16, B = 2",
       149,
       5,
       {small, masked, "route.win=\"masked\"", "run.batch=2", "model.precision=\"bf16\""}},
  };
  for (const Shape& shape : shapes) DYNAMIC_SECTION(shape.name) {
      check_layouts(shape);
    }
}

TEST_CASE("for the same q and k every layout chooses the same blocks, bit for bit", "[mpi][attention]") {
  const std::vector<Shape> shapes = {
      {"chunks of 1 block", 271, 7, {attention, small}},
      {"chunks of 2 blocks, B = 2", 149, 5, {attention, "parallel.kv_chunk_blocks=2", "run.batch=2"}},
      {"ranks that own nothing", 37, 13, {attention, "parallel.kv_chunk_blocks=2"}},
      {"T = 1", 1, 18, {attention, small}},
      {"caches filled directly", 271, 7, {attention, small, synthetic}},
      {"shared_kv, bf16", 149, 5, {attention, small, "model.shared_kv=true", "model.precision=\"bf16\""}},
  };
  for (const Shape& shape : shapes) DYNAMIC_SECTION(shape.name) {
      check_layouts(shape);
    }
}
