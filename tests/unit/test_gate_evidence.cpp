// Which files and points the gate counts: what inputs ask for, peers, noise, several devices.

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <sstream>

#include "catch.hpp"
#include "nsa/config/config.hpp"
#include "nsa/gate/gate.hpp"
#include "unit/gate_files.hpp"

using namespace nsa;
using namespace nsa::test;

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
