#pragma once
// A run with every field of its records set to something of its own, for the tests of the result file.

#include <cmath>
#include <numeric>

#include "nsa/results/records.hpp"

namespace nsa {

inline RunRecord sample_run() {
  RunRecord run;
  run.run_uuid = "0b6f6a5e-5d1c-4c53-9d0e-2f9f6f3f2a11";
  run.start = "2025-01-02T03:04:05Z";
  run.end = "2025-01-02T03:05:05Z";
  run.argv = "nsa run input.toml --set run.seed=2";
  run.input_toml = "[task]\nkind = \"decode\"  # \xC3\xA9\n" + std::string(70000, '#');  // past HDF5's 64 KiB
  run.input_sha256 = "abc";
  run.git_commit = "def";
  run.compiler = "GNU 12.2.0";
  run.backend = "host";
  run.program = "torch 2.11.0";
  run.input_selection_sha256 = "0f1e";
  run.status = "running";
  run.system.resize(2);
  for (int r = 0; r < 2; ++r) {
    run.system[r].host = "node" + std::to_string(r);
    run.system[r].cpu = "some CPU";
    run.system[r].mpi = "Open MPI 4.1.4";
    run.system[r].clock_mhz_before = 1980.0 + r;
    run.system[r].ecc_before = r;
    run.system[r].environment = "OMP_NUM_THREADS=" + std::to_string(r + 1);
    run.system[r].threads = r + 1;
    run.system[r].cores = 8;
    run.system[r].sharers = 2;
  }
  return run;
}

template <class T>
std::vector<T> counting(std::int64_t n, T from) {
  std::vector<T> values(static_cast<std::size_t>(n));
  std::iota(values.begin(), values.end(), from);
  return values;
}

/// Two ranks, heads = 2; modes branches and total; 3 repetitions of which one warms up.
inline PointRecord sample_point(std::int64_t index) {
  PointRecord p;
  p.index = index;
  p.parameters = {{"task.kind", "decode"},
                  {"model.rope_base", 10000.0},
                  {"run.context", std::int64_t{128} << index},
                  {"run.batch", std::int64_t{1}},
                  {"model.d_k", std::int64_t{64}}};
  p.fingerprint = "f00d" + std::to_string(index);
  p.valid = index != 1;
  p.reason = p.valid ? "" : "max_abs_err 0.5 > 0.01";
  p.stop_reason = "steps";
  p.heads = 2;
  p.kv = 1;
  p.first_position = 128;
  p.blocks_shared = 0.25;
  if (index == 0) p.chunk = {{"fused", "fused", "sdpa"}, {"table", "table", "route"}, {"tiled", "tiled, rows", ""}};
  if (index == 0) p.quantisation = {0.97, 0.0125, 0.03, 0.02};
  p.warmup_reps = 1;
  p.time = {{"branches", "total"}, 2, 3, counting(2 * stage_count * 2 * 3, 1e-3)};
  p.time.seconds[5] = std::nan("");
  p.phases = {{"attend_cmp", "wait_lse"}, 2, 3, counting(2 * 2 * 3, 1e-6)};
  p.reads = {2, 4, counting<std::int64_t>(3 * 2 * 4, 100), counting<std::int64_t>(3 * 2 * 4, 200),
             counting<std::int64_t>(4, 1193)};
  p.bytes = counting<std::int64_t>(stage_count * 2, std::int64_t{1} << 40);
  p.tokens_kept = {3, 4, 1, 2};
  p.copy_bandwidth = 12.5e9;
  p.memory.kinds = {"weights", "caches", "activations", "workspace", "total"};
  p.memory.planned = counting<std::int64_t>(10, 1000);
  p.memory.measured_peak = counting<std::int64_t>(10, 2000);
  p.memory.process_peak = {3000, 3001};
  p.routes = {"sdpa", "fused", "flash"};
  p.route_kernels = {"sdpa", "tiled, rows", ""};
  p.exchange = "peer memory";
  p.fallbacks = {"sel: fused -> sdpa: refused (3)", "win: flash -> sdpa: failed (1)"};
  p.max_abs_err = 1e-6;
  // "selected" is a tensor and, elsewhere, a dimension; "row" has two lengths; "block" has none at all.
  p.tensors = {{"x", {1, 5, 4}, {"batch", "row", "dim"}, counting(20, 0.5f), {}},
               {"weights/w_q", {4, 4}, {"in", "out"}, counting(16, 1.0f), {}},
               {"weights/w_o", {4, 2}, {"in", "out"}, counting(8, 2.0f), {}},
               {"selected", {1, 2, 2}, {"batch", "row", "selected"}, {}, {0, 3, 0, -1}},
               {"k_cmp_tokens", {1, 0, 4}, {"batch", "block", "dim"}, {}, {}},
               {"y", {1, 2, 4}, {"batch", "row", "dim"}, counting(8, 3.0f), {}}};
  p.kernels = {{"fused", "sdpa"}, 2, 3, counting(2 * 2 * 3, 1e-5), {1e-4, 2e-4}, {1e-2, 2e-2}, {1e-6, 2e-6},
               {"tiled", "sdpa"}};
  p.batch = {{7, 300, 41}, {1, 2, 3, 4, 5, 6, 7, 8, 9}, {1, 2, 3, 4, 5, 6, 7, 8, 9}, 2.5, 1.03};
  p.pages = {{"sel", "cmp"}, 2, {64, 64, 65, 65}, {5, 6, 7, 8}, {9, 10, 11, 12}, {1, 2, 3, 4}, {512, 1024, 2048, 4096}};
  p.noise.modes = {"branches", "total"};
  p.noise.ranks = 2;
  p.noise.seconds = counting(4, 0.5), p.noise.steal = counting(4, 0.25), p.noise.sm_clock_mhz = counting(4, 1500.0);
  p.noise.cv = counting(4, 0.125), p.noise.outlier_share = counting(4, 0.0625);
  p.noise.voluntary_switches = counting<std::int64_t>(4, 10),
  p.noise.involuntary_switches = counting<std::int64_t>(4, 20);
  p.noise.minor_faults = counting<std::int64_t>(4, 30), p.noise.major_faults = counting<std::int64_t>(4, 40);
  p.noise.throttle_reasons = {-1, 0, 4, 64};
  p.noise.throttled_passes = {0, 0, 3, 3};
  p.noise.sm_clock_max_mhz = {1980, 1981};
  p.noise.cache_bytes = {50'000'000, 60'000'000};
  p.noisy = {"total: the median moved", "copy rate 2878%"};
  p.needle = {{"depth", {0.0, 0.5, 1.0}}, {"position", {0, 64, 127}}, {"found", {1, 1, 0}}};
  return p;
}

}  // namespace nsa
