// The gate's arithmetic on made-up files with known answers.

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <sstream>

#include "catch.hpp"
#include "kernels/diagnostics/error.hpp"
#include "nsa/config/config.hpp"
#include "nsa/gate/gate.hpp"

using namespace nsa;

namespace {

constexpr std::int64_t reps = 41;  // odd, so that the median is the middle of a spread

/// `middle` with a spread of +-`spread`, in no order.
std::vector<double> around(double middle, double spread) {
  std::vector<double> samples;
  for (std::int64_t i = 0; i < reps; ++i)
    samples.push_back(middle + spread * (static_cast<double>((i * 17) % reps) / ((reps - 1) / 2.0) - 1));
  return samples;
}

struct Shares {
  double selection = 40, total = 100, without_selection = 60;  ///< us; the stages add up to 100
  double spread = 0.5;                                         ///< of the selection, us
};

PointRecord decode_point(std::int64_t context, const Shares& shares = {}) {
  PointRecord p;
  p.parameters = {{"task.kind", "decode"},         {"model.precision", "bf16"}, {"model.d_k", std::int64_t{64}},
                  {"nsa.l_sel", std::int64_t{64}}, {"run.context", context},    {"run.batch", std::int64_t{1}},
                  {"run.force_branch", "none"}};
  p.routes = {"sdpa", "sdpa", "sdpa"};
  p.time.modes = {"branches", "total", "ablation_cmp", "ablation_sel", "ablation_win"};
  p.time.ranks = 1;
  p.time.reps = reps;
  const std::vector<double> selection = around(shares.selection, shares.spread);
  const auto set = [&](int mode, Stage stage, auto&& at) {
    for (std::int64_t rep = 0; rep < reps; ++rep)
      p.time.seconds[static_cast<std::size_t>((mode * stage_count + static_cast<int>(stage)) * reps + rep)] =
          1e-6 * at(rep);
  };
  p.time.seconds.assign(p.time.modes.size() * stage_count * reps, std::nan(""));
  set(0, Stage::rank, [&](auto rep) { return selection[rep] / 4; });
  set(0, Stage::attend_sel, [&](auto rep) { return selection[rep] * 3 / 4; });
  set(0, Stage::attend_cmp, [&](auto rep) { return (100 - selection[rep]) / 2; });
  set(0, Stage::attend_win, [&](auto rep) { return (100 - selection[rep]) / 4; });
  set(0, Stage::output, [&](auto rep) { return (100 - selection[rep]) / 4; });
  set(0, Stage::step, [](auto) { return 100; });
  set(1, Stage::step, [&](auto rep) { return shares.total + 0.01 * static_cast<double>(rep % 3); });
  set(2, Stage::step, [&](auto) { return shares.total - 30; });
  set(3, Stage::step, [&](auto rep) { return shares.without_selection + 0.01 * static_cast<double>(rep % 3); });
  set(4, Stage::step, [&](auto) { return shares.total - 15; });
  return p;
}

struct Speeds {
  double sdpa = 30, packed = 11, fused = 10, spread = 0.1;  ///< us
  double error = 2e-4, error_se = 1e-6;
};

PointRecord kernels_point(std::int64_t n, const Speeds& speeds = {}) {
  PointRecord p;
  p.parameters = {{"task.kind", "kernels"},
                  {"model.precision", "bf16"},
                  {"nsa.l_sel", std::int64_t{64}},
                  {"kernels.branch", "sel"},
                  {"kernels.rows", std::int64_t{256}},
                  {"kernels.heads", std::int64_t{4}},
                  {"kernels.head_size", std::int64_t{64}},
                  {"kernels.blocks", n},
                  {"kernels.spans", "scattered"}};
  KernelRecord& k = p.kernels;
  k.implementations = {"fused", "sdpa", "sdpa_packed"};
  k.ranks = 1;
  k.reps = reps;
  for (const double middle : {speeds.fused, speeds.sdpa, speeds.packed})
    for (const double us : around(middle, middle == speeds.fused ? 0 : speeds.spread)) k.seconds.push_back(us * 1e-6);
  k.variants = {"rows", "sdpa", "sdpa"};
  k.mean_abs_err = {speeds.error, 1e-4, 1e-4};
  k.mean_abs_err_se = {speeds.error_se, 1e-6, 1e-6};
  k.max_abs_err = {3e-3, 2e-3, 2e-3};
  return p;
}

GateFile file(const std::string& path, std::vector<PointRecord> points, const std::string& gpu = "NVIDIA H200") {
  GateFile f{path, {}};
  f.result.run.backend = "cuda";
  f.result.run.git_commit = "abc";
  f.result.run.status = "complete";
  f.result.run.system.resize(1);
  f.result.run.system[0].gpu = gpu;
  f.result.points = std::move(points);
  return f;
}

DeviceVerdict verdict(const Shares& shares, const Speeds& speeds) {
  return judge(
             {file("d.h5", {decode_point(1024, shares)}), file("k.h5", {kernels_point(8), kernels_point(16, speeds)})})
      .at(0);
}

std::string refusal(const std::vector<GateFile>& files) {
  try {
    judge(files);
  } catch (const UserError& error) {
    return error.what();
  }
  return "accepted";
}

bool contains(const std::string& text, const std::string& part) {
  if (text.find(part) != std::string::npos) return true;
  UNSCOPED_INFO("'" << text << "' lacks '" << part << "'");
  return false;
}

}  // namespace

