#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <string>

#include "catch.hpp"
#include "nsa/config/config.hpp"
#include "nsa/experiment/dry_run.hpp"
#include "nsa/experiment/plan.hpp"
#include "nsa/report/metrics.hpp"
#include "nsa/report/report.hpp"

using namespace nsa;

namespace {

constexpr double none = std::numeric_limits<double>::quiet_NaN();

/// A decode point on 2 ranks, 2 warm-up repetitions and 7 measured ones. In "branches" stage s of rank r takes
/// (s + 1) * (r + 1) us, warm-up a thousand times that; "total" takes 50 us on rank 0 and 40 on rank 1.
PointRecord a_point() {
  PointRecord p;
  p.parameters = {
      {"task.kind", "decode"},      {"run.context", std::int64_t{128}},     {"run.batch", std::int64_t{1}},
      {"run.force_branch", "none"}, {"model.n_kv_groups", std::int64_t{2}}, {"model.layers", std::int64_t{1}}};
  p.heads = 2;
  p.warmup_reps = 2;
  p.time = {{"branches", "total"}, 2, 9, {}};
  for (int mode = 0; mode < 2; ++mode)
    for (int stage = 0; stage < stage_count; ++stage)
      for (int rank = 0; rank < 2; ++rank)
        for (int rep = 0; rep < 9; ++rep) {
          const bool whole = stage == static_cast<int>(Stage::step);
          const double seconds = mode == 0 ? (stage + 1) * (rank + 1) * 1e-6
                                 : whole   ? (rank == 0 ? 50e-6 : 40e-6)
                                           : none;
          p.time.seconds.push_back(rep < 2 ? 1000 * seconds : seconds);
        }
  // [branch][rank][step]: the last step of (cmp 9, sel 160, win 160) in each of 2 groups, one a rank.
  p.reads = {2, 2, {8, 9, 8, 9, 159, 160, 159, 160, 159, 160, 159, 160}, {}, {1192, 1193}};
  p.reads.expected = p.reads.counted;
  return p;
}

template <class Print>
std::string printed(Print&& print) {
  std::ostringstream out;
  print(out);
  return out.str();
}

std::string metrics(const std::vector<PointRecord>& points) {
  return printed([&](std::ostream& out) { print_metrics(out, points); });
}

bool has(const std::string& text, const std::string& part) {
  INFO("looking for: " << part << "\nin: " << text);
  const bool found = text.find(part) != std::string::npos;
  CHECK(found);
  return found;
}

}  // namespace

TEST_CASE("a stage's time is the slowest rank's, after warm-up", "[report]") {
  PointRecord p = a_point();
  CHECK(stage_time(p, "branches", Stage::project).median == Approx(2e-6));
  CHECK(stage_time(p, "branches", Stage::project).n == 7);
  CHECK(step_time(p).median == Approx(50e-6));
  CHECK(stage_time(p, "one_hot_cmp", Stage::step).n == 0);
  p.time.modes[1] = "one_hot_cmp";
  CHECK(step_time(p).median == Approx(22e-6));  // of the branches mode, where total was not run
}

TEST_CASE("repetitions that a mode did not make are left out", "[report]") {
  PointRecord p = a_point();
  const std::size_t row = static_cast<std::size_t>(stage_count + static_cast<int>(Stage::step)) * 2 * 9;
  for (const std::size_t rank : {0, 1}) p.time.seconds[row + rank * 9 + 8] = none;
  CHECK(step_time(p).n == 6);
}

TEST_CASE("selection's share counts ranking and attending", "[report]") {
  // Stages take 1..10 us times 2: rank is the 5th, attend_sel the 6th, all ten sum to 55.
  CHECK(selection_share(a_point()) == Approx(11.0 / 55.0));
  PointRecord p = a_point();
  p.time.modes[0] = "one_hot_cmp";
  CHECK(std::isnan(selection_share(p)));
}

TEST_CASE("reads are those of the last step, for one sequence and group", "[report]") {
  const ReadCounts reads = last_reads(a_point());
  CHECK(reads.counted == 329);
  CHECK(reads.expected == 329);
  CHECK(reads.nsa_vibe == 1193);
  PointRecord p = a_point();
  p.reads.counted[1] += 1;  // one token too many shows, and not rounded away
  CHECK(last_reads(p).counted == 329.5);
  p.reads = {};
  CHECK(std::isnan(last_reads(p).counted));
}

