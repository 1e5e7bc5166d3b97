// Every heads x kv layout of the world gives what one rank gives. Rank 0 alone computes that answer, then all
// ranks together theirs; rank 0 compares.

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <optional>

#include "catch.hpp"
#include "mpi/at_end.hpp"
#include "nsa/config/parts.hpp"
#include "parity/compare.hpp"
#include "parity/expected.hpp"
#include "parity/mixed.hpp"

namespace {

using namespace parity;
using oracle::Options;
using oracle::Reals;

/// All ranks together and rank 0 alone, with their communicators: opening NCCL's takes longer than all that is run.
struct Ranks {
  const nsa::ControlComm world = nsa::ControlComm::world(),
                         alone = world.split(world.rank() == 0 ? 0 : 1, world.rank());
  const nsa::Session together = open(world);
  const std::optional<nsa::Session> rank_0 = world.rank() == 0 ? std::optional(open(alone)) : std::nullopt;
  static nsa::Session open(const nsa::ControlComm& group) {
    return open_test_session(config_of({"any", 1, 1, {}}, nsa::TaskKind::decode), group);
  }
};

const Ranks& ranks() {
  static std::unique_ptr<Ranks> open;
  if (!open) {
    open = std::make_unique<Ranks>();
    at_end([] { open.reset(); });
  }
  return *open;
}

struct Answers {
  nsa::Config config;
  nsa::PointRecord one, all;  ///< complete on rank 0
};

nsa::PointRecord run_on_rank_0(const nsa::Config& config) {
  nsa::PointRecord record;
  std::string failure;
  try {
    if (ranks().rank_0) record = run(config, *ranks().rank_0);
  } catch (const std::exception& e) {
    failure = e.what();
  }
  // The others must not go on to wait for a rank that has left.
  ranks().world.agree(failure.empty() ? nsa::ExitCode::ok : nsa::ExitCode::invalid_result, failure);
  return record;
}

/// The config of a shape: of which phase.
using MakeConfig = nsa::Config (*)(const Shape&);
nsa::Config prefill(const Shape& shape) { return config_of(shape, nsa::TaskKind::prefill); }
nsa::Config decode(const Shape& shape) { return config_of(shape, nsa::TaskKind::decode); }
nsa::Config onto_prefix(const Shape& shape) { return prefix_config_of(shape); }
nsa::Config in_chunks(const Shape& shape) { return prefix_config_of(shape, 23); }

nsa::Config sharded(Shape shape, MakeConfig config_of_phase, int heads) {
  shape.overrides.push_back("parallel.heads=" + std::to_string(heads));
  shape.overrides.push_back("parallel.kv=" + std::to_string(ranks().world.size() / heads));
  return config_of_phase(shape);
}

void check_reads(const Answers& a) {
  CHECK(reads_as_expected(a.all));
  CHECK(a.all.reads.steps == a.one.reads.steps);
  for (const int c : {oracle::cmp, oracle::sel, oracle::win})
    for (std::int64_t step = 0; step < a.one.reads.steps; ++step)
      CHECK(counted_reads(a.all, c, step) == counted_reads(a.one, c, step));
}

/// The rows that were attended, wherever they were made, are those of the tensor that was given.
void check_given(const Answers& a, const char* attended, const char* given) {
  const oracle::Reals rows = reals(a.all, attended), all = reals(a.all, given);
  const std::int64_t batch = rows.shape[0], count = rows.shape[1], width = rows.shape[2] * rows.shape[3];
  bool same = true;
  for (std::int64_t b = 0; b < batch; ++b)
    same &= std::equal(rows.values.begin() + b * count * width, rows.values.begin() + (b + 1) * count * width,
                       all.values.begin() + (b * all.shape[1] + first_of(a.all)(b)) * width);
  INFO(given);
  CHECK(same);
}

const char* o_names[] = {"o_cmp", "o_sel", "o_win"};

/// How far the layout's o and one rank's may lie apart besides, by name, as a standard deviation: where both round
/// softmax weights, each relative to maxima of its own.
std::map<std::string, Reals> moves_apart(const Phase& phase) {
  std::map<std::string, Reals> moves;
  const oracle::Layer expected = expect(phase);
  for (const int c : {oracle::cmp, oracle::sel, oracle::win})
    moves[o_names[c]] = moves_of(phase, expected.attended, c, Against::layout);
  moves["o"] = moves_of_sum(phase, expected, Against::layout);
  for (auto& [name, all] : moves) {
    for (double& value : all.values) value *= std::sqrt(2.0);
    all = recorded_rows(phase, all);
  }
  return moves;
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
    difference = check_selection(options, selected, expected, reals(a.one, "p_slc"), first_of(a.one));
  } else {
    if (a.config.run.accept == 1) {  // else rows are not of consecutive positions
      check_given(a, "q", "given/q");
      check_given(a, "gate", "given/gate");
    }
    CHECK(selected.values == expected.values);
    CHECK(reals(a.all, "p_slc").values == reals(a.one, "p_slc").values);  // scores are reduced in one order
  }
  const Bound bound = bound_of(options);
  const Phase phase{a.config, a.all};
  std::map<std::string, Reals> moves;
  for (const int c : {oracle::cmp, oracle::sel, oracle::win})
    if (moves.empty() && rounds_weights(phase, c, Against::layout)) moves = moves_apart(phase);
  // y adds up what moved of every element of o: where o may move, y is held against the product of what o came to be.
  const bool follows_o = layer && !moves.empty();
  if (follows_o) {
    Options recorded = options;
    recorded.tokens = reals(a.all, "o").shape[1];
    check_close("y", reals(a.all, "y"),
                oracle::output(recorded, weights_of(a.config, a.all).back().w_o, reals(a.all, "o")), bound);
  }
  for (const char* name : {"q", "gate", "p_slc", "o_cmp", "o_sel", "o_win", layer && !follows_o ? "y" : "o"}) {
    const bool follows_selection = std::string(name) == "o_sel" || std::string(name) == "y" || std::string(name) == "o";
    if (difference.differing > 0 && follows_selection) continue;
    const Reals one = reals(a.one, name);
    check_close(name, reals(a.all, name), one, moves.count(name) ? moved(bound, one, moves.at(name)) : bound);
  }
  for (const char* name : {"k_cmp_tokens", "v_cmp_tokens"})
    check_close(name, reals(a.all, name), reals(a.one, name), bound);
  check_reads(a);
}