TEST_CASE("gate: three conditions met", "[gate]") {
  const DeviceVerdict v = verdict({}, {});
  CHECK(v.verdict == Verdict::proceed);
  REQUIRE(v.contexts.size() == 1);
  CHECK(v.contexts[0].share.measured.value == Approx(0.40));
  CHECK(v.contexts[0].share.measured.low == Approx(0.40 - 0.005 * 7.0 / 20));  // n = 41: ranks (14, 28)
  CHECK(v.contexts[0].share_high.outcome == Outcome::met);
  CHECK(v.contexts[0].share_ablation.value == Approx(0.40).epsilon(1e-3));
  CHECK(v.contexts[0].share_attention.value == Approx(40.0 / 85).epsilon(1e-2));
  CHECK(v.speedup.measured.value == Approx(3.0));
  CHECK(v.speedup_packed.measured.value == Approx(1.1));
  CHECK(v.speedup_packed.outcome == Outcome::not_met);  // printed; the one with the gather decides
  CHECK(v.error.measured.value == Approx(2e-4));
  CHECK(contains(v.why, "ship the kernel at contexts 1024"));
}

TEST_CASE("gate: a record names the kernel of each shape, where the file does", "[gate]") {
  PointRecord old = kernels_point(16);
  old.kernels.variants.clear();  // before schema 1.3
  const DeviceVerdict v = judge({file("d.h5", {decode_point(1024)}), file("k.h5", {kernels_point(8), old})}).at(0);
  std::ostringstream record, json;
  print_adr(record, v);
  CHECK(contains(
      record.str(),
      "| N=256 H=4 D=64 n=8 scattered | rows | 3.00x [3.00, 3.00] | sdpa | 1.10x [1.10, 1.10] | sdpa_packed |"));
  CHECK(
      contains(record.str(),
               "| N=256 H=4 D=64 n=16 scattered | - | 3.00x [3.00, 3.00] | sdpa | 1.10x [1.10, 1.10] | sdpa_packed |"));
  print_gate_json(json, {v}, {});
  CHECK(contains(json.str(), R"({"name":"N=256 H=4 D=64 n=8 scattered","kernel":"rows",)"));
}

TEST_CASE("gate: without the gather the faster packed attention counts", "[gate]") {
  PointRecord k = kernels_point(8);
  k.kernels.implementations.push_back("flash_packed");
  k.kernels.seconds.insert(k.kernels.seconds.end(), reps, 9e-6);
  const DeviceVerdict v = judge({file("d.h5", {decode_point(1024)}), file("k.h5", {k})}).at(0);
  CHECK(v.speedup_packed.measured.value == Approx(0.9));
  CHECK(v.speedup.measured.value == Approx(3.0));
}

TEST_CASE("gate: each condition alone failing means STAY", "[gate]") {
  const auto stays = [](const Shares& shares, const Speeds& speeds, const std::string& why) {
    const DeviceVerdict v = verdict(shares, speeds);
    CHECK(v.verdict == Verdict::stay);
    CHECK(contains(v.why, why));
    CHECK(v.why.find(';') == v.why.rfind(';'));  // one reason
  };
  stays({20, 100, 80}, {}, "selection's share of the step >= 25% is not met (20.0%)");
  stays({}, {.sdpa = 11.5},
        "speed over packed SDPA with its gather >= 1.2x is not met (1.15x, worst: N=256 H=4 D=64 n=16 scattered "
        "against sdpa)");
  stays({}, {.error = 2e-3}, "mean absolute error <= 1e-3 is not met (2.0e-03, worst: N=256 H=4 D=64 n=16 scattered)");
}

TEST_CASE("gate: one shape is enough to fail", "[gate]") {
  const DeviceVerdict v = verdict({}, {.sdpa = 11});
  CHECK(v.verdict == Verdict::stay);
  CHECK(v.speedup.why == "worst: N=256 H=4 D=64 n=16 scattered against sdpa");
}

TEST_CASE("gate: each interval over its threshold means INCONCLUSIVE", "[gate]") {
  const auto open = [](const Shares& shares, const Speeds& speeds, const std::string& why) {
    const DeviceVerdict v = verdict(shares, speeds);
    CHECK(v.verdict == Verdict::inconclusive);
    CHECK(contains(v.why, why));
  };
  open({25, 100, 75, 2.0}, {}, "selection's share of the step >= 25% is open (the interval holds 25%");
  open({}, {.sdpa = 12, .spread = 1.0},
       "is open (worst: N=256 H=4 D=64 n=16 scattered against sdpa; the interval holds 1.2");
  open({}, {.error = 1e-3, .error_se = 1e-5}, "mean absolute error <= 1e-3 is open");
}