TEST_CASE("the slowest rank is that of the most work of its own", "[report]") {
  const std::vector<double> work = rank_work(a_point());
  REQUIRE(work.size() == 2);
  CHECK(work[0] == Approx(45e-6));  // 1 + ... + 9, without comm
  CHECK(work[1] == Approx(90e-6));
  const std::string text = printed([](std::ostream& out) { print_notes(out, {a_point()}); });
  has(text,
      "\nslowest rank at context_128: 1 of 2 (heads=2 x kv=1), 90.0 us of its own work, 2.00 x the median of the "
      "others\n");
}

TEST_CASE("the transport of exchanges is printed unless it is MPI", "[report]") {
  const auto notes = [](std::vector<const char*> exchanges) {
    std::vector<PointRecord> points;
    for (const char* exchange : exchanges) points.push_back(a_point()), points.back().exchange = exchange;
    return printed([&](std::ostream& out) { print_notes(out, points); });
  };
  has(notes({"peer memory"}), "\nsmall exchanges went through peer memory\n");
  has(notes({"", "NCCL"}), "\nsmall exchanges went through NCCL\n");
  has(notes({"peer memory", "NCCL", "peer memory"}), "\nsmall exchanges went through NCCL, peer memory\n");
  for (const char* exchange : {"", "MPI"}) CHECK(notes({exchange}).find("went through") == std::string::npos);
}

TEST_CASE("a point that ran the scalar kernel says so in a line", "[report]") {
  PointRecord p = a_point();
  p.route_kernels = {"step", "tiled, rows", "decode"};
  const auto notes = [&] { return printed([&](std::ostream& out) { print_notes(out, {p}); }); };
  CHECK(notes().find("scalar") == std::string::npos);
  p.parameters.push_back({"model.d_k", std::int64_t{100}});
  p.parameters.push_back({"model.d_v", std::int64_t{36}});
  p.parameters.push_back({"model.precision", "fp16"});
  p.route_kernels = {"scalar", "decode", "rows, scalar"};
  p.copy_bandwidth = 1e9;
  p.bytes.assign(2 * stage_count, 0);
  p.bytes[2 * static_cast<int>(Stage::step)] = 1000;  // in 50 us
  has(notes(),
      "scalar kernel at context_128: cmp, win (no tensor-core kernel takes d_k=100 d_v=36 fp16), 2.0% of the copy");
}

TEST_CASE("the share of the copy rate is that of the busiest rank, without bytes from peers", "[report]") {
  PointRecord p = a_point();
  CHECK(std::isnan(copy_rate_fraction(p)));
  p.copy_bandwidth = 10e9;
  p.bytes.assign(stage_count * 2, 0);
  p.bytes[static_cast<int>(Stage::step) * 2] = 1000;
  p.bytes[static_cast<int>(Stage::step) * 2 + 1] = 300'000;
  p.bytes[static_cast<int>(Stage::comm) * 2 + 1] = 50'000;
  CHECK(copy_rate_fraction(p) == Approx(250e3 / 50e-6 / 10e9));
}

