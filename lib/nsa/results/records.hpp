#pragma once
// What one point of a run leaves behind: plain data, gathered on rank 0, written by result_file, printed by
// the report. Definitions of every number: docs/METRICS.md; their place in the file: docs/SCHEMA.md.

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "nsa/config/config.hpp"

namespace nsa {

/// Stages of a step in the order they run. `step` is the whole of it.
enum class Stage : int {
  project,
  append,
  compress,
  attend_cmp,
  rank,
  attend_sel,
  attend_win,
  combine,
  output,
  comm,
  step
};
constexpr std::array stage_names = {"project",    "append",  "compress", "attend_cmp", "rank", "attend_sel",
                                    "attend_win", "combine", "output",   "comm",       "step"};
constexpr int stage_count = static_cast<int>(stage_names.size());

/// Raw samples: seconds[mode][stage][rank][rep], NaN where a mode does not time a stage.
/// Modes by name: "branches", "total", "ablation_cmp|sel|win" (that branch left out), "one_hot_cmp|sel|win".
struct TimeTable {
  std::vector<std::string> modes;
  std::int64_t ranks = 0, reps = 0;
  std::vector<double> seconds;
};

/// Tokens read, counted where they were loaded, summed over the rank's sequences, groups and layers:
/// counted[branch][rank][step], expected likewise from the shape alone.
struct ReadTable {
  std::int64_t ranks = 0, steps = 0;
  std::vector<std::int64_t> counted, expected;
  std::vector<std::int64_t> nsa_vibe;  ///< [step]: cmp + n*l' + min(w, S), their formula, for one (b, g)
};

/// A tensor of the run, whole (gathered over ranks), row-major.
struct TensorRecord {
  std::string name;  ///< "x", "weights/w_q", "q", ... (design section 7)
  std::vector<std::int64_t> shape;
  std::vector<std::string> dims;  ///< "batch", "row", "head", ...
  std::vector<float> values;      ///< used unless integers is not empty
  std::vector<std::int32_t> integers;
};

struct MemoryRecord {                                ///< bytes, by rank
  std::vector<std::string> kinds;                    ///< "weights", "caches", "activations", "workspace", "total"
  std::vector<std::int64_t> planned, measured_peak;  ///< [kind][rank]
  std::vector<std::int64_t> process_peak;            ///< [rank], growth of the resident set at its peak
};

/// kind = "kernels": implementations of one branch on one shape, measured repetition beside repetition, and how far
/// each is from attention in float64 over all of its outputs.
struct KernelRecord {
  std::vector<std::string>
      implementations;  ///< "fused", "sdpa" (gather and packed), "sdpa_packed" (packed before), ...
  std::int64_t ranks = 0, reps = 0;
  std::vector<double> seconds;                    ///< [implementation][rank][rep], of one execution
  std::vector<double> mean_abs_err, max_abs_err;  ///< [implementation]
  std::vector<double> mean_abs_err_se;            ///< [implementation], standard error of the mean over query rows
  std::vector<std::string> variants;              ///< [implementation], the backend's kernel; empty in files before 1.3
};

struct PointRecord {
  std::int64_t index = 0;
  std::vector<Parameter> parameters;
  std::string fingerprint;  ///< hash of all that decides the result: parameters, sharding, backend, input
  bool valid = true;
  std::string reason;       ///< why not valid
  std::string stop_reason;  ///< "steps" or "min_time" (or "interrupted")
  std::int64_t heads = 1, kv = 1, first_position = 0, warmup_reps = 0;
  TimeTable time;
  ReadTable reads;
  std::vector<std::int64_t> bytes;  ///< modelled bytes moved a step [stage][rank]
  double copy_bandwidth = 0;        ///< bytes/s read + written, measured on the slowest rank
  MemoryRecord memory;
  std::array<std::string, branches> routes, route_reasons;  ///< what ran, and why it was chosen
  std::array<std::string, branches> route_kernels;          ///< as which kernels of the backend: "tiled, rows"
  std::string exchange;  ///< what small exchanges went through: "MPI", "NCCL", "peer memory"; "": one rank
  std::vector<std::string>
      fallbacks;            ///< "sel: fused -> sdpa: reason (12 calls)", "prefill sel: ..." in a decode point
  double max_abs_err = -1;  ///< against float64 at sampled rows; < 0: not checked
  std::vector<TensorRecord> tensors;
  void fail(const std::string& why) {  ///< the first reason stands; "" is none
    if (why.empty()) return;
    valid = false;
    if (reason.empty()) reason = why;
  }
  std::map<std::string, std::vector<double>> needle;  ///< kind = "needle": depth, position, block, found, abs_err
  KernelRecord kernels;                               ///< kind = "kernels"
};

struct RankSystem {
  std::string host, cpu, gpu, uuid, driver, cuda, nccl, mpi;
  double clock_mhz_before = 0, clock_mhz_after = 0;
  std::int64_t ecc_before = -1, ecc_after = -1;
  std::string environment;  ///< variables that change times: "OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive"
  std::int64_t threads = 0, cores = 0, sharers = 0;  ///< host threads; cores they may use; ranks on these cores
};

struct RunRecord {
  std::string run_uuid, start, end, argv, input_toml, input_sha256, git_commit, compiler, backend, status;
  std::string config;              ///< the input as it took effect, every key, with --set; TOML
  std::string input_file_sha256;   ///< of what [input] file holds; empty without one
  std::int64_t resumed = 0;        ///< how often the run was taken up again
  std::vector<RankSystem> system;  ///< by rank
};

}  // namespace nsa