TEST_CASE("gate: a threshold that is just met is met", "[gate]") {
  CHECK(verdict({25, 100, 75, 0}, {}).verdict == Verdict::proceed);
  CHECK(verdict({}, {.sdpa = 12.0001, .spread = 0}).verdict == Verdict::proceed);
  CHECK(verdict({}, {.error = 1e-3, .error_se = 0}).verdict == Verdict::proceed);
}

TEST_CASE("gate: 25% may be met where 30% is not", "[gate]") {
  const DeviceVerdict v = verdict({27, 100, 73}, {});
  CHECK(v.verdict == Verdict::proceed);
  CHECK(v.contexts[0].share_high.outcome == Outcome::not_met);
}

TEST_CASE("gate: a failed condition decides although another is open", "[gate]") {
  CHECK(verdict({25, 100, 75, 2.0}, {.error = 2e-3}).verdict == Verdict::stay);
}

TEST_CASE("gate: stages and ablation on opposite sides leave the share open", "[gate]") {
  const DeviceVerdict v = verdict({40, 100, 90}, {});
  CHECK(v.verdict == Verdict::inconclusive);
  CHECK(contains(v.why, "the stages say 40.0%, leaving selection out saves 10.0%: on opposite sides of 25%"));
}

TEST_CASE("gate: by how much the two costs of a step differ, and why", "[gate]") {
  DeviceVerdict v = verdict({40, 80, 40}, {});  // the stages add up to 100 us, the step takes 80
  const std::vector<CostBreakdown>& a = v.contexts[0].costs;
  REQUIRE(a.size() == 4);
  CHECK(a[0].name == "step");
  CHECK(a[0].stages.value == Approx(100e-6));
  CHECK(a[0].step.value == Approx(80e-6).epsilon(1e-3));
  CHECK_FALSE(a[0].agree);
  CHECK(contains(a[0].why, "neither overlap nor share a launch"));
  CHECK(a[1].step.value == Approx(30e-6).epsilon(1e-3));  // cmp: 30 by its stage, 30 by leaving it out
  CHECK(a[1].agree);
  CHECK(a[2].agree);
  CHECK(a[3].agree);
  std::ostringstream page;
  print_gate(page, v);
  CHECK(contains(page.str(),
                 "* step (stages timed one by one neither overlap nor share a launch, and may wait for theirs): first "
                 "minus second +20.0 us at 1024"));
  CHECK(contains(page.str(),
                 "selection's share by its stages and by leaving it out: 10.0 to 10.0 points apart, on one side "
                 "of 25% at 1 of 1 contexts"));
  CHECK(page.str().find("nsa-vibe's way") == std::string::npos);
}

TEST_CASE("gate: one-hot gates are printed and decide nothing", "[gate]") {
  PointRecord p = decode_point(1024);
  p.time.modes[4] = "one_hot_sel";  // 85 of 100 us
  const DeviceVerdict v = judge({file("d.h5", {p}), file("k.h5", {kernels_point(8)})}).at(0);
  CHECK(v.contexts[0].one_hot.value == Approx(0.85).epsilon(1e-3));
  CHECK(v.verdict == Verdict::proceed);
  std::ostringstream page;
  print_gate(page, v);
  CHECK(contains(page.str(), "(nothing is left out): 1024: 85%"));
}

TEST_CASE("gate: a missing mode or run is named with the command that makes it", "[gate]") {
  PointRecord p = decode_point(1024);
  p.time.modes[3] = "ablation_other";
  DeviceVerdict v = judge({file("d.h5", {p}), file("k.h5", {kernels_point(8)})}).at(0);
  CHECK(v.verdict == Verdict::inconclusive);
  CHECK(contains(v.why, "no ablation_sel: nsa run inputs/m4_decode.toml --set run.context=1024"));

  p = decode_point(1024);
  p.routes[sel] = "fused";
  v = judge({file("d.h5", {p}), file("k.h5", {kernels_point(8)})}).at(0);
  CHECK(v.verdict == Verdict::inconclusive);
  CHECK(contains(v.why, "selection ran as fused"));

  v = judge({file("d.h5", {decode_point(1024)})}).at(0);
  CHECK(v.verdict == Verdict::inconclusive);
  CHECK(contains(v.why, "not measured: nsa run inputs/m4_kernels.toml"));

  v = judge({file("k.h5", {kernels_point(8)})}).at(0);
  CHECK(v.verdict == Verdict::inconclusive);
  CHECK(contains(v.why, "no valid decode point, so no share of selection: nsa run inputs/m4_decode.toml"));

  PointRecord k = kernels_point(8);
  k.kernels.implementations[1] = "masked";
  v = judge({file("d.h5", {decode_point(1024)}), file("k.h5", {k})}).at(0);
  CHECK(v.verdict == Verdict::inconclusive);
  CHECK(contains(v.why, "N=256 H=4 D=64 n=8 scattered lacks an implementation, or was not checked"));
}

