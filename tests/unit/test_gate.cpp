// The gate's conditions on made-up files with known answers.

#include <sstream>

#include "catch.hpp"
#include "nsa/gate/gate.hpp"
#include "unit/gate_files.hpp"

using namespace nsa;
using namespace nsa::test;

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
  CHECK(contains(v.why, "no ablation_sel: nsa run inputs/gate/m4_decode.toml --set run.context=1024"));

  p = decode_point(1024);
  p.routes[sel] = "fused";
  v = judge({file("d.h5", {p}), file("k.h5", {kernels_point(8)})}).at(0);
  CHECK(v.verdict == Verdict::inconclusive);
  CHECK(contains(v.why, "selection ran as fused"));

  v = judge({file("d.h5", {decode_point(1024)})}).at(0);
  CHECK(v.verdict == Verdict::inconclusive);
  CHECK(contains(v.why, "not measured: nsa run inputs/gate/m4_kernels.toml"));

  v = judge({file("k.h5", {kernels_point(8)})}).at(0);
  CHECK(v.verdict == Verdict::inconclusive);
  CHECK(contains(v.why, "no valid decode point, so no share of selection: nsa run inputs/gate/m4_decode.toml"));

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