TEST_CASE("the bytes of a whole step are those of what ran", "[report]") {
  PointRecord p = a_point();
  p.parameters = {{"task.kind", std::string("decode")}, {"model.precision", std::string("bf16")}};
  for (const auto& [key, value] : std::vector<std::pair<const char*, int>>{{"nsa.l", 32},
                                                                           {"nsa.d", 16},
                                                                           {"nsa.l_sel", 64},
                                                                           {"nsa.n_sel", 16},
                                                                           {"model.n_heads", 8},
                                                                           {"model.n_kv_groups", 2},
                                                                           {"model.d_k", 64},
                                                                           {"model.d_v", 32},
                                                                           {"model.layers", 3},
                                                                           {"run.batch", 5}})
    p.parameters.emplace_back(key, std::int64_t{value});
  p.heads = 2;
  p.bytes.assign(stage_count, 0);
  p.bytes[static_cast<int>(Stage::step)] = 1'000'000;
  p.bytes[static_cast<int>(Stage::rank)] = 320'000;
  const auto bytes = [&](const char* kernel) {
    p.route_kernels[cmp] = kernel;
    return step_bytes(p, 0);
  };
  CHECK(bytes("decode") == 1'000'000);                        // stage by stage
  CHECK(bytes("shard, decode") == 1'000'000 - 440'000);       // 10 of 32 numbers, stored and read
  const double kept = 3 * 5 * 4 * (2 * 64 * 2 + 6 * 32 * 4);  // q twice more, three outputs stored and read
  CHECK(bytes("step, decode") == 1'000'000 - 460'000 - kept);
  CHECK(fused_step_bytes(p, 0) == bytes("step, decode"));
  p.kv = 2;  // in one launch: a rank stores no outputs of branches and reads none; o, and W_O, of half of the heads
  p.parameters.emplace_back("model.dim", std::int64_t{10});
  p.bytes[static_cast<int>(Stage::output)] = 100'000;  // 600 of them y
  const double kept_by_two = 3 * 5 * 4 * (2 * 64 * 2 + 9 * 32 * 4);
  CHECK(bytes("sharded_step, decode") == 1'000'000 - 460'000 - kept_by_two - (3 * 5 * 4 * 32 * 2 + 99'400) / 2);
  p.kv = 1;
  p.parameters.emplace_back("parallel.kv_chunk_blocks", std::int64_t{4});  // chunks of half a tile: raw scores
  CHECK(bytes("step, decode") == 1'000'000 - kept);
  p.time.modes = {"branches"};
  CHECK(bytes("step, decode") == 1'000'000);
}

TEST_CASE("times have three digits and the unit that suits", "[report]") {
  CHECK(time_text(1.234e-6) == "1.23 us");
  CHECK(time_text(12.34e-6) == "12.3 us");
  CHECK(time_text(123.4e-6) == "123 us");
  CHECK(time_text(999.96e-6) == "1.00 ms");
  CHECK(time_text(0.0456) == "45.6 ms");
  CHECK(time_text(12.0) == "12.0 s");
  CHECK(time_text(none) == "-");
}

TEST_CASE("the table has a line a point, and columns only where a point needs them", "[report]") {
  PointRecord p = a_point();
  std::string text = printed([&](std::ostream& out) { print_points(out, {p}); });
  has(text,
      " context    total      cmp     rank      sel      win     comm    other  share           reads\n"
      "     128  50.0 us  8.00 us  10.0 us  12.0 us  14.0 us  20.0 us  46.0 us  20.0%         329/329\n"
      "total: ");
  for (const char* column : {"cmp: compressed attention", "rank: block scoring and top-n", "sel: selected attention",
                             "win: window attention", "comm: exchanges among ranks", "other: ", "share: ", "reads: "})
    has(text, column);
  CHECK(text.find("nsa-vibe") == std::string::npos);
  CHECK(text.find("batch: ") == std::string::npos);
  p.parameters[2].second = std::int64_t{4};
  p.parameters[3].second = "sel";
  p.valid = false;
  text = printed([&](std::ostream& out) { print_points(out, {a_point(), p}); });
  has(text, " context  batch forced    total");
  has(text, "     128      4    sel  50.0 us");
  has(text, "  INVALID\n");
  has(text, "batch: sequences\nforced: the branch whose gate is 1");
  has(text, "           reads tokens/s\n");
  has(text, "82.25/82.25    80000  INVALID\n");
  has(text, "\ntokens/s: sequences / total\n");
  CHECK(text.find("prefix") == std::string::npos);
  p.parameters.emplace_back("run.prefix", std::int64_t{57344});
  text = printed([&](std::ostream& out) { print_points(out, {a_point(), p}); });
  has(text, " context   prefix  batch forced    total");
  has(text, "     128    57344      4    sel  50.0 us");
  has(text, "\nprefix: tokens of each sequence that the caches held before\n");
}

TEST_CASE("several query tokens have a column and a cost in figures", "[report]") {
  PointRecord one = a_point(), four = a_point();
  one.parameters.emplace_back("run.query_tokens", std::int64_t{1});
  four.parameters.emplace_back("run.query_tokens", std::int64_t{4});
  four.tokens_kept = {4, 2};  // 3 in the mean
  for (double& seconds : four.time.seconds) seconds *= 1.5;
  const std::string text = metrics({one, four});
  has(text, "FOM decode_rate_context_128 = 20000.0 tokens/s\n");
  has(text, "FOM decode_rate_context_128_query_tokens_4 = 40000.0 tokens/s\n");
  has(text, "FOM decode_query_token_cost_context_128_query_tokens_4 = 1.500 1\n");
  CHECK(metrics({four}).find("query_token_cost") == std::string::npos);
  const std::string table = printed([&](std::ostream& out) { print_points(out, {one, four}); });
  has(table, " context queries    total");
  has(table, "     128       4  75.0 us");
  has(table, "\nqueries: query tokens of each sequence in a step\n");
  has(table, "\ntokens/s: tokens that a step keeps / total\n");
}

TEST_CASE("a ragged batch has its own name in figures", "[report]") {
  PointRecord p = a_point();
  p.parameters[2].second = std::int64_t{3};
  PointRecord equal = p;
  p.batch = {{1, 2, 381}, {}, {}, 2.98, 1.02};
  has(metrics({p}), "FOM decode_rate_context_128_batch_3_listed = 60000.0 tokens/s\n");
  p.parameters.emplace_back("batch.distribution", "zipf");
  CHECK(metrics({p}).find("ragged_cost") == std::string::npos);
  for (double& seconds : equal.time.seconds) seconds /= 1.25;
  has(metrics({equal, p}), "FOM decode_ragged_cost_context_128_batch_3_zipf = 1.250 1\n");
  has(printed([&](std::ostream& out) {
        print_points(out, {equal, p});
      }),
      "\nragged at context_128_batch_3_zipf: 1.250 x the time of equal lengths, longest 2.98 x the mean, most work of "
      "an "
      "SM 1.02 x the mean\n");
}

TEST_CASE("nsa-vibe's formula is in the table of a run that writes a CSV", "[report]") {
  PointRecord p = a_point();
  p.parameters.emplace_back("output.csv", "decode.csv");
  const std::string text = printed([&](std::ostream& out) { print_points(out, {p}); });
  has(text, "  share           reads nsa-vibe\n");
  has(text, "  20.0%         329/329     1193\n");
  has(text, "\nnsa-vibe: tokens by the formula of that project");
}

TEST_CASE("what was not measured shows as a dash", "[report]") {
  PointRecord p = a_point();
  p.time = {};
  p.reads = {};
  const std::string text = printed([&](std::ostream& out) { print_points(out, {p}); });
  has(text, "     128        -        -        -        -        -        -        -      -             -/-\n");
}

TEST_CASE("metrics have stable names, and the result comes last", "[report]") {
  PointRecord p = a_point();
  p.max_abs_err = 1.5e-7;
  p.memory.kinds = {"weights", "total"};
  p.memory.measured_peak = {1, 2, 3'000'000, 4'000'000};
  CHECK(metrics({p}) ==
        "FOM decode_time_context_128 = 50.000 us\n"
        "FOM decode_rate_context_128 = 20000.0 tokens/s\n"
        "FOM decode_selection_share_context_128 = 20.00 %\n"
        "FOM decode_max_abs_err_context_128 = 1.500e-07 1\n"
        "FOM decode_peak_memory_context_128 = 4.000 MB\n"
        "RESULT: VALID\n");
  p.parameters[2].second = std::int64_t{4};
  p.parameters[3].second = "sel";
  p.valid = false;
  p.reason = "reads differ";
  has(metrics({a_point(), p}), "FOM decode_rate_context_128_batch_4_force_sel = 80000.0 tokens/s\n");
  has(metrics({a_point(), p}), "\nRESULT: INVALID (context_128_batch_4_force_sel: reads differ)\n");
}

TEST_CASE("what a launch adds is the step between events less the step on the device's clock", "[report]") {
  PointRecord p = a_point();
  p.time.modes = {"branches", "total", "device", "queued"};
  for (const double seconds : {44e-6, 46e-6})
    for (int stage = 0; stage < stage_count; ++stage)
      p.time.seconds.insert(p.time.seconds.end(), 2 * 9, stage == static_cast<int>(Stage::step) ? seconds : none);
  has(metrics({p}),
      "FOM decode_device_time_context_128 = 44.000 us\n"
      "FOM decode_launch_overhead_context_128 = 6.000 us\n"
      "FOM decode_launch_gap_context_128 = 2.000 us\n");
  CHECK(metrics({a_point()}).find("launch") == std::string::npos);
}

TEST_CASE("a prefill's metrics count its whole context, and nsa-vibe has no formula for it", "[report]") {
  PointRecord p = a_point();
  p.parameters[0].second = "prefill";
  has(metrics({p}), "FOM prefill_time_context_128 = 0.050 ms\nFOM prefill_rate_context_128 = 2560000.0 tokens/s\n");
  has(to_csv({p}), "\n128,0.050000,0.008000,0.022000,0.014000,329,329,,,\n");
  p.parameters.emplace_back("run.prefix", std::int64_t{1000});  // its tokens are not run
  has(metrics({p}), "FOM prefill_rate_context_128_prefix_1000 = 2560000.0 tokens/s\n");
}

TEST_CASE("needles: a line a depth, and how many were found", "[report]") {
  PointRecord p = a_point();
  p.parameters[0].second = "needle";
  p.needle = {{"depth", {0, 0.5}}, {"position", {0, 64}}, {"block", {0, 1}}, {"found", {1, 0}}, {"abs_err", {0, 2.5}}};
  const std::string text = printed([&](std::ostream& out) { print_needles(out, {p}); });
  has(text, "   0.000          0        0    yes   0.00e+00\n   0.500         64        1     no   2.50e+00\n");
  has(metrics({p}), "FOM needle_found_context_128 = 50.00 %\n");
}

TEST_CASE("the CSV has nsa-vibe's columns, then its formula", "[report]") {
  CHECK(to_csv({a_point()}) ==
        "S,ms_total,ms_cmp,ms_sel,ms_win,reads_actual,reads_expected,reads_actual_decode,reads_expected_decode,"
        "reads_nsa_vibe\n"
        "128,0.050000,0.008000,0.022000,0.014000,329,329,329,329,1193\n");
}

TEST_CASE("a plan lists owners and the exchanges of a step", "[plan]") {
  const Config config = parse_config(
      "[task]\nkind = \"decode\"\n[run]\nbackend = \"host\"\ncontext = 1000\nsteps = 24\n"
      "[parallel]\nheads = 2\nkv = 3\nkv_chunk_blocks = 2\n",
      "in.toml", {});
  const std::string text = printed([&](std::ostream& out) { print_plan(out, config, 6); });
  // 1024 positions are 16 blocks in 8 chunks: 0 3 6, 1 4 7, 2 5.
  has(text, "     0          0         0          0        0-1  0-1 6-7 12-13\n");
  has(text, "     4          1         1          1        2-3  2-3 8-9 14-15\n");
  has(text, "     5          1         2          1        2-3  4-5 10-11\n");
  has(text, "exchange a step and layer: candidates     all_gather over 3 ranks, 128 B from each\n");    // 16 of 8 bytes
  has(text, "exchange a step and layer: outputs        all_reduce over 2 ranks, 1.02 kB from each\n");  // 256 floats
  CHECK_THROWS(printed([&](std::ostream& out) { print_plan(out, config, 4); }));
  CHECK(idle_ranks(config, 6).empty());
}

TEST_CASE("a plan of many ranks is short and says which own nothing", "[plan]") {
  const auto with = [](const char* parallel) {
    return parse_config(std::string("[task]\nkind = \"decode\"\n[run]\nbackend = \"host\"\ncontext = 65528\nsteps = 8\n"
                                    "warmup = 2\nfill = \"synthetic\"\n[parallel]\n") +
                            parallel,
                        "in.toml", {});
  };
  const Config config = with("heads = 2\nkv = 8192\n");  // 65536 positions: 1024 blocks in 64 chunks of 16
  const std::string text = printed([&](std::ostream& out) { print_plan(out, config, 16384); });
  CHECK(std::count(text.begin(), text.end(), '\n') < 30);
  has(text, "       0-63          0      0-63          0        0-1  16 each, the first 0-15\n");
  has(text, "    64-8191          0   64-8191          0        0-1  none\n");
  has(text, " 8192-8255          1      0-63          1        2-3  16 each, the first 0-15\n");
  // 1024 blocks cannot serve 8192 kv ranks, with two KV groups neither with more heads.
  has(text,
      "warning: 8128 of 8192 kv ranks own no block of the 65536 positions (1024 blocks in chunks of 16); use at most "
      "2048 ranks, or a longer context\n");
  CHECK(idle_ranks(with("heads = 1\nkv = 512\n"), 512) ==
        "448 of 512 kv ranks own no block of the 65536 positions (1024 blocks in chunks of 16); "
        "parallel.kv_chunk_blocks = "
        "2 would use them all");
  CHECK(idle_ranks(with("heads = 1\nkv = 512\nkv_chunk_blocks = 2\n"), 512).empty());
  // The suggested layout uses all ranks.
  CHECK(idle_ranks(with("heads = 1\nkv = 2048\n"), 2048)
            .find("parallel.heads = 2, parallel.kv = 1024, "
                  "parallel.kv_chunk_blocks = 1 would") != std::string::npos);
  CHECK(idle_ranks(with("heads = 2\nkv = 1024\nkv_chunk_blocks = 1\n"), 2048).empty());
}