TEST_CASE("gate: too few samples say how many are needed", "[gate]") {
  PointRecord p = decode_point(1024);
  p.warmup_reps = reps - 5;
  const DeviceVerdict v = judge({file("d.h5", {p}), file("k.h5", {kernels_point(8)})}).at(0);
  CHECK(v.verdict == Verdict::inconclusive);
  CHECK(contains(v.why, "5 samples give no interval here, 6 do"));
}

TEST_CASE("gate: intervals of many contexts hold together", "[gate]") {
  std::vector<PointRecord> points;
  for (std::int64_t i = 0; i < 10; ++i) points.push_back(decode_point(128 << i));
  const auto v = judge({file("d.h5", points), file("k.h5", {kernels_point(8)})}).at(0);
  REQUIRE(v.contexts.size() == 10);
  // n = 41 at 1 - 0.05/10: ranks (12, 30), nine from the middle.
  CHECK(v.contexts[0].share.measured.low == Approx(0.40 - 0.005 * 9.0 / 20));
}

TEST_CASE("gate: invalid points are left out and named", "[gate]") {
  PointRecord bad = decode_point(2048);
  bad.fail("reads differ");
  DeviceVerdict v = judge({file("d.h5", {decode_point(1024), bad}), file("k.h5", {kernels_point(8)})}).at(0);
  CHECK(v.verdict == Verdict::inconclusive);
  REQUIRE(v.contexts.size() == 2);
  CHECK(v.contexts[0].verdict == Verdict::proceed);
  CHECK(v.contexts[1].verdict == Verdict::inconclusive);
  CHECK(contains(v.why, "not measured: context 2048: INVALID in d.h5 (reads differ)"));
  CHECK(contains(v.why, "the kernel pays at contexts 1024"));
  REQUIRE(v.notes.size() == 2);  // and that no library is among the baselines
  CHECK(contains(v.notes[0], "d.h5: context 2048, batch 1, forced branch none is left out, INVALID (reads differ)"));

  PointRecord shape = kernels_point(16);
  shape.fail("wrong");
  v = judge({file("d.h5", {decode_point(1024)}), file("k.h5", {kernels_point(8), shape})}).at(0);
  CHECK(v.verdict == Verdict::inconclusive);  // the shape has no valid measurement
  CHECK(contains(v.why, "N=256 H=4 D=64 n=16 scattered: INVALID in k.h5 (wrong)"));
  v = judge({file("d.h5", {decode_point(1024)}), file("k.h5", {shape})}).at(0);
  CHECK(v.verdict == Verdict::inconclusive);
  CHECK(contains(v.why, "N=256 H=4 D=64 n=16 scattered: INVALID in k.h5 (wrong)"));
}