void check_layouts(Shape shape, const std::vector<MakeConfig>& phases = {prefill, decode}) {
  const int size = ranks().world.size();
  // As many groups as every number of head shards divides.
  const int groups = size % 3 == 0 ? 6 : 8;
  shape.overrides.push_back("model.n_kv_groups=" + std::to_string(groups));
  shape.overrides.push_back("model.n_heads=" + std::to_string(2 * groups));
  const bool ragged = std::ranges::any_of(shape.overrides, [](const auto& o) { return o.starts_with("batch."); });
  for (const MakeConfig config_of_phase : phases) {
    if (ragged && config_of_phase != decode) continue;
    const nsa::Config config = config_of_phase(shape);
    INFO((config.kind == nsa::TaskKind::prefill ? "prefill" : "decode"));
    Answers answers;
    answers.one = run_on_rank_0(config);
    for (int heads = 1; heads <= size; ++heads) {
      if (size % heads != 0) continue;
      INFO("heads " << heads << ", kv " << size / heads);
      answers.config = sharded(shape, config_of_phase, heads);
      answers.all = run(answers.config, ranks().together);
      if (ranks().world.rank() == 0) CHECK_NOTHROW(check_same(answers));  // a rank that leaves lets the others wait
    }
  }
}

const char* attention = "run.scope=\"attention\"";
const char* synthetic = "run.fill=\"synthetic\"";  // only decode has a cache to fill
const char *small = "parallel.kv_chunk_blocks=1", *tiles = "parallel.kv_chunk_blocks=8";
// Head sizes that a GPU's own kernels take, so that its sharded step runs at once: recorded, and in the measured pass,
// which exchanges less and is held against the recorded one.
const char *d_k = "model.d_k=64", *d_v = "model.d_v=64", *checked = "run.check=true",
           *bf16 = "model.precision=\"bf16\"", *paged = "cache.layout=\"paged\"",
           *ragged = "batch.context=[1, 271, 40, 5, 149]";

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
      {"ragged", 0, 5, {small, ragged, checked}},
      {"ragged, chunks of 2 blocks, bf16", 0, 5, {"parallel.kv_chunk_blocks=2", ragged, bf16}},
      {"L = 2, measured passes checked", 117, 5, {small, d_k, d_v, checked, "model.layers=2"}},
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
      {"measured passes checked", 271, 7, {attention, small, d_k, d_v, checked}},
      {"measured passes checked, bf16, B = 2", 271, 7, {attention, small, d_k, d_v, checked, bf16, "run.batch=2"}},
      // Chunks of whole tiles: the measured step hands over sums of blocks.
      {"measured passes checked, whole tiles", 613, 5, {attention, tiles, d_k, d_v, checked}},
      {"measured passes checked, whole tiles, bf16, B = 2",
       613,
       5,
       {attention, tiles, d_k, d_v, checked, bf16, "run.batch=2"}},
      {"ranks that own nothing, whole tiles, bf16", 37, 13, {attention, tiles, d_k, d_v, checked, bf16}},
      {"T = 1, whole tiles, bf16", 1, 18, {attention, tiles, d_k, d_v, checked, bf16}},
      {"ragged", 0, 7, {attention, small, ragged, checked}},
      {"ragged, caches filled directly", 0, 7, {attention, small, synthetic, ragged, checked}},
      {"ragged, whole tiles, bf16", 0, 5, {attention, tiles, d_k, d_v, ragged, checked, bf16}},
      {"shared_kv, bf16", 149, 5, {attention, small, "model.shared_kv=true", "model.precision=\"bf16\""}},
      {"paged, shared prefix", 271, 7, {attention, small, paged, "run.batch=2", "cache.shared_prefix=75", checked}},
      {"paged, ragged, caches filled directly", 0, 7, {attention, small, synthetic, paged, ragged, checked}},
      {"paged, FP8, shared prefix",
       271,
       7,
       {attention, small, paged, fp8_kv, fp8_cmp, "run.batch=2", "cache.shared_prefix=75", checked}},
      {"paged, whole tiles, bf16", 613, 5, {attention, tiles, paged, d_k, d_v, checked, bf16, "run.batch=2"}},
      {"FP8, measured passes checked, B = 2", 149, 5, {attention, small, fp8_kv, fp8_cmp, checked, "run.batch=2"}},
      {"FP8, ragged, caches filled directly", 0, 7, {attention, small, synthetic, ragged, fp8_kv, fp8_cmp}},
      {"FP8, shared_kv, bf16", 149, 5, {attention, small, "model.shared_kv=true", bf16, fp8_kv, fp8_cmp}},
  };
  for (Shape shape : shapes) DYNAMIC_SECTION(shape.name) {
      if (shape.name.starts_with("paged"))
        for (const char* key : {"cache.page=16", "cache.order=\"shuffled\""}) shape.overrides.push_back(key);
      check_layouts(shape);
    }
}