TEST_CASE("gate: what an input asks for and its file does not hold is open", "[gate]") {
  Config asks_contexts, asks_shapes;
  asks_contexts.run.context = {1024, 2048, 4096};
  asks_shapes.kind = TaskKind::kernels;
  asks_shapes.run.context = {0};  // the points of this file name none
  asks_shapes.kernels.blocks = {8, 16, 32};
  const auto asked = [](GateFile file, const Config& config, const std::string& status = "interrupted") {
    file.result.run.config = to_toml(config);
    file.result.run.status = status;
    return file;
  };
  const auto decode = [](std::initializer_list<std::int64_t> contexts) {
    std::vector<PointRecord> points;
    for (const std::int64_t context : contexts) points.push_back(decode_point(context));
    return points;
  };
  const GateFile all_decode = asked(file("d.h5", decode({1024, 2048, 4096})), asks_contexts, "complete");
  const GateFile all_shapes =
      asked(file("k.h5", {kernels_point(8), kernels_point(16), kernels_point(32)}), asks_shapes, "complete");
  CHECK(judge({all_decode, all_shapes}).at(0).verdict == Verdict::proceed);

  SECTION("shapes") {
    const GateFile one = asked(file("k.h5", {kernels_point(8)}), asks_shapes);
    const DeviceVerdict v = judge({all_decode, one}).at(0);
    CHECK(v.verdict == Verdict::inconclusive);
    CHECK(v.speedup.outcome == Outcome::open);
    CHECK(v.speedup_packed.outcome == Outcome::not_met);  // 1.1: a shape fails whatever the others give
    CHECK(v.error.outcome == Outcome::open);
    CHECK(contains(v.why,
                   "N=256 H=4 D=64 n=16 scattered and 1 more: not in k.h5 (status interrupted), whose input "
                   "asks for it; go on with --resume"));
    CHECK(std::count_if(v.notes.begin(), v.notes.end(), [](const std::string& note) {
            return note.find(
                       "k.h5 lacks 2 of the 3 points that its input asks for: branch sel, context 0, N=256 H=4 "
                       "D=64 n=16 scattered; branch sel, context 0, N=256 H=4 D=64 n=32 scattered") == 0;
          }) == 1);
    // A shape that fails decides, whatever is missing.
    const DeviceVerdict slow =
        judge({all_decode, asked(file("k.h5", {kernels_point(8, {.sdpa = 11})}), asks_shapes)}).at(0);
    CHECK(slow.verdict == Verdict::stay);
    // Another file may hold the rest.
    CHECK(judge({all_decode, one, file("k2.h5", {kernels_point(16), kernels_point(32)})}).at(0).verdict ==
          Verdict::proceed);
  }
  SECTION("a killed run is as open as an interrupted one") {
    const DeviceVerdict v = judge({all_decode, asked(file("k.h5", {kernels_point(8)}), asks_shapes, "running")}).at(0);
    CHECK(v.verdict == Verdict::inconclusive);
    CHECK(contains(v.why, "not in k.h5 (status running)"));
  }
  SECTION("contexts") {
    const std::vector<GateFile> files = {asked(file("d.h5", decode({1024})), asks_contexts), all_shapes};
    const DeviceVerdict v = judge(files).at(0);
    CHECK(v.verdict == Verdict::inconclusive);
    REQUIRE(v.contexts.size() == 3);
    CHECK(v.contexts[0].verdict == Verdict::proceed);
    CHECK(v.contexts[2].share.outcome == Outcome::open);
    CHECK(v.missing == std::vector<std::string>{"context 2048, context 4096: not in d.h5 (status interrupted), whose "
                                                "input asks for it; go on with --resume"});
    CHECK(contains(v.why, "not measured: context 2048, context 4096: not in d.h5"));
    CHECK(contains(v.why, "the kernel pays at contexts 1024"));
    CHECK(judge(files, {1024}).at(0).verdict == Verdict::proceed);  // --context: the others do not count
    std::ostringstream json;
    print_gate_json(json, {v}, {});
    CHECK(contains(json.str(), R"("missing":["context 2048, context 4096: not in d.h5 )"));
    // Where the kernel fails no share can help.
    CHECK(
        judge({files[0], asked(file("k.h5", {kernels_point(8, {.error = 2e-3}), kernels_point(16), kernels_point(32)}),
                               asks_shapes, "complete")})
            .at(0)
            .verdict == Verdict::stay);
  }
  SECTION("a point that was cut short is not measured") {
    GateFile cut = all_decode;
    cut.result.run.status = "interrupted";
    cut.result.points[1].stop_reason = "interrupted";
    DeviceVerdict v = judge({cut, all_shapes}).at(0);
    CHECK(v.verdict == Verdict::inconclusive);
    CHECK(contains(v.why, "not measured: context 2048: cut short in d.h5; go on with --resume"));
    cut = all_shapes;
    cut.result.points[2].stop_reason = "interrupted";
    v = judge({all_decode, cut}).at(0);
    CHECK(v.verdict == Verdict::inconclusive);
    CHECK(contains(v.why, "N=256 H=4 D=64 n=32 scattered: cut short in k.h5"));
  }
  SECTION("a run that did not end and does not say what it asks for") {
    GateFile old = all_shapes;
    old.result.run.config.clear();  // before schema 1.1
    CHECK(judge({all_decode, old}).at(0).verdict == Verdict::proceed);
    old.result.run.status = "running";
    DeviceVerdict v = judge({all_decode, old}).at(0);
    CHECK(v.verdict == Verdict::inconclusive);
    CHECK(contains(v.why, "points of k.h5: its run did not end (status running)"));
    old = all_decode;
    old.result.run.config = "[run]\nkey_of_another_version = 1\n";
    old.result.run.status = "running";
    v = judge({old, all_shapes}).at(0);
    CHECK(v.verdict == Verdict::inconclusive);
    CHECK(contains(v.why, "not measured: points of d.h5: its run did not end (status running)"));
  }
}

TEST_CASE("gate: a value without a finite interval decides nothing", "[gate]") {
  const auto with = [](const std::function<void(PointRecord&)>& spoil) {
    PointRecord k = kernels_point(16);
    spoil(k);
    return judge({file("d.h5", {decode_point(1024)}), file("k.h5", {kernels_point(8), k})}).at(0);
  };
  const double nan = std::nan("");
  DeviceVerdict v = with([&](PointRecord& k) { std::fill_n(k.kernels.seconds.begin(), reps, nan); });
  CHECK(v.verdict == Verdict::inconclusive);
  CHECK(contains(v.why, "N=256 H=4 D=64 n=16 scattered against sdpa lacks an implementation, or was not checked"));
  v = with([](PointRecord& k) { std::fill_n(k.kernels.seconds.begin(), reps, 0.0); });
  CHECK(v.verdict == Verdict::inconclusive);  // infinitely fast
  v = with([&](PointRecord& k) { k.kernels.mean_abs_err_se[0] = nan; });
  CHECK(v.verdict == Verdict::inconclusive);
  CHECK(contains(v.why, "mean absolute error <= 1e-3 is open"));
  v = with([](PointRecord& k) { k.kernels.mean_abs_err[0] = std::numeric_limits<double>::infinity(); });
  CHECK(v.verdict == Verdict::inconclusive);
}

namespace {

/// A file of torch's times, us, for the given points.
GateFile peers_file(const std::vector<PointRecord>& points, double gather, double packed) {
  GateFile f = file("peers.h5", points);
  f.result.run.program = "torch 2.11.0";
  f.result.run.git_commit = "of the script";
  for (PointRecord& p : f.result.points) {
    KernelRecord& k = p.kernels;
    k.implementations = {"torch_flash_sdpa", "torch_cudnn_sdpa", "torch_cudnn_sdpa_packed", "flash_nsa"};
    k.variants = {"", "", "", ""};
    k.mean_abs_err = k.mean_abs_err_se = k.max_abs_err = {1e-4, 1e-4, 1e-4, 1e-4};
    k.seconds.clear();
    for (const double middle : {gather + 1, gather, packed, 1.0})
      for (const double us : around(middle, 0.1)) k.seconds.push_back(us * 1e-6);
  }
  return f;
}

}  // namespace

TEST_CASE("gate: the fastest baseline decides, a library's too, and is named", "[gate]") {
  const std::vector<PointRecord> shapes = {kernels_point(8), kernels_point(16)};
  const GateFile decode = file("d.h5", {decode_point(1024)}), own = file("k.h5", shapes);
  const auto with = [&](const GateFile& peers) { return judge({decode, own, peers}).at(0); };

  DeviceVerdict v = judge({decode, own}).at(0);
  CHECK(v.verdict == Verdict::proceed);
  CHECK(v.why.ends_with("; no library's SDPA is among the baselines"));
  CHECK(contains(v.notes.at(0),
                 "no library's SDPA is among the baselines; on this device: python3 "
                 "scripts/bench/bench_gpu.py --selection --output peers.h5"));

  v = with(peers_file(shapes, 15, 10.5));  // ours: 30 with the gather, 11 packed; fused 10
  CHECK(v.verdict == Verdict::proceed);
  CHECK(v.why.find("no library") == std::string::npos);
  CHECK(v.peers == std::vector<std::string>{"torch 2.11.0 (peers.h5)"});
  CHECK(v.speedup.measured.value == Approx(1.5));
  // n = 41, alpha 0.05 / 2 shapes / 2 runs: ranks (13, 29), 8 of 20 from the middle; fused has no spread.
  CHECK(v.speedup.measured.low == Approx(1.5 - 0.01 * 8 / 20));
  CHECK(v.speedup.measured.high == Approx(1.5 + 0.01 * 8 / 20));
  CHECK(v.speedup.why == "worst: N=256 H=4 D=64 n=8 scattered against torch_cudnn_sdpa");
  CHECK(v.speedup_packed.measured.value == Approx(1.05));
  CHECK(v.shapes[0].packed.baseline == "torch_cudnn_sdpa_packed");
  CHECK(contains(v.why,
                 "1.50x as fast as the fastest packed SDPA with its gather on every shape (worst: N=256 H=4 D=64 "
                 "n=8 scattered against torch_cudnn_sdpa)"));
  std::ostringstream record, json;
  print_adr(record, v);
  CHECK(contains(record.str(), "- Baselines: packed SDPA of this program, torch 2.11.0 (peers.h5)"));
  CHECK(contains(record.str(), "| 1.50x [1.50, 1.50] | torch_cudnn_sdpa |"));
  print_gate_json(json, {v}, {});
  CHECK(contains(json.str(), R"("with_gather_baseline":"torch_cudnn_sdpa",)"));
  CHECK(contains(json.str(), R"x("peers":["torch 2.11.0 (peers.h5)"])x"));

  v = with(peers_file(shapes, 11.5, 10.5));
  CHECK(v.verdict == Verdict::stay);
  CHECK(contains(v.why, "is not met (1.15x, worst: N=256 H=4 D=64 n=8 scattered against torch_cudnn_sdpa)"));

  v = with(peers_file(shapes, 40, 20));  // slower than ours: nothing changes
  CHECK(v.speedup.measured.value == Approx(3.0));
  CHECK(v.shapes[0].with_gather.baseline == "sdpa");
}

TEST_CASE("gate: peers are paired by work and by card", "[gate]") {
  const std::vector<PointRecord> shapes = {kernels_point(8), kernels_point(16)};
  const GateFile decode = file("d.h5", {decode_point(1024)}), own = file("k.h5", shapes);
  const GateFile whole = peers_file(shapes, 15, 10.5);
  const auto with = [&](const GateFile& peers) { return judge({decode, own, peers}).at(0); };

  GateFile part = whole;
  part.result.points.pop_back();
  DeviceVerdict v = with(part);
  CHECK(v.verdict == Verdict::inconclusive);
  CHECK(contains(v.why, "N=256 H=4 D=64 n=16 scattered: no time of it in peers.h5; run it on the shapes of k.h5"));
  CHECK(v.error.outcome == Outcome::met);  // is about our kernel alone
  part = whole;
  part.result.points[0].fail("torch is wrong");
  v = with(part);
  CHECK(v.verdict == Verdict::inconclusive);
  CHECK(contains(v.why, "N=256 H=4 D=64 n=8 scattered: INVALID in peers.h5 (torch is wrong)"));

  // The same shape in another precision, or from caches, is other work.
  for (const auto& [key, value] : {Parameter{"model.precision", "fp16"}, Parameter{"kernels.cold", std::int64_t{0}},
                                   Parameter{"run.overlap", 0.5}}) {
    GateFile other = whole;
    for (PointRecord& p : other.result.points) {
      std::erase_if(p.parameters, [&](const Parameter& parameter) { return parameter.first == key; });
      p.parameters.emplace_back(key, value);
    }
    CHECK(contains(with(other).why, "no time of it in peers.h5"));
  }

  GateFile card = whole;
  card.result.run.system[0].uuid = "GPU-2";
  CHECK(contains(refusal({decode, own, card}), "k.h5 was measured on a device without UUID, peers.h5 on GPU-2"));
  CHECK(judge({file("e.h5", {decode_point(1024)}, "NVIDIA H100"), decode, own, whole}).at(0).peers.empty());
  GateFile twice = whole;
  twice.result.points.push_back(whole.result.points[0]);
  CHECK(contains(refusal({decode, own, twice}), "peers.h5 holds branch sel, context 0, N=256 H=4 D=64 n=8 scattered"));

  std::vector<GateFile> nameless = {decode, own, whole};  // no rank is described: one unknown device
  for (GateFile& f : nameless) f.result.run.system.clear();
  CHECK(judge(nameless).at(0).speedup.measured.value == Approx(1.5));

  // In every order the same page; a peer's commit is its script's and needs not be ours.
  std::vector<GateFile> files = {decode, own, whole};
  const auto by_path = [](const GateFile& a, const GateFile& b) { return a.path < b.path; };
  do {
    CHECK(judge(files).at(0).speedup.measured.value == Approx(1.5));
  } while (std::next_permutation(files.begin(), files.end(), by_path));
}

TEST_CASE("gate: the order of the files changes nothing", "[gate]") {
  PointRecord slow = kernels_point(32, {.sdpa = 20});
  GateFile host = file("h.h5", {decode_point(1024, {20, 100, 80})});
  host.result.run.backend = "host";
  host.result.run.system[0].cpu = "some CPU";
  std::vector<GateFile> files = {file("d.h5", {decode_point(1024)}), file("e.h5", {decode_point(2048)}),
                                 file("k.h5", {kernels_point(8)}), file("m.h5", {slow}), host};
  const auto by_path = [](const GateFile& a, const GateFile& b) { return a.path < b.path; };
  const auto page = [&] {
    std::ostringstream text;
    for (const DeviceVerdict& v : judge(files)) print_gate(text, v);
    return text.str();
  };
  const std::string expected = page();
  CHECK(contains(expected, "worst: N=256 H=4 D=64 n=32 scattered"));
  std::sort(files.begin(), files.end(), by_path);
  int orders = 0;
  do {
    CHECK(page() == expected);
    ++orders;
  } while (std::next_permutation(files.begin(), files.end(), by_path));
  CHECK(orders == 120);

  // Two inputs of one kind: refused in every order, with both files by name.
  PointRecord wide = decode_point(4096);
  wide.parameters[2].second = std::int64_t{128};
  files = {file("d.h5", {decode_point(1024)}), file("k.h5", {kernels_point(8)}), file("w.h5", {wide})};
  do {
    CHECK(contains(refusal(files), "decode model.d_k: 64 in d.h5, 128 in w.h5"));
  } while (std::next_permutation(files.begin(), files.end(), by_path));
}

TEST_CASE("gate: a NOISY point or shape decides nothing by its times, neither PROCEED nor STAY", "[gate]") {
  const auto noisy = [](PointRecord p) {
    p.noisy = {"total: the median moved", "copy rate 2878%"};
    return p;
  };
  const auto judged = [](const PointRecord& decode, const PointRecord& shape) {
    return judge({file("d.h5", {decode}), file("k.h5", {kernels_point(8), shape})}).at(0);
  };
  for (const Shares& shares : {Shares{}, Shares{20, 100, 80}}) {
    const DeviceVerdict v = judged(noisy(decode_point(1024, shares)), kernels_point(16));
    CHECK(v.verdict == Verdict::inconclusive);
    CHECK(contains(v.why, "is open (NOISY (total: the median moved); run it again on a quiet machine)"));
  }
  for (const Speeds& speeds : {Speeds{}, Speeds{.sdpa = 11}}) {
    const DeviceVerdict v = judged(decode_point(1024), noisy(kernels_point(16, speeds)));
    CHECK(v.verdict == Verdict::inconclusive);
    CHECK(contains(v.why, "N=256 H=4 D=64 n=16 scattered: NOISY (total: the median moved)"));
    CHECK(v.error.outcome == Outcome::met);
  }
  const DeviceVerdict wrong = judged(decode_point(1024), noisy(kernels_point(16, {.error = 2e-3})));
  CHECK(wrong.verdict == Verdict::stay);  // an error does not depend on noise
}

TEST_CASE("gate: where contexts differ the verdict of the device lists them", "[gate]") {
  const std::vector<GateFile> files = {
      file("d.h5", {decode_point(4096), decode_point(1024, {20, 100, 80}), decode_point(2048, {25, 100, 75, 2.0})}),
      file("k.h5", {kernels_point(8)})};
  const DeviceVerdict v = judge(files).at(0);
  CHECK(v.verdict == Verdict::proceed);
  CHECK(contains(v.why, "ship the kernel at contexts 4096, stay on sdpa at 1024, undecided at 2048"));
  CHECK(judge(files, {1024}).at(0).verdict == Verdict::stay);
  CHECK(judge(files, {2048}).at(0).verdict == Verdict::inconclusive);
  CHECK(judge(files, {1024, 2048}).at(0).verdict == Verdict::inconclusive);
}

TEST_CASE("gate: several devices, a page each", "[gate]") {
  GateFile host = file("h.h5", {decode_point(1024, {20, 100, 80})});
  host.result.run.backend = "host";
  host.result.run.git_commit = "other";  // another device may have another commit
  host.result.run.system[0].cpu = "some CPU";
  const auto v = judge({file("d.h5", {decode_point(1024)}), host, file("k.h5", {kernels_point(8)})});
  REQUIRE(v.size() == 2);
  CHECK(v[0].device == "NVIDIA H200");
  CHECK(v[0].files == std::vector<std::string>{"d.h5", "k.h5"});
  CHECK(v[0].verdict == Verdict::proceed);
  CHECK(v[1].device == "some CPU");
  CHECK(v[1].verdict == Verdict::stay);
}

TEST_CASE("gate: what may not be mixed is refused, saying which", "[gate]") {
  GateFile other = file("k.h5", {kernels_point(8)});
  other.result.run.git_commit = "def";
  CHECK(contains(refusal({file("d.h5", {decode_point(1024)}), other}), "d.h5 is of commit abc, k.h5 of def"));

  PointRecord wide = decode_point(2048);
  wide.parameters[2].second = std::int64_t{128};
  CHECK(contains(refusal({file("d.h5", {decode_point(1024)}), file("e.h5", {wide})}),
                 "decode model.d_k: 64 in d.h5, 128 in e.h5"));
  PointRecord exact = kernels_point(8);
  exact.parameters[1].second = "fp32";
  CHECK(contains(refusal({file("d.h5", {decode_point(1024)}), file("k.h5", {exact})}),
                 "model.precision: bf16 in d.h5, fp32 in k.h5"));
  PointRecord two = decode_point(2048);
  two.heads = 2;
  CHECK(contains(refusal({file("d.h5", {decode_point(1024)}), file("e.h5", {two})}),
                 "decode heads x kv: 1 x 1 in d.h5, 2 x 1 in e.h5"));
  CHECK(contains(refusal({file("d.h5", {decode_point(1024)}), file("e.h5", {decode_point(1024)})}),
                 "d.h5 and e.h5 both hold decode, context 1024"));

  GateFile both = file("d.h5", {decode_point(1024)});
  both.result.run.system.resize(2);
  both.result.run.system[1].gpu = "NVIDIA A100";
  CHECK(contains(refusal({both}), "d.h5 ran on NVIDIA H200 and NVIDIA A100"));
  CHECK(contains(refusal({file("d.h5", {})}), "d.h5 holds no point"));
}

TEST_CASE("gate: JSON holds the content of the page, null where nothing was measured", "[gate]") {
  std::ostringstream out;
  PointRecord p = decode_point(1024);
  p.reason = "";
  print_gate_json(out, judge({file("d\"1\".h5", {p})}), {});
  CHECK(contains(out.str(), R"("files":["d\"1\".h5"],"verdict":"INCONCLUSIVE")"));
  CHECK(contains(out.str(), R"("measured":{"value":null,"low":null,"high":null,"n":0},"outcome":"open")"));
  CHECK(contains(out.str(), R"("share":{"name":"selection's share of the step >= 25%","threshold":0.25)"));
}