TEST_CASE("every layout gives the one-rank answer for several query tokens", "[mpi][tokens]") {
  const char *four = "run.query_tokens=4", *three = "run.query_tokens=3", *rejects = "run.accept=0.5";
  // The shared prefix ends inside a block.
  const std::vector<std::string> together = {attention,
                                             small,
                                             paged,
                                             checked,
                                             four,
                                             "batch.context=[80, 143, 300]",
                                             "cache.page=16",
                                             "cache.order=\"shuffled\"",
                                             "cache.shared_prefix=75"};
  const auto with_precision = [](std::vector<std::string> overrides, const char* precision) {
    overrides.push_back(precision);
    return overrides;
  };
  const std::vector<Shape> shapes = {
      {"attention, chunks of 1 block", 271, 4, {attention, small, four, "run.batch=2"}},
      {"attention, w = 70", 149, 4, {attention, small, four, "nsa.w=70"}},
      {"attention, T = 1", 1, 7, {attention, small, three}},
      {"attention, whole tiles, measured passes checked, bf16",
       613,
       3,
       {attention, tiles, d_k, d_v, checked, four, bf16}},
      {"attention, ragged, rejects", 0, 5, {attention, small, ragged, checked, four, rejects}},
      {"attention, rejects", 117, 6, {attention, small, four, rejects, "run.batch=3"}},
      {"L = 2, ragged", 0, 3, {small, ragged, "model.layers=2", three}},
      {"caches filled directly", 271, 3, {attention, small, synthetic, four}},
      {"all together, fp32", 0, 3, together},
      {"all together, bf16", 0, 3, with_precision(together, bf16)},
      {"all together, fp16", 0, 3, with_precision(together, "model.precision=\"fp16\"")},
      {"paged, ragged, rejects", 0, 4, {attention, small, paged, ragged, checked, four, rejects}},
  };
  for (const Shape& shape : shapes) DYNAMIC_SECTION(shape.name) {
      check_layouts(shape, {decode});
    }
}

TEST_CASE("every layout gives the one-rank answer onto a prefix and in chunks", "[mpi][prefix]") {
  const std::vector<Shape> shapes = {
      {"P in a stride", 90, 70, {attention, small, "run.batch=2"}},
      {"P at a block of a chunk", 96, 71, {attention, "parallel.kv_chunk_blocks=2", bf16}},
      {"P < l, L = 2", 6, 85, {small, "model.layers=2"}},
      {"FP8, P in a stride", 90, 70, {attention, small, fp8_kv, fp8_cmp}},
      {"P in a block, ranks that own no new row", 101, 9, {small, "nsa.l=16", "model.shared_kv=true"}},
      {"prefix filled directly, measured passes checked", 117, 50, {attention, small, synthetic, checked}},
      {"measured passes checked, whole tiles", 530, 150, {attention, tiles, d_k, d_v, checked, bf16}},
  };
  for (const Shape& shape : shapes) DYNAMIC_SECTION(shape.name) {
      check_layouts(shape, {onto_prefix, in_chunks});
    }
}

namespace {

/// Of every layout: a mixed step against its parts on the same layout, and its blocks against those of one rank.
void check_mixed_layouts(Shape shape, std::int64_t prefix, std::int64_t chunk) {
  const int size = ranks().world.size();
  const int groups = size % 3 == 0 ? 6 : 8;
  shape.overrides.push_back("model.n_kv_groups=" + std::to_string(groups));
  shape.overrides.push_back("model.n_heads=" + std::to_string(2 * groups));
  const nsa::PointRecord one = run_on_rank_0(mixed_config_of(shape, prefix, chunk));
  for (int heads = 1; heads <= size; ++heads) {
    if (size % heads != 0) continue;
    INFO("heads " << heads << ", kv " << size / heads);
    Shape layout = shape;
    layout.overrides.push_back("parallel.heads=" + std::to_string(heads));
    layout.overrides.push_back("parallel.kv=" + std::to_string(size / heads));
    const nsa::Config config = mixed_config_of(layout, prefix, chunk);
    const nsa::Point point = nsa::sweep(config).at(0);
    const nsa::PointRecord mixed = run(config, ranks().together),
                           rows = run(nsa::decode_rows_of(config, point).config, ranks().together),
                           alone = run(nsa::prefill_chunk_of(config, point).config, ranks().together);
    if (ranks().world.rank() != 0) continue;
    CHECK_NOTHROW(check_parts(mixed, rows, alone));
    CHECK(mixed.memory.measured_peak <= mixed.memory.planned);
    if (config.run.scope == nsa::Scope::layer) continue;  // a GEMM of another shape may round q otherwise
    for (const char* name : {"selected", "chunk/selected"})
      CHECK_NOTHROW([&] { CHECK(integers(mixed, name).values == integers(one, name).values); }());
  }
}

}  // namespace

TEST_CASE("in every layout a mixed step gives what its parts give alone", "[mpi][mixed]") {
  const Shape rows{"", 149, 4, {attention, small, checked, "run.batch=2"}},
      all{"", 0, 3, {attention, small, checked, ragged, paged, "cache.page=16", "run.query_tokens=4", bf16}};
  check_mixed_layouts(rows, 90, 70);
  check_mixed_layouts(all, 101, 70);
  check_mixed_layouts({"", 85, 3, {small, checked, "model.layers=2"}}, 0, 70);
}
